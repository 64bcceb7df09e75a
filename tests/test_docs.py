"""The programs in the documents, run as they stand there, on small models and data."""

import json
import re
import subprocess
import sys

import pytest
from support.paths import REPOSITORY
from support.tfew import tiny_llama, word_tokenizer

from ia3 import FewShotClassifier, IA3Config, IA3Model
from ia3.classify.engine import Candidate
from ia3.classify.many_manifest import read_many_manifest
from ia3.tfew import load_templates
from ia3.tfew.prompts.manifest import read_manifest

DOCS = REPOSITORY / "docs"
PAGE = (DOCS / "tfew.md").read_text("utf-8")
FEW_SHOT = (DOCS / "few-shot.md").read_text("utf-8")
MIXED = (DOCS / "mixed.md").read_text("utf-8")
SCIKIT_LEARN = (DOCS / "scikit-learn.md").read_text("utf-8")
ROWS = [
    {"premise": "It rained all day .", "hypothesis": "It was wet .", "label": 0},
    {"premise": "The shop is open .", "hypothesis": "The shop is closed .", "label": 1},
    {"premise": "He ran home .", "hypothesis": "He went home .", "label": 0},
]


def blocks(language, page=PAGE):
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def run(program, folder):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_model(text, folder):
    """Save a random model that knows the text's words as `my-model-folder`."""
    tokenizer = word_tokenizer(re.findall(r"\w+|[^\w\s]+", text))
    model = tiny_llama(vocabulary=len(tokenizer))
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "my-model-folder")
    return model


@pytest.mark.slow
def test_the_recipe_trains_evaluates_and_saves(tmp_path):
    texts = [
        *(part for t in load_templates("rte") for part in (t.prompt.source, t.choices.source)),
        *(text for row in ROWS for text in (row["premise"], row["hypothesis"])),
    ]
    save_model(" ".join(texts), tmp_path)
    for name in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    # 1,000 steps say no more than 20 here.
    recipe = blocks("python")[0].replace("TFewConfig()", "TFewConfig(steps=20)")
    assert "median=" in run(recipe, tmp_path)
    assert (tmp_path / "rte-adapter" / "adapter_model.safetensors").is_file()


def test_the_loss_has_gradients(tmp_path):
    program = blocks("python")[1] + "\nprint(bool((logits.grad != 0).any()), float(loss.total))"
    gradients, total = run(program, tmp_path).split()
    assert gradients == "True"
    assert float(total) > 0


