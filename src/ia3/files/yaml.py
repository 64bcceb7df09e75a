"""YAML files as plain data: mappings, lists and scalars, and no key of a mapping twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import BrokenFileError, MissingFileError, shown

# A larger file is data, not settings, and would take more than some seconds to read.
LARGEST = 1 << 19
DEEPEST = 50
# Counted with all repetitions by references, which a file makes as many of as it likes.
MOST_VALUES = 1_000_000
LONGEST_NUMBER = 1000
_TAG = "tag:yaml.org,2002:"
# What Python raises for a scalar that is not what its tag says.
_WRONG = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def read_yaml(path: Path, what: str, *, as_text: bool = False, tags: Sequence[str] = ()) -> Any:
    """What a YAML file holds; `what` it is expected to be is for messages.

    With `as_text`, every scalar is the text that is written (the label `no` is not false, and `01`
    is not 1), and tags are passed over. Otherwise a tag is an error, but for `tags` of mappings,
    which are read as plain ones.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is not YAML, a key is there twice, it is larger than 512 KiB, nested
            deeper than 50 times, or its references repeat more than a million values.
    """
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise MissingFileError(f"{path} {kind}, expected {what}")
    if path.stat().st_size > LARGEST:
        raise BrokenFileError(f"{path} is larger than {LARGEST} bytes, expected {what}")

    class Loader(_Strict, yaml.BaseLoader if as_text else yaml.SafeLoader):  # type: ignore[misc]
        """With tags of its own."""

    for tag in tags:
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    loader = None
    try:
        loader = Loader(path.read_text("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise BrokenFileError(f"{path} is nested too deeply, or holds itself") from error
    except (yaml.YAMLError, *_WRONG) as error:
        unquoted = "unhashable" in str(error)
        hint = "; a text that begins with '{' needs quotes around it" if unquoted else ""
        raise BrokenFileError(f"{path} is not YAML: {error}{hint}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: Any, known: dict[int, int]) -> int:
    """How many values a node has, with all that its references repeat."""
    if id(node) in known:
        if not known[id(node)]:
            raise RecursionError
        return known[id(node)]
    known[id(node)] = 0  # until it is known
    size = 1
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value or not node.value.isascii():
            _check_text(node)
    else:
        for item in node.value:
            for part in item if isinstance(item, tuple) else (item,):
                size += _count(part, known)
        if size > MOST_VALUES:
            problem = f"its references repeat more than {MOST_VALUES} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    known[id(node)] = size
    return size


def _check_text(node: Any) -> None:
    """Refuse what no text of a file can hold, and YAML writes with backslashes."""
    try:
        node.value.encode()
        problem = "a NUL character" if "\0" in node.value else ""
    except UnicodeEncodeError:
        problem = "half a surrogate pair, which is no character"
    if problem:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Strict:
    """What both loaders check."""

    _merged = 0

    # Where brackets and indents begin: they are nested in recursive calls afterwards.
    def fetch_flow_collection_start(self, token_class: Any) -> None:
        self._check_depth()
        super().fetch_flow_collection_start(token_class)  # type: ignore[misc]

    def add_indent(self, column: int) -> bool:
        self._check_depth()
        return bool(super().add_indent(column))  # type: ignore[misc]

    def _check_depth(self) -> None:
        if self.flow_level + len(self.indents) > DEEPEST:  # type: ignore[attr-defined]
            problem = f"nested deeper than {DEEPEST} times"
            raise yaml.scanner.ScannerError(None, None, problem, self.get_mark())  # type: ignore[attr-defined]

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)  # type: ignore[misc]
        # What a reference merges is counted again each time, before it is copied.
        self._merged += len(node.value)
        if self._merged > LARGEST:
            problem = f"merged mappings come to more than {LARGEST} keys"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def construct_scalar(self, node: Any) -> Any:
        number = node.tag in (f"{_TAG}int", f"{_TAG}float")
        if number and len(node.value) > LONGEST_NUMBER:
            problem = f"a number of {len(node.value)} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_scalar(node)  # type: ignore[misc]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        # Before merge keys (`<<`) are resolved, which may bring keys that the mapping replaces.
        keys = [key for key, _ in node.value if key.tag != f"{_TAG}merge"]
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        seen: set[Any] = set()
        for key_node in keys:
            key = self.construct_object(key_node, deep=True)  # type: ignore[attr-defined]
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} is there twice", key_node.start_mark
                )
            seen.add(key)
        return mapping
