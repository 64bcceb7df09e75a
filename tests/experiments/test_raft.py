"""RAFT: the benchmark's files, cross-validation, submissions, and `ia3 raft` as a process."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, strategies as st
from support import tfew
from support.command import IA3, SMALL_FILES_ONLY, Place, assert_refused, said
from support.paths import DATA, needs_data
from support.raft import ADE, COLUMN, WORDS, some_labels, texts, write_csv, write_task
from support.snapshots import assert_unchanged, snapshot
from support.tfew import tiny_llama, tiny_t5, word_tokenizer

from ia3 import FewShotClassifier
from ia3.base.loading import BaseModel
from ia3.errors import BrokenFileError, IA3Error
from ia3.experiments import raft
from ia3.experiments.raft import RaftSettings, cross_validate, held_out, submission
from ia3.experiments.raft_data import RaftTask, public_labels, read_raft
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.prompts.tasks import RAFT_TASKS, load_templates
from ia3.tfew.training.trainer import TFewConfig

METHODS = ["majority", "zero-shot", "icl", "tfew"]
ENGLISH = ["advanced", "elementary", "intermediate"]


def topics() -> list[str]:
    """Banking77's labels as the benchmark writes them: with underscores."""
    (template,) = load_templates("banking_77")
    return [choice.replace(" ", "_") for choice in template.choices_of({})]


def task_of(folder, name="ade_corpus_v2", labels=ADE, of_rows=10, *, words=6, seed=0) -> RaftTask:
    """A task with these labels of its rows, or with so many rows."""
    if isinstance(of_rows, int):
        of_rows = some_labels(labels, of_rows, seed)
    train = list(zip(texts(len(of_rows), 1, words), of_rows, strict=True))
    write_task(folder, name, labels, train, texts(7, 2, words))
    (task,) = read_raft(folder, [name])
    return task


def tokenizer(*, end=False):
    """Every word of the templates, the labels and the texts is a token."""
    known = dict.fromkeys(WORDS)
    split = word_tokenizer().backend_tokenizer.pre_tokenizer
    for name in COLUMN:
        (template,) = load_templates(name)
        for source in (template.prompt.source, " ".join(template.choices_of({}))):
            known |= dict.fromkeys(word for word, _ in split.pre_tokenize_str(source))
    return word_tokenizer(list(known), end=end)


TOKENIZER = tokenizer()


def base_of(context=1024, name="tiny", seed=0) -> BaseModel:
    model = tiny_llama(seed, vocabulary=len(TOKENIZER), max_position_embeddings=context)
    return BaseModel(model, TOKENIZER, name)


def settings(*, sites="all-linear", max_prompt_tokens=None, **config) -> RaftSettings:
    config = TFewConfig(**{"steps": 3, "learning_rate": 0.05, "seed": 0, **config})
    return RaftSettings(config, sites, max_prompt_tokens)


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def kept(base, task, folder, method, given=None, **more):
    """The score of one method, and the records of its folds."""
    (score,) = cross_validate(base, task, given, methods=[method], results=folder, **more)
    return score, records(folder)


# -- the data --------------------------------------------------------------------------------------


@needs_data
def test_the_benchmark_is_read():
    tasks = read_raft(DATA / "raft")
    fields = json.loads((DATA / "raft" / "prompt_settings.jsonl").read_text().split("\n")[0])
    assert [task.name for task in tasks] == sorted(RAFT_TASKS)
    for task in tasks:
        assert len(task.train) == 50
        assert set(task.fields) == set(fields[task.name])
        ids = [int(row["ID"]) for row in (*task.train, *task.test)]
        assert ids == list(range(50 + len(task.test)))
        for row in task.train:
            assert task.template.render(row).answer == task.answer(row)
        assert task.template.render(task.test[-1], labelled=False).choices == task.choices
    (banking,) = (task for task in tasks if task.name == "banking_77")
    assert len(banking.labels) == 77
    truth = public_labels(banking, DATA / "banking77")
    assert len(truth) == 5000
    assert {*truth} == {*banking.labels}


