"""The examples in docstrings, run as doctest runs them."""

from __future__ import annotations

import doctest
import inspect


def run_examples(thing: object) -> None:
    """Run the `>>>` examples in the docstring of a function or class, which has at least one."""
    (test,) = doctest.DocTestFinder(recurse=False, exclude_empty=False).find(
        thing, getattr(thing, "__name__", None), module=inspect.getmodule(thing), globs={}
    )
    assert test.examples
    output: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
    assert results.failed == 0, "".join(output)