def test_the_manifest_names_three_tasks(tmp_path):
    # What this page cannot bring along: a Parquet file and promptsource's templates.
    manifest = blocks("yaml")[0].replace("boolq.parquet", "boolq.jsonl")
    manifest = manifest.replace("promptsource/boolq ", "wic ")
    (tmp_path / "mixture.yaml").write_text(manifest)
    (tmp_path / "rte.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "boolq.jsonl").write_text('{"word": "a", "label": 1}\n')
    (tmp_path / "tickets.csv").write_text("text,queue\nlate,van\ntwice,bill\n")
    tasks = read_manifest(tmp_path / "mixture.yaml")
    assert [task.name for task in tasks] == ["rte", "boolq", "tickets"]
    (template,) = tasks[2].templates
    rendered = template.render(tasks[2].train[1])
    assert rendered is not None
    assert (rendered.prompt, rendered.choices[rendered.answer]) == ("twice\nCategory:", "bill")


@pytest.mark.slow
def test_a_classifier_chooses_is_saved_and_read_back(tmp_path):
    first, further, _ = blocks("python", FEW_SHOT)
    printed = run(f"{first}print()\n{further}", tmp_path).splitlines()
    *seen, trained, predicted = printed[: printed.index("")]
    assert [line.split()[0] for line in seen] == ["encoder", "language-model"]
    assert trained == "encoder all-minilm-l6-v2"
    assert predicted == "['billing']"
    # Nothing is wrong with the texts; two are suggested, and one text gets its labels in a list.
    *suggested, labels = printed[printed.index("") + 1 :]
    assert sorted(int(line.split()[0]) in range(3) for line in suggested) == [True, True]
    assert labels.startswith("[['billing'")
    section = FEW_SHOT.partition("## What is saved")[2].partition("##")[0]
    names = re.findall(r"`(\w+\.(?:json|safetensors))`", section)
    assert set(names) == {path.name for path in (tmp_path / "queue").iterdir()} - {"README.md"}


def test_the_line_that_fit_prints_is_as_it_stands_there():
    note = "frozen, held-out folds, 32 texts"
    frozen = Candidate(engine="encoder", name=None, accuracy=0.65, error=0.08, note=note)
    note = "untuned, calibrated, 32 texts"
    untuned = Candidate(engine="language-model", name=None, accuracy=0.41, error=0.09, note=note)
    assert f"    {frozen}, {untuned}: encoder all-minilm-l6-v2\n" in FEW_SHOT


@pytest.mark.slow
def test_many_tasks_are_fitted(tmp_path):
    *_, program = blocks("python", FEW_SHOT)
    save_model(program, tmp_path)
    assert run(program, tmp_path).rstrip().endswith("'] {}")
    for name in ("queue", "mood"):
        assert (tmp_path / "classifiers" / name / "adapter_model.safetensors").is_file()


def test_the_manifest_of_many_tasks_names_two(tmp_path):
    (manifest,) = blocks("yaml", FEW_SHOT)
    (tmp_path / "tasks.yaml").write_text(manifest)
    models, tasks = read_many_manifest(tmp_path / "tasks.yaml")
    # What the manifest says is what holds where it says nothing.
    (tmp_path / "tasks.yaml").write_text(manifest.replace("model: auto", ""))
    assert read_many_manifest(tmp_path / "tasks.yaml")[0] == models == {"model": "auto"}
    assert [task.label for task in tasks.values()] == ["Label", "Label"]
    assert tasks["ade"].choices == {"ADE-related": "yes", "not ADE-related": "no"}
    assert tasks["organisations"].text == ["Paper title", "Organization name"]


@pytest.mark.slow
def test_a_search_scores_lists_of_labels(tmp_path):
    score = float(run(blocks("python", SCIKIT_LEARN)[0], tmp_path))
    assert 0.7 < score <= 1


@pytest.mark.slow
def test_labels_are_numbered_by_hand_around_a_language_model(tmp_path):
    _, voting, one_each = blocks("python", SCIKIT_LEARN)
    save_model(voting + one_each, tmp_path)
    voted, answers = run(voting + one_each, tmp_path).splitlines()
    assert voted in ("['billing']", "['delivery']")
    assert set(re.findall(r"'(\w+)': (?:np\.)?(?:True|False)", answers)) == {"billing", "delivery"}


@pytest.mark.slow
def test_a_bank_classifies_for_two_customers(tmp_path):
    program, _ = blocks("python", MIXED)
    texts = ["You charged me twice.", "Where is my parcel?"]
    for name, labels in (("customer-a", ["ledger", "depot"]), ("customer-b", ["bill", "van"])):
        classifier = FewShotClassifier("all-minilm-l6-v2", steps=2).fit(texts, labels)
        classifier.save(tmp_path / "classifiers" / name)
    found = [line.split() for line in run(program, tmp_path).splitlines()]
    assert [label for label, _ in found] == ["ledger", "van", "bill"]
    assert all(0.5 < float(probability) <= 1 for _, probability in found)


def test_a_bank_generates_for_two_customers_and_the_base_model(tmp_path):
    _, program = blocks("python", MIXED)
    model = save_model(program, tmp_path)
    for name in ("customer-a", "customer-b"):
        adapted = IA3Model(model, IA3Config(init_ia3_weights=False))
        adapted.save_pretrained(tmp_path / "adapters" / name)
        adapted.unload()
    assert "tensor([[" in run(program, tmp_path)