def test_only_the_tasks_asked_for_are_read(tmp_path):
    write_task(tmp_path, "ade_corpus_v2", ADE, [("a", label) for label in ADE * 3], ["b"])
    task_of(tmp_path, "one_stop_english", ENGLISH)
    (tmp_path / "one_stop_english" / "task.json").write_text("broken")
    (task,) = read_raft(tmp_path, ["ade_corpus_v2"])
    assert (task.name, task.labels, task.fields) == ("ade_corpus_v2", tuple(ADE), ("Sentence",))
    assert [dict(row) for row in task.test] == [{"Sentence": "b", "ID": "6"}]
    with pytest.raises(IA3Error, match=r"task\.json does not describe a RAFT task"):
        read_raft(tmp_path)


BROKEN = [
    ("task.json", None, None, "task.json does not exist"),
    ("task.json", "label_columns", "x", "KeyError: 'label_columns'"),
    ("task.json", '"ADE-related"', '"ADE-related", "maybe"', "has 3 labels, expected the bench"),
    ("task.json", json.dumps(ADE), json.dumps(ADE[::-1]), "the benchmark's labels in its order"),
    (
        *("train.csv", "one,ADE-related", "one,ADE-rleated"),
        "train.csv, line 2: the label 'ADE-rleated' is not in task.json; did you mean 'ADE-related",
    ),
    ("train.csv", "Sentence,", "Text,", "no column 'Sentence' among"),
    ("task.json", '"Sentence"', '"Text"', "'Sentence' is undefined"),
    ("test_unlabeled.csv", ",ID", ",Number", "no column 'ID' among"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), BROKEN)
def test_broken_data(tmp_path, name, old, new, message):
    train = list(zip(["one", "two", "three", "four", "five", "six"], ADE * 3, strict=True))
    path = write_task(tmp_path, "ade_corpus_v2", ADE, train, ["seven", "eight"]) / name
    read_raft(tmp_path)
    if old is None:
        path.unlink()
    else:
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))
    with pytest.raises((IA3Error, FileNotFoundError), match=message):
        read_raft(tmp_path)


