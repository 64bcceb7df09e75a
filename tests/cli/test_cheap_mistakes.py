"""Mistakes seen from the command line and the data alone: torch is not loaded for them."""

from __future__ import annotations

import pytest
from support.command import Place

DATA = "review,label\nso good,positive\nnever again,negative\n"
FIT = ("fit", "--data", "data.csv", "--text", "review", "--out", "x")
COMPARE = ("compare", "--data", "data.csv", "--text", "review", "--out", "y")
SAID = {
    (*FIT, "--device", "gpu"): "'gpu' is no device",
    (*FIT, "--device", "cuda0"): "'cuda0' is no device: 'auto', 'cpu', 'cuda', 'cuda:1', ...; did",
    (*FIT, "--device", "cuda:x"): "'cuda:x' is no device",
    (*FIT, "--dtype", "flaot32"): "'flaot32' is no type of numbers",
    (*FIT, "--dtype", "int8"): "'int8' is no type of numbers",
    ("predict", "x", "--data", "data.csv", "--dtype", "fp16"): "did you mean 'float16'?",
    (*FIT, "--template", "{{ review"): "unexpected end of template",
    (*FIT, "--template", "{{ reviw }}"): "not 'reviw'; did you mean 'review'?",
    (*FIT, "--template", "Category:"): "names no column of the text",
    (*FIT, "--template", "{{ text }}", "--template", "{{ review }}"): "use one of the two",
    (*COMPARE, "--template", "{{ reviw }}"): "did you mean 'review'?",
    (*FIT, "--choice", "postive=good", "--choice", "negative=bad"): "--choice 'postive': no "
    "example has this label; did you mean 'positive'?",
    (*FIT, "--choice", "positive=good"): "--choice has no words for 'negative'",
    (*COMPARE, "--choice", "postive=good", "--choice", "negative=bad"): "mean 'positive'?",
    (*FIT, "--init-from", "./none"): "--init-from: none does not exist",
    (*FIT, "--init-from", "empty"): "--init-from: no adapter in empty",
    ("predict", "none", "--data", "data.csv", "--text", "review"): "no classifier in none",
    ("evaluate", "none", "--data", "data.csv", "--text", "review"): "no classifier in none",
    ("evaluate", "empty", "--data", "data.csv", "--text", "review"): "no classifier in empty",
    ("combine", "none", "empty", "--out", "z"): "no adapter in none",
    ("merge", "none", "--out", "z"): "no adapter in none",
    ("merge", "empty", "--out", "z"): "no adapter in empty",
    ("export", "none", "--lora", "4", "--out", "z"): "give --lossy",
    ("export", "none", "--lora", "4", "--out", "z", "--lossy"): "no adapter in none",
    ("inspect", "none", "--png", "a.png"): "none is not a folder",
    ("inspect", "none", "--png", "data.csv"): "choose another --png, or give --force",
    ("inspect", "none", "--html", "data.csv"): "choose another --html, or give --force",
    ("diff", "none", "none", "--html", "data.csv"): "choose another --html, or give --force",
}


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    place.write("data.csv", DATA)
    (place.folder / "empty").mkdir()
    return place


def test_each_is_one_line_and_torch_is_not_loaded(place):
    wrong = []
    for done, expected in zip(place.run_all(*SAID), SAID.values(), strict=True):
        in_one_line = done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        if done.returncode not in (1, 2) or not in_one_line or expected not in done.stderr:
            wrong.append((done.args, done.stderr))
    assert wrong == []
    assert place.loaded.isdisjoint({"torch", "transformers", "sklearn"})
    assert place.names() == {"data.csv", "empty"}
