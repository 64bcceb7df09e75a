"""The examples in the docstrings of the public entry points, run as they stand there."""

from __future__ import annotations

import doctest
import os
from importlib import import_module
from pathlib import Path

import pytest

import ia3

ENTRY_POINTS = {
    "FewShotClassifier": ia3.FewShotClassifier,
    "IA3Config": ia3.IA3Config,
    "explain": ia3.explain,
    "get_peft_model": ia3.get_peft_model,
    "IA3Model.from_pretrained": ia3.IA3Model.from_pretrained,
    "IA3Model.set_adapter": ia3.IA3Model.set_adapter,
    "IA3Model.merge_and_unload": ia3.IA3Model.merge_and_unload,
    "IA3Model.route": ia3.IA3Model.route,
    "AdapterBank": ia3.AdapterBank,
    "fit_many": ia3.fit_many,
    "classify": import_module("ia3.classify.mixed").classify,
    "combine": ia3.combine,
    "check_examples": ia3.check_examples,
    "load_base_model": ia3.load_base_model,
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_example_of_an_entry_point_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = ENTRY_POINTS[name]
    parsed = doctest.DocTestParser().get_doctest(entry.__doc__ or "", {}, name, None, None)
    assert parsed.examples
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    with open(os.devnull, "w") as nowhere:
        results = doctest.DocTestRunner(optionflags=options).run(parsed, out=nowhere.write)
    assert results.failed == 0, name
