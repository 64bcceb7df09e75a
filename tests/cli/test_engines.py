"""The two engines as the commands have them: which is trained, and what is said of it."""

import csv
import json
import re

import pytest
from support.command import Place, assert_refused, said

from ia3 import FewShotClassifier
from ia3.base.embedded import EMBEDDED_ENCODER

TRAIN = """text,label
my parcel never came,delivery
the courier left it in the rain,delivery
where is my shipment,delivery
tracking has not moved,delivery
you charged my card twice,billing
the invoice is wrong,billing
I want my money back,billing
why was the price so high,billing
"""
TEST = "text,label\nthe van did not come,delivery\nmy bank was debited two times,billing\n"
SEEN = (
    rf"encoder (\d+) ± (\d+) \(frozen, held-out folds, 8 texts\), "
    rf"language-model \d+ ± \d+ \(untuned[a-z, ]*, 8 texts\): encoder {EMBEDDED_ENCODER}\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A folder with data, a language model that knows nothing, and what was fitted to the data."""
    place = Place(tmp_path_factory.mktemp("engines"), tiny_model)
    place.write("train.csv", TRAIN)
    place.write("test.csv", TEST)
    fit = ("fit", "--data", "train.csv", "--language-model", tiny_model, "--steps", 2)
    choices = ("--choice", "billing=money", "--choice", "delivery=parcel")
    place.fits = place.run_all(
        (*fit, "--out", "chosen"),
        (*fit, "--out", "told", "--json", "--threads", 1),
        (*fit, "--out", "asked", "--template", "{{ text }} is", "--json"),
        (*fit, "--out", "named", "--model", EMBEDDED_ENCODER, "--steps", 0, "--json"),
        (*fit, "--out", "x", "--init-from", "chosen"),
        (*fit, "--out", "x", "--model", EMBEDDED_ENCODER, *choices),
    )
    return place


def test_fit_says_what_it_saw_of_both_and_what_it_trained(place):
    chosen, told, *_ = place.fits
    assert chosen.returncode == 0, chosen.stderr
    trained = r"Trained on 8 examples of 2 classes in \d+ s; \d+ KiB in chosen\n"
    measured = r"accuracy before training \d+\.\d% ± \d+\.\d \(\d of 8\), macro F1 \d+\.\d%;"
    seen = re.match(SEEN + trained + measured, chosen.stderr)
    assert seen, chosen.stderr
    told = said(told)
    assert (told["engine"], told["model"], told["steps"]) == ("encoder", EMBEDDED_ENCODER, 2)
    encoder, language_model = told["candidates"]
    assert encoder["engine"] == "encoder"
    assert [round(100 * encoder[name]) for name in ("accuracy", "error")] == [
        *map(int, seen.groups())
    ]
    assert language_model["name"] == str(place.model)
    folder = place.folder / told["adapter"]
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes["adapter_model.safetensors"] == told["adapter_bytes"]
    assert sizes["ia3_head.safetensors"] == told["head_bytes"]


def test_a_template_means_the_language_model(place):
    told = said(place.fits[2])
    assert (told["engine"], told["model"]) == ("language-model", str(place.model))


def test_an_encoder_that_is_named_is_compared_with_the_frozen_one(place):
    told = said(place.fits[3])
    (frozen,) = told["candidates"]
    assert (frozen["engine"], frozen["name"]) == ("encoder", EMBEDDED_ENCODER)
    assert frozen["note"] == "frozen, held-out folds, 8 texts"
    assert (told["steps"], told["final_loss"]) == (0, None)


def test_what_contradicts_the_model_is_refused(place):
    *_, start, choice = place.fits
    assert_refused(start, "--init-from is given and model is 'auto'")
    assert_refused(choice, "choices are a language model's")
    assert not (place.folder / "x").exists()


def test_predict_and_evaluate_read_an_encoders_classifier(place):
    predicted, evaluated, other = place.run_all(
        ("predict", "chosen", "--data", "test.csv", "--max-tokens", 1),
        ("evaluate", "chosen", "--data", "test.csv", "--json"),
        ("evaluate", "chosen", "--data", "test.csv", "--model", place.model),
    )
    rows = list(csv.DictReader(predicted.stdout.splitlines()))
    texts = [row["text"] for row in rows]
    expected = FewShotClassifier.load(place.folder / "chosen").predict(texts).tolist()
    assert [row["prediction"] for row in rows] == expected
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert said(evaluated)["accuracy"] == right / len(rows)
    assert other.returncode == 1
    assert other.stderr.startswith("error: ")


@pytest.mark.slow
def test_fit_many_says_which_engine_each_task_has(place):
    place.write(
        "tasks.yaml",
        f"""
        model: {EMBEDDED_ENCODER}
        defaults: {{data: train.csv, steps: 2}}
        tasks: {{queue: {{}}, again: {{seed: 1, steps: 1}}, absent: {{data: none.csv}}}}
        """,
    )
    fit_many = ("fit-many", "tasks.yaml", "--out", "many", "--threads", 1)
    done, shown = place.run_all((*fit_many, "--json"), fit_many, COLUMNS="200")
    assert done.returncode == shown.returncode == 1, done.stderr
    queue, again, absent = json.loads(done.stdout)["tasks"]
    assert (queue["engine"], queue["model"], queue["steps"]) == ("encoder", EMBEDDED_ENCODER, 2)
    assert [each["engine"] for each in queue["candidates"]] == ["encoder"]
    assert again["steps"] == 1
    assert "engine" not in absent
    words = [line.replace("│", " ").split() for line in shown.stdout.splitlines()]
    assert ["queue", "many/queue", "encoder", "8", "2"] in [line[:5] for line in words]
