"""The model card beside an adapter: a text for people, under a head that the hub reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .. import __version__
from ..base.embedded import EMBEDDED_MODEL
from ..files.hub import CARD_NAME, hub_id
from ..targets.config import IA3Config, TaskType

# Not empty: older versions of huggingface_hub look on for its end in the text below.
HEADLESS = "---\nlibrary_name: peft\n---\n"
TEXT = """
# (IA)³ adapter

Learned vectors that multiply inner activations of {base}, which stays as it is.

```python
from ia3 import PeftModel  # or from peft

model = PeftModel.from_pretrained(base_model, "the folder or the id of this adapter")
```

### Framework versions

- ia3 {version}
"""


def card_file(folder: Path | None, config: IA3Config, tags: Iterable[str] = ()) -> dict[str, bytes]:
    """A card for an adapter, by its file's name: a new one, or a folder's with more in its head.

    The text of one that is there stays, and what its head says but for the library. It is left out
    where its head cannot be read: whoever wrote it knows better.
    """
    path = folder / CARD_NAME if folder is not None else None
    try:
        before = path.read_bytes().decode("utf-8") if path and path.is_file() else None
        return {CARD_NAME: model_card(before, config, tags).encode()}
    except ValueError:
        return {}


def model_card(before: str | None, config: IA3Config, tags: Iterable[str] = ()) -> str:
    """A card, or `before` with what its head lacks; a `ValueError` where that cannot be read."""
    name = config.base_model_name_or_path
    base = None if name == EMBEDDED_MODEL else hub_id(name)
    if before is None:
        linked = f"[{base}](https://huggingface.co/{base})" if base else "a frozen base model"
        before = HEADLESS + TEXT.format(base=linked, version=__version__)
    elif not before.lstrip().startswith("---"):
        before = HEADLESS + before
    try:
        return _completed(before, base, config, tags)
    except Exception as error:  # a head of another form fails anywhere in the hub's reader
        raise ValueError(f"the head of the model card cannot be read: {error}") from error


def _completed(before: str, base: str | None, config: IA3Config, tags: Iterable[str]) -> str:
    from huggingface_hub import ModelCard

    card = ModelCard(before)
    head, said = card.data, card.data.to_dict()
    there = [head.tags] if isinstance(head.tags, str) else head.tags or []
    ours = {"ia3", *tags} | ({f"base_model:adapter:{base}"} if base else set())
    head.tags = [*there, *sorted(ours.difference(there))]
    head.library_name = "peft"
    head.base_model = head.base_model or base
    if config.task_type == TaskType.CAUSAL_LM:
        head.pipeline_tag = head.pipeline_tag or "text-generation"
    return before if head.to_dict() == said else str(card.content)