@given(st.integers(5, 60), st.integers(0, 2**32 - 1))
def test_every_row_is_held_out_once(examples, seed):
    folds = held_out(examples, 5, seed)
    assert sorted(i for fold in folds for i in fold) == list(range(examples))
    assert {len(fold) for fold in folds} <= {examples // 5, -(-examples // 5)}
    assert [held_out(examples, n, seed) for n in range(1, 6)] == [folds[:n] for n in range(1, 6)]
    assert held_out(50, 1, 0) != held_out(50, 1, 1)


# -- methods ---------------------------------------------------------------------------------------


def test_macro_f1_of_the_majority_by_hand(tmp_path):
    # Whatever two are held out, most of the others are the second label: all ten are predicted so.
    # A label that neither occurs nor is predicted does not count.
    for name, labels in (("ade_corpus_v2", ADE), ("one_stop_english", ENGLISH)):
        task = task_of(tmp_path, name, labels, [labels[0]] * 3 + [labels[1]] * 7)
        (score,) = cross_validate(base_of(), task, methods=["majority"])
        assert score.macro_f1 == pytest.approx((0 + 2 * 7 / (7 + 10)) / 2)
        assert (score.accuracy, score.examples) == (0.7, 10)


def test_the_majority_is_that_of_the_other_rows(tmp_path):
    of_rows = some_labels(ENGLISH, 15, 3)
    task = task_of(tmp_path, "one_stop_english", ENGLISH, of_rows)
    _, found = kept(base_of(), task, tmp_path / "out", "majority")
    assert [record["split"] for record in found] == [0, 1, 2, 3, 4]
    for record in found:
        counts = Counter(label for i, label in enumerate(of_rows) if str(i) not in record["ids"])
        # Of several that are the most frequent, the first in the benchmark's order.
        expected = next(label for label in ENGLISH if counts[label] == max(counts.values()))
        assert record["predictions"] == [expected] * 3


def plain_prediction(base, task, prompt):
    """By whole texts, one choice after the other."""
    ids = base.tokenizer(prompt)["input_ids"]
    choices = [base.tokenizer(choice)["input_ids"] for choice in task.choices]
    example = EncodedExample(tuple(ids), tuple(map(tuple, choices)))
    with torch.no_grad():
        means = [float(t.mean()) for t in tfew.plain_token_scores(base, example)]
    return task.labels[means.index(max(means))]


def written(task, ids):
    """The demonstrations made of these rows."""
    rendered = [task.template.render(task.train[int(i)]) for i in ids]
    return "".join(f"{one.prompt} {task.choices[one.answer]}\n\n" for one in rendered)


def test_the_untuned_model_ranks_the_choices(tmp_path):
    task, base = task_of(tmp_path, "one_stop_english", ENGLISH), base_of()
    for record in kept(base, task, tmp_path / "out", "zero-shot")[1]:
        prompts = [task.template.render(task.train[int(i)]).prompt for i in record["ids"]]
        assert record["predictions"] == [plain_prediction(base, task, p) for p in prompts]


def tokens(text):
    return len(TOKENIZER(text)["input_ids"])


@pytest.mark.parametrize("context", [80, 150, 1024, "an encoder-decoder's"])
def test_as_many_demonstrations_as_the_context_holds(tmp_path, context):
    task = task_of(tmp_path)
    if isinstance(context, int):
        base = base_of(context)
    else:
        base = BaseModel(tiny_t5(vocabulary=len(TOKENIZER)), tokenizer(end=True), "t5")
        context = 1024
    score, found = kept(base, task, tmp_path / "out", "icl")
    prompts = [task.template.render(row).prompt for row in task.train]
    for record in found:
        shown, asked = record["demonstrations"], [prompts[int(i)] for i in record["ids"]]
        assert not {*shown} & {*record["ids"]}
        room = context - max(map(tokens, asked)) - max(map(tokens, task.choices))
        assert tokens(written(task, shown)) <= room
        for row in task.train:
            if row["ID"] not in (*shown, *record["ids"]):
                assert tokens(written(task, [*shown, row["ID"]])) > room
        expected = [plain_prediction(base, task, written(task, shown) + p) for p in asked]
        assert record["predictions"] == expected
    counts = [len(record["demonstrations"]) for record in found]
    assert score.demonstrations == tuple(counts)
    assert 0 < counts[0] < 8 if context == 150 else counts == [0 if context == 80 else 8] * 5


def test_tfew_is_a_classifier_fitted_on_the_other_rows(tmp_path):
    task, base = task_of(tmp_path, "one_stop_english", ENGLISH), base_of()
    words = dict(zip(task.labels, task.choices, strict=True))
    given = {"tokenizer": TOKENIZER, "steps": 6, "learning_rate": 0.05}
    classifier = FewShotClassifier(base.model, task.template.prompt.source, words, **given)
    _, found = kept(base, task, tmp_path / "out", "tfew", settings(steps=6), folds=2)
    assert len(found) == 2
    for record in found:
        others = [row for row in task.train if row["ID"] not in record["ids"]]
        classifier.fit(others, [row["Label"] for row in others])
        held = [task.train[int(i)] for i in record["ids"]]
        assert record["predictions"] == classifier.predict(held).tolist()


@pytest.mark.parametrize("sites", ["all-linear", "paper"])
def test_the_model_is_left_as_it_was(tmp_path, sites):
    task, base = task_of(tmp_path), base_of()
    before = snapshot(base.model)
    cross_validate(base, task, settings(sites=sites), folds=1)
    submission(base, task, settings(sites=sites))
    assert_unchanged(base.model, before)


def test_work_is_what_progress_counts(tmp_path):
    task, given, out = task_of(tmp_path, of_rows=11), settings(steps=4), tmp_path / "out"
    for _ in range(2):  # computed, and read
        done = []
        cross_validate(base_of(), task, given, folds=3, results=out, progress=done.append)
        assert sum(done) == raft.work(task, given, METHODS, 3)
        done.clear()
        submission(base_of(), task, given, results=out, progress=done.append)
        assert sum(done) == 4 + len(task.test)


def test_long_texts_are_cut_to_the_limit(tmp_path):
    task = task_of(tmp_path, words=60)
    base, cut = base_of(512), settings(max_prompt_tokens=70)
    with pytest.warns(UserWarning, match="10 of 10 prompts are longer than 70 tokens"):
        (score,) = cross_validate(base, task, cut, methods=["icl"], folds=1)
    (whole,) = cross_validate(base, task, methods=["icl"], folds=1)
    assert score.demonstrations[0] > whole.demonstrations[0]
    with pytest.warns(UserWarning, match="7 of 7 prompts are longer than 70 tokens"):
        submission(base, task, settings(max_prompt_tokens=70, steps=1))
    with pytest.raises(IA3Error, match="without any text; max_prompt_tokens is 5"):
        cross_validate(base, task, settings(max_prompt_tokens=5), methods=["zero-shot"])


# -- what is kept ----------------------------------------------------------------------------------


def test_what_is_kept_is_not_computed_again(tmp_path):
    task, out = task_of(tmp_path), tmp_path / "out"
    scores = cross_validate(base_of(), task, settings(), folds=2, results=out)
    predicted = submission(base_of(), task, settings(), results=out)
    content = (out / "results.jsonl").read_bytes()
    unable = base_of()
    unable.model.forward = Mock(side_effect=RuntimeError("computed again"))
    assert cross_validate(unable, task, settings(), folds=2, results=out) == scores
    assert submission(unable, task, settings(), results=out) == predicted
    assert (out / "results.jsonl").read_bytes() == content
    with pytest.raises(RuntimeError, match="computed again"):
        cross_validate(unable, task, settings(), folds=3, results=out)
    # Further folds are added to those before.
    more = cross_validate(base_of(), task, settings(), folds=3, results=out)
    assert (out / "results.jsonl").read_bytes().startswith(content)
    assert [score.examples for score in more] == [6] * 4
    assert {path.name for path in out.iterdir()} == {"results.jsonl"}


def test_other_settings_are_refused_by_name(tmp_path):
    task, out = task_of(tmp_path), tmp_path / "out"
    cross_validate(base_of(), task, settings(), folds=1, results=out)
    content = (out / "results.jsonl").read_bytes()
    for changed, named in [
        (settings(steps=4), "of tfew have steps=3, this run 4"),
        (settings(sites="paper"), "of tfew have sites='all-linear', this run 'paper'"),
        (settings(max_prompt_tokens=99), "of zero-shot have max_prompt_tokens=None, this run 99"),
        (settings(seed=1), "of majority have seed=0, this run 1"),
    ]:
        with pytest.raises(IA3Error, match=f"results.jsonl: its results {named}"):
            cross_validate(base_of(), task, changed, folds=1, results=out)
    with pytest.raises(IA3Error, match="have steps=3, this run 4"):
        submission(base_of(), task, settings(steps=4), results=out)
    with pytest.raises(IA3Error, match="have model='tiny', this run 'other'"):
        cross_validate(base_of(name="other"), task, settings(), folds=1, results=out)
    assert (out / "results.jsonl").read_bytes() == content
    # What does not depend on a setting does not mind it.
    rivals = ["majority", "zero-shot", "icl"]
    cross_validate(base_of(), task, settings(steps=4), methods=rivals, folds=1, results=out)
    assert (out / "results.jsonl").read_bytes() == content


def test_other_data_is_refused(tmp_path):
    task, out = task_of(tmp_path), tmp_path / "out"
    kept(base_of(), task, out, "majority")
    with pytest.raises(IA3Error, match="results of ade_corpus_v2 were computed on other data"):
        kept(base_of(), task_of(tmp_path / "other", seed=1), out, "majority")
    # Another task is not this one's data.
    another = task_of(tmp_path, "one_stop_english", ENGLISH)
    assert len(kept(base_of(), another, out, "majority")[1]) == 10


def test_broken_results_and_those_of_another_model_are_refused(tmp_path):
    task, out = task_of(tmp_path), tmp_path / "out"
    path = out / "results.jsonl"
    first, _ = kept(base_of(), task, out, "zero-shot")
    content = path.read_bytes()
    # Half a line is computed again, and so is a line of other rows.
    for changed in (content[:-40], content.replace(b'"ids": ["', b'"ids": ["x', 1)):
        path.write_bytes(changed)
        assert kept(base_of(), task, out, "zero-shot")[0] == first
    with pytest.raises(IA3Error, match="of zero-shot have base model="):
        kept(base_of(seed=1), task, out, "zero-shot")
    record = json.loads(content.splitlines()[0])
    other = {"task": 1, "part": True, "predictions": [3], "settings": [], "ids": {}, "split": None}
    changed = [{**record, name: value} for name, value in other.items()]
    for broken in ({"task": 1}, {**record, "ids": record["ids"][1:]}, *changed):
        path.write_text(json.dumps(broken) + "\n")
        with pytest.raises(BrokenFileError, match="line 1: not a result of RAFT"):
            kept(base_of(), task, out, "zero-shot")


# -- Banking77's public labels ---------------------------------------------------------------------


def public_folder(folder, rows, name="test.csv"):
    folder.mkdir(exist_ok=True)
    write_csv(folder / name, ("text", "category"), rows)
    return folder


@pytest.fixture
def banking(tmp_path):
    train = [(text, "age_limit") for text in texts(5, 1)]
    test = ["where is  my card?", "who\nare you ", "any topic", "unknown"]
    write_task(tmp_path / "raft", "banking_77", topics(), train, test)
    (task,) = read_raft(tmp_path / "raft")
    return task


def test_public_labels_are_found_by_text(banking, tmp_path):
    once = [("where is my card?", "Card arrival?"), ("who are you", "verify_my_identity")]
    once += [("any topic", "atm_support"), ("Unknown", "age_limit")]
    folder = public_folder(tmp_path / "public", once)
    again = [(" where is my\tcard?", "CARD-ARRIVAL"), ("any topic", "age_limit")]
    public_folder(folder, again, "train.csv")
    # One text has two labels, and case tells texts apart.
    truth = ["card_arrival", "verify_my_identity", None, None]
    assert public_labels(banking, folder) == truth
    score = raft.public_score(truth, ["card_arrival", "age_limit", "age_limit", "age_limit"])
    assert (score.matched, score.rows, score.accuracy) == (2, 4, 0.5)
    # Of three labels in truth or prediction, one is right.
    assert score.macro_f1 == pytest.approx(1 / 3)


def test_public_labels_that_are_none(banking, tmp_path):
    folder = tmp_path / "public"
    with pytest.raises(FileNotFoundError, match=r"neither .*test.csv nor .*train.csv exists"):
        public_labels(banking, folder)
    public_folder(folder, [("who are you", "verify_me")])
    with pytest.raises(IA3Error, match=r"test\.csv, line 2: the category 'verify_me' is none of"):
        public_labels(banking, folder)
    public_folder(folder, [("something else", "age_limit")])
    with pytest.raises(IA3Error, match="none of the test texts of banking_77 is in"):
        public_labels(banking, folder)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and two tasks of the benchmark; one has a test set of two parts."""
    folder = tmp_path_factory.mktemp("raft")
    base_of().model.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    train = list(zip(texts(10, 1), some_labels(ADE, 10), strict=True))
    write_task(folder / "data", "ade_corpus_v2", ADE, train, texts(130, 2))
    train = list(zip(texts(5, 3), topics(), strict=False))
    write_task(folder / "data", "banking_77", topics(), train, [*texts(3, 4), 'a "b", c'])
    public_folder(folder / "public", [(texts(3, 4)[0], "Automatic Top Up")])
    return Place(folder)


RAFT = ("raft", "--data", "data", "--model", "model")
SETTINGS = ("--steps", 28, "--learning-rate", 0.03, "--folds", 2, "--banking77", "public")


@pytest.fixture(scope="module")
def unbroken(place):
    """What a run in one go says."""
    return said(place.run(*RAFT, "--out", "unbroken", *SETTINGS, "--json"))


@pytest.mark.slow
def test_what_the_command_says_and_submits(place, unbroken):
    folder = place.folder / unbroken["submission"]
    assert sorted(path.name for path in folder.iterdir()) == ["ade_corpus_v2", "banking_77"]
    for task in read_raft(place.folder / "data"):
        of_task = [score for score in unbroken["scores"] if score["task"] == task.name]
        assert [score["method"] for score in of_task] == METHODS
        # Two fifths of the labelled rows.
        assert {score["examples"] for score in of_task} == {2 * len(task.train) // 5}
        assert [len(score.get("demonstrations", "")) for score in of_task] == [0, 0, 2, 0]
        # Submissions have the benchmark's form.
        header, *lines, end = (folder / task.name / "predictions.csv").read_text().split("\n")
        assert (header, end) == ("ID,Label", "")
        numbers, labels = zip(*(line.split(",", 1) for line in lines), strict=True)
        assert list(numbers) == [row["ID"] for row in task.test]
        assert {*labels} <= {*task.labels}
    for method in METHODS:
        of_method = [s["macro_f1"] for s in unbroken["scores"] if s["method"] == method]
        assert unbroken["mean"][method] == pytest.approx(sum(of_method) / 2)
    assert (unbroken["banking77"]["matched"], unbroken["banking77"]["rows"]) == (1, 4)


FILES = {"results.jsonl", "table.md", "raft.png", "submission"}


@pytest.mark.slow
def test_table_and_figure(place, unbroken):
    out = place.folder / "unbroken"
    table = (out / "table.md").read_text()
    _, macro_f1, _ = table.split("## ", 2)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in macro_f1.splitlines()[2:]]
    header, _, *body = filter(None, rows)
    assert [row[0] for row in body] == ["ade_corpus_v2", "banking_77", "mean"]
    for score in unbroken["scores"]:
        (row,) = (row for row in body if row[0] == score["task"])
        # The numbers of demonstrations follow in-context learning's.
        shown, *more = row[header.index(score["method"])].split()
        assert shown == f"{100 * score['macro_f1']:.1f}"
        assert bool(more) == (score["method"] == "icl")
    assert "1 of 4 labels known" in table
    assert (out / "raft.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == FILES


def killed(place, when):
    """Kill a run into `broken` as soon as this is so."""
    command = [str(part) for part in (IA3, *RAFT, "--out", "broken", *SETTINGS)]
    given = {"cwd": place.folder, "env": place.environment, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **given)
    until = time.monotonic() + 240
    while not when():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_killed_run_goes_on(place, unbroken):
    once, out = (place.folder / name for name in ("unbroken", "broken"))

    def added(part):
        path = out / "results.jsonl"
        return path.exists() and part in path.read_text()

    def training_the_second_fold():
        found = out.glob("checkpoints/ade_corpus_v2-1/checkpoint-*")
        return any(found) or added('"method": "tfew", "split": 1')

    killed(place, training_the_second_fold)
    assert len(records(out)) < len(records(once))
    with open(out / "results.jsonl", "a") as file:
        file.write('{"task": "ade_cor')
    killed(place, lambda: added('"split": "test", "part": 0'))
    done = place.run(*RAFT, "--out", "broken", *SETTINGS)
    assert (done.returncode, "tfew" in done.stdout) == (0, True), done.stderr
    for name in ("results.jsonl", "table.md"):
        lines = [sorted((folder / name).read_text().splitlines()) for folder in (once, out)]
        assert lines[0] == lines[1]
    for task in ("ade_corpus_v2", "banking_77"):
        path = Path("submission", task, "predictions.csv")
        assert (out / path).read_bytes() == (once / path).read_bytes()
    assert {path.name for path in out.iterdir()} == FILES


@pytest.mark.slow
def test_a_full_disk_leaves_whole_lines(place):
    command = (*RAFT, "--out", "full", "--methods", "majority")
    done = place.run(*command, under=SMALL_FILES_ONLY)
    assert_refused(done, "full/results.jsonl: File too large")
    assert all(record["method"] == "majority" for record in records(place.folder / "full"))


@pytest.mark.slow
def test_refused_before_anything_is_computed(place):
    cases = {
        ("--task", "ade_corpus"): (1, "did you mean 'ade_corpus_v2'"),
        ("--data", "nowhere"): (1, "folder nowhere with the tasks of RAFT does not exist"),
        ("--data", "public"): (1, "public has no task of RAFT in it: expected folders named ade_"),
        ("--methods", "zero-shop,tfew"): (1, "did you mean 'zero-shot'"),
        ("--methods", ","): (1, "there are no methods"),
        ("--folds", "6"): (2, "--folds"),
        ("--task", "ade_corpus_v2", "--banking77", "public"): (2, "this run does not make"),
        ("--methods", "zero-shot", "--banking77", "public"): (2, "this run does not make"),
        ("--banking77", "data"): (1, "they are Banking77's"),
        ("--out", "data/ade_corpus_v2/task.json"): (1, "task.json: Not a directory"),
    }
    # The name of no model: it would not get that far.
    raft = ("raft", "--data", "data", "--out", "refused", "--model", "none")
    runs = place.run_all(*((*raft, *more) for more in cases), COLUMNS="200")
    for done, (code, message) in zip(runs, cases.values(), strict=True):
        assert (done.returncode, done.stdout) == (code, "")
        assert "Traceback" not in done.stderr
        assert message in " ".join(done.stderr.replace("│", " ").split())
    blocked = "import sys; sys.modules['matplotlib'] = None; from ia3.cli import main; main()"
    assert_refused(place.run(*raft, under=[sys.executable, "-c", blocked]), "'ia3[report]'")
    assert not (place.folder / "refused").exists()
