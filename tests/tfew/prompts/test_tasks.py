"""Tasks: samples, sources of examples, own templates, training and evaluation over templates."""

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import DATA, needs_data
from support.tfew import plain_token_scores, tiny_llama, tiny_t5, word_tokenizer
from tokenizers import normalizers

import ia3
import ia3.tfew
from ia3.base.loading import BaseModel
from ia3.errors import IA3Error
from ia3.files.rows import read_rows
from ia3.files.tables import Row, read_table
from ia3.tfew import HELD_OUT_TASKS, RAFT_TASKS, SEEDS, Task, few_shot, load_templates
from ia3.tfew.prompts.encoding import Encoder
from ia3.tfew.prompts.promptsource import PromptTemplate
from ia3.tfew.prompts.tasks import encode_labelled
from ia3.tfew.prompts.templates import Template
from ia3.tfew.scoring.evaluation import evaluate, predict_choices, spread

WORDS = ["the", "cat", "dog", "bird", "is", "it", "so", "no", "yes", "sat", "ran", "flew", "sings"]
WORDS += ["barks", "purrs", "one", "two", "three"]


def template_of(name, jinja, choices):
    return PromptTemplate(name, Template(jinja, name), Template(choices, name))


FIXED = template_of("fixed", "the {{ animal }} ||| {{ answer_choices[label] }}", "no ||| yes")
TURNED = template_of(
    "turned", "is it the {{ animal }} ||| {{ answer_choices[1 - label] }}", "yes ||| no"
)
OWN = template_of(
    "own", "the {{ animal }} so ||| {{ answer_choices[label] }}", "{{ ends | join(' ||| ') }}"
)
ONLY_CATS = template_of(
    "cats", "{% if animal == 'cat' %}the cat ||| {{ answer_choices[label] }}{% endif %}", "no|||yes"
)
ROWS = [
    {"animal": "cat", "ends": ["barks", "purrs"], "label": 1},
    {"animal": "dog", "ends": ["barks", "sings two", "flew"], "label": 0},
    {"animal": "bird", "ends": ["ran", "sings", "purrs"], "label": 1},
    {"animal": "cat", "ends": ["flew one two three", "sat"], "label": 0},
    {"animal": "bird", "ends": ["barks", "flew"], "label": 1},
]


