"""YAML files as plain data: mappings, lists and scalars, and no key of a mapping twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import IA3Error, MissingFileError

# A larger file is data, not settings.
LARGEST = 1 << 20
_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path, what: str, *, as_text: bool = False, tags: Sequence[str] = ()) -> Any:
    """What a YAML file holds; `what` it is expected to be is for messages.

    With `as_text`, every scalar is the text that is written (the label `no` is not false, and `01`
    is not 1), and tags are passed over. Otherwise a tag is an error, but for `tags` of mappings,
    which are read as plain ones.
    """
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise MissingFileError(f"{path} {kind}, expected {what}")
    if path.stat().st_size > LARGEST:
        raise IA3Error(f"{path} is larger than {LARGEST} bytes, expected {what}")

    class Loader(_Strict, yaml.BaseLoader if as_text else yaml.SafeLoader):  # type: ignore[misc]
        """With tags of its own."""

    for tag in tags:
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    try:
        return yaml.load(path.read_text("utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        unquoted = "unhashable" in str(error)
        hint = "; a text that begins with '{' needs quotes around it" if unquoted else ""
        raise IA3Error(f"{path} is not YAML: {error}{hint}") from error


class _Strict:
    """What both loaders check."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        # Before merge keys (`<<`) are resolved, which may bring keys that the mapping replaces.
        keys = [key for key, _ in node.value if key.tag != _MERGE]
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        seen: set[Any] = set()
        for key_node in keys:
            key = self.construct_object(key_node, deep=True)  # type: ignore[attr-defined]
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return mapping
