"""An adapter's folder, read for a server: its vectors by module, or why it cannot be served."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..adapter.files import Adapter, read_adapter
from ..errors import IA3Error, counted, shown
from ..files.json import parse_object
from ..files.saved import SavedFolder
from ..targets.config import PeftType


def holds_ia3(folder: str | Path) -> bool:
    """Whether a folder's config is an (IA)³ adapter's; where there is none, it is not."""
    with suppress(FileNotFoundError), SavedFolder(folder) as saved:
        return parse_object(*saved.config_text()).get("peft_type") == PeftType.IA3
    return False


def read_vectors(folder: str | Path) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter, and its vectors in float32 by module name: `[dim, 1]` on an output, `[1, dim]`
    on an input. What is frozen is one.

    Raises:
        BrokenFileError: a file is damaged, or refused.
        IA3Error: it has more than vectors on layers: copies of modules, or vectors of experts.
    """
    adapter = read_adapter(folder)
    if adapter.copies:
        names = sorted(adapter.copies)
        raise IA3Error(
            f"{folder}: this adapter has its own values of {counted(len(names), 'parameter')}, "
            f"{shown(names[0])} the first (modules_to_save, or new tokens' embeddings): vLLM has "
            "one base model for all rows. Merge the adapter (ia3 merge), and serve it as a model "
            "of its own"
        )
    vectors = {}
    for name, given in adapter.vectors.items():
        if given.dim() != 2 or 1 not in given.shape:
            raise IA3Error(
                f"{folder}: the vector of {name!r} has the shape {list(given.shape)}, expected "
                "[dim, 1] or [1, dim]: vLLM serves vectors on linear layers, and none of experts "
                "or convolutions"
            )
        vector = given.float()
        for start, end in adapter.frozen.get(name, ()):
            vector.view(-1)[start:end] = 1
        vectors[name] = vector
    return adapter, vectors