def base_of(kind="llama", seed=0):
    if kind == "t5":
        return BaseModel(tiny_t5(seed), word_tokenizer(WORDS, end=True), "t5")
    return BaseModel(tiny_llama(seed), word_tokenizer(WORDS), "llama")


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [ia3, ia3.tfew])
def test_every_public_name_is_there(package):
    assert set(package.__all__) <= set(dir(package))
    everything = {}
    exec(f"from {package.__name__} import *", everything)
    assert set(package.__all__) <= everything.keys()
    # What type checkers see.
    tree = ast.parse(Path(package.__file__).read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = [a.asname for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assigned = [t.id for n in block.body if isinstance(n, ast.Assign) for t in n.targets]
    assert sorted([*imported, *assigned]) == package.__all__
    with pytest.raises(AttributeError, match="nosuch"):
        package.nosuch  # noqa: B018


def test_reading_rows_does_without_the_trainer(tmp_path):
    (tmp_path / "a.csv").write_text("animal,label\ncat,1\n")
    code = (
        "import sys; from ia3.tfew import Task, few_shot, load_templates, read_rows; "
        "print(read_rows('a.csv'), 'transformers.trainer' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[{'animal': 'cat', 'label': '1'}] False\n", done.stderr


# -- samples ---------------------------------------------------------------------------------------

# The sizes of the training sets.
SIZES = {"anli-r1": 16946, "anli-r2": 45460, "anli-r3": 100459, "boolq": 9427, "cb": 250}
SIZES |= {"copa": 400, "h-swag": 39905, "rte": 2490, "storycloze": 1871, "wic": 5428}
SIZES |= {"winogrande": 40398, "wsc": 554}


@needs_data
@pytest.mark.parametrize("task", SIZES)
def test_samples_are_the_authors(task):
    for seed in SEEDS:
        sample = read_rows(DATA / "tfew" / task / f"{seed}_seed.jsonl")
        drawn = few_shot(range(SIZES[task]), len(sample), seed)
        assert drawn == [row["idx"] for row in sample]


def test_a_sample_leaves_the_random_state_alone():
    rows = [{"n": i} for i in range(50)]
    before = np.random.get_state()[1].copy()
    sample = few_shot(rows, 20, 7)
    assert (np.random.get_state()[1] == before).all()
    assert few_shot(rows, 20, 8) != sample
    assert sorted(row["n"] for row in few_shot(rows, 50, 7)) == list(range(50))


@pytest.mark.parametrize(("k", "seed"), [(0, 0), (6, 0), (3, -1), (3, 2**32)])
def test_impossible_samples(k, seed):
    with pytest.raises(IA3Error, match=r"expected (1 to 5|0 to 2\*\*32 - 1)"):
        few_shot(ROWS, k, seed)


# -- own templates ---------------------------------------------------------------------------------

NLI = {"premise": "Ann owns a red car.", "hypothesis": "Ann owns a car."}
STORY = {f"input_sentence_{i}": f"Part {i}." for i in range(1, 5)}
# Rows in the fields of the tasks' data, each with the index of its right choice.
HELD_OUT_ROWS = {
    "copa": [
        ({"premise": "It rained.", "choice1": "A", "choice2": "B", "question": q, "label": 1}, 1)
        for q in ("cause", "effect")
    ],
    "h-swag": [
        ({"activity_label": "Sport", "ctx": "He runs and", "endings": list("abcd"), "label": x}, 2)
        for x in (2, "2")
    ],
    "storycloze": [
        ({**STORY, "sentence_quiz1": "A", "sentence_quiz2": "B", "answer_right_ending": 2}, 1)
    ],
    **{f"anli-r{i}": [({**NLI, "label": x}, x) for x in range(3)] for i in (1, 2, 3)},
    "cb": [({**NLI, "label": x}, x) for x in range(3)],
    "rte": [({**NLI, "label": x}, x) for x in range(2)],
    "wsc": [({"text": "Al saw he fell.", "span1_text": "Al", "span2_text": "he", "label": 1}, 1)],
    "winogrande": [
        ({"sentence": "The _ is big.", "option1": "cat", "option2": "dog", "answer": "2"}, 1)
    ],
    "wic": [
        ({"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": x}, x)
        for x in range(2)
    ],
}


@pytest.mark.parametrize("task", HELD_OUT_TASKS)
def test_every_held_out_task_has_templates(task):
    templates = load_templates(task)
    assert len(templates) >= 3
    for row, answer in HELD_OUT_ROWS[task]:
        prompts = set()
        for template in templates:
            rendered = template.render(row)
            assert rendered.answer == answer
            prompts.add(rendered.prompt)
            # What every prompt must tell, or it asks nothing.
            told = rendered.prompt + "".join(rendered.choices)
            unread = {"label", "answer", "answer_right_ending", "activity_label", "question"}
            for name, value in row.items():
                if isinstance(value, str) and name not in unread and "_" not in value:
                    assert value in told, (template.name, name)
        assert len(prompts) == len(templates)


@needs_data
@pytest.mark.parametrize("task", HELD_OUT_TASKS)
def test_held_out_templates_ask_for_the_datas_labels(task):
    templates = load_templates(task)
    for path in (DATA / "tfew" / task).glob("*.jsonl"):
        for row in read_table(path):
            for template in templates:
                assert template.render(row).answer == row["label"]


@pytest.mark.parametrize("task", RAFT_TASKS)
def test_every_raft_task_has_a_template(task):
    (template,) = load_templates(task)
    assert len(template.choices_of({})) >= 2


@needs_data
@pytest.mark.parametrize("task", RAFT_TASKS)
def test_raft_templates_follow_the_benchmark(task):
    (template,) = load_templates(task)
    folder = DATA / "raft" / task
    labels = json.loads((folder / "task.json").read_text())["label_columns"]["Label"]
    fields = json.loads((DATA / "raft" / "prompt_settings.jsonl").read_text().split("\n")[0])[task]
    assert len(template.choices_of({})) == len(labels)
    for row in read_table(folder / "train.csv"):
        rendered = template.render(row)
        assert rendered.answer == labels.index(row["Label"])
        marked = {**row, **{name: f"<{name}>" for name in fields}}
        prompt = template.render(marked).prompt
        places = [prompt.index(f"<{name}>") for name in fields]
        assert places == sorted(places)
    assert all(template.prompt.reads(name) for name in fields)
    assert not any(template.prompt.reads(name) for name in row if name not in (*fields, "Label"))
    for row in read_table(folder / "test_unlabeled.csv")[:50]:
        assert template.render(row, labelled=False).answer is None


def test_an_unknown_task_is_an_error():
    with pytest.raises(IA3Error, match=r"'winogrand'.*did you mean 'winogrande'"):
        load_templates("winogrand")


# -- choices of an example's own -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_examples_own_choices_are_encoded_as_fixed_ones_are(kind):
    base = base_of(kind)
    own = Encoder(base, chat=False)
    with pytest.raises(IA3Error, match="'own' has no answer choices"):
        own.encode(ROWS[0], OWN.prompt)
    for row in ROWS:
        encoded, answer = encode_labelled(own, OWN, row)
        fixed = Encoder(base, row["ends"], chat=False).encode(row, OWN.prompt)
        assert encoded == fixed
        assert answer == row["label"]


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        # Words that this tokenizer does not know are one token, all the same.
        (["cat", "zebra", "gnu"], "choices 'zebra' and 'gnu' are the same tokens"),
        (["cat", "~~"], "choice '~~' has no token"),
    ],
)
def test_choices_without_tokens_of_their_own_are_named_with_template_and_example(choices, problem):
    base = base_of()
    # As T5's tokenizer drops control characters.
    base.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    row = Row({"animal": "dog", "ends": choices, "label": 0}, "a.jsonl, line 2")
    with pytest.raises(IA3Error) as raised:
        Task("t", [FIXED, OWN], [row]).training_examples(Encoder(base, chat=False))
    message = str(raised.value)
    assert problem in message
    assert "template 'own'" in message
    assert "the example of a.jsonl, line 2: {'animal': 'dog'" in message


# -- training --------------------------------------------------------------------------------------


def test_training_examples_hold_every_template_that_asks():
    encoder = Encoder(base_of(), chat=False)
    examples = Task("t", [FIXED, TURNED, OWN, ONLY_CATS], ROWS).training_examples(encoder)
    assert [len(e.encoded) for e in examples] == [4, 3, 3, 4, 3]
    for row, example in zip(ROWS, examples, strict=True):
        asked = [t for t in (FIXED, TURNED, OWN, ONLY_CATS) if t.render(row) is not None]
        for template, encoded in zip(asked, example.encoded, strict=True):
            expected, answer = encode_labelled(encoder, template, row)
            assert encoded.prompt == expected.prompt
            assert encoded.choices[example.label] == expected.choices[answer]
            assert sorted(encoded.choices) == sorted(expected.choices)


NO_TARGET = template_of("t", "the {{ animal }} ||| ", "no ||| yes")


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([ONLY_CATS], r"'t': no template asks anything of training example 1: .*'dog'"),
        ([NO_TARGET], r"task 't': template 't' renders no target for .*'cat'"),
        ([], "'t' has no templates"),
    ],
)
def test_unusable_training_sets(templates, message):
    with pytest.raises(IA3Error, match=message):
        Task("t", templates, ROWS).training_examples(Encoder(base_of(), chat=False))


# -- evaluation ------------------------------------------------------------------------------------


def best_choice(base, template, row):
    """The choice with the highest mean of its tokens' log-probabilities, and the right one."""
    encoded, answer = encode_labelled(Encoder(base, chat=False), template, row)
    means = [scores.mean() for scores in plain_token_scores(base, encoded)]
    return int(torch.stack(means).argmax()), answer


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_accuracy_is_that_of_one_choice_after_the_other(kind):
    base = base_of(kind, seed=1)
    task = Task("t", [FIXED, OWN, ONLY_CATS], (), ROWS)
    evaluation = evaluate(base, task)
    counts = {t.template: t.examples for t in evaluation.templates}
    assert counts == {"fixed": 5, "own": 5, "cats": 2}
    for template, score in zip(task.templates, evaluation.templates, strict=True):
        asked = [row for row in ROWS if template.render(row) is not None]
        right = [p == a for p, a in (best_choice(base, template, row) for row in asked)]
        assert score.score == sum(right) / len(right)


@pytest.mark.parametrize(
    ("templates", "rows", "message"),
    [
        ([FIXED], (), "'t' has no test examples"),
        ([ONLY_CATS], ROWS[1:3], "'cats' asks nothing of any test example"),
    ],
)
def test_what_cannot_be_evaluated(templates, rows, message):
    with pytest.raises(IA3Error, match=message):
        evaluate(base_of(), Task("t", templates, (), rows))


def test_scores_that_are_no_numbers_are_an_error():
    base = base_of()
    with torch.no_grad():
        base.model.get_output_embeddings().weight.fill_(torch.nan)
    encoded, _ = encode_labelled(Encoder(base, chat=False), FIXED, ROWS[0])
    with pytest.raises(IA3Error, match="not finite"):
        predict_choices(base, [encoded])


@pytest.mark.parametrize("count", [2, 3, 15])
def test_spread_is_the_median_and_the_quartiles(count):
    scores = np.random.default_rng(count).random(count).tolist()
    result = spread(scores)
    quartiles = statistics.quantiles(scores, n=4, method="inclusive")
    assert [result.lower, result.median, result.upper] == pytest.approx(quartiles)
    assert spread([0.5]).median == 0.5
