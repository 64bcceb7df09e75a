"""Manifests: which tasks they name, and what is said of those that are unusable."""

import json

import pytest

from ia3.errors import IA3Error
from ia3.tfew.prompts.manifest import read_manifest
from ia3.tfew.prompts.promptsource import Rendered
from ia3.tfew.prompts.tasks import load_templates

COPA = {"premise": "It rained.", "choice1": "A", "choice2": "B", "question": "cause", "label": 1}
TICKETS = "body,queue\nmy card,acct\nmy parcel,ship_out\nmy pin,acct\n"
PROMPTSOURCE = """
templates:
  a: !Template
    name: asks
    jinja: "{{ body }}? ||| {{ answer_choices[0] if queue == 'acct' else answer_choices[1] }}"
    answer_choices: account ||| delivery
    metadata: !TemplateMetadata {original_task: true}
  b: !Template
    name: other task
    jinja: "{{ queue }}? ||| {{ answer_choices[0] }}"
    answer_choices: yes ||| no
    metadata: !TemplateMetadata {original_task: false}
  c: !Template
    name: free text
    jinja: "{{ queue }}? ||| {{ body }}"
    metadata: !TemplateMetadata {original_task: true}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of data and templates for manifests."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "copa.jsonl").write_text(json.dumps(COPA) + "\n", "utf-8")
    (tmp_path / "tickets.csv").write_text(TICKETS, "utf-8")
    (tmp_path / "promptsource" / "tickets").mkdir(parents=True)
    (tmp_path / "promptsource" / "tickets" / "templates.yaml").write_text(PROMPTSOURCE, "utf-8")
    return tmp_path


def read(folder, text):
    (folder / "tasks.yaml").write_text(text, "utf-8")
    return read_manifest(folder / "tasks.yaml")


def inline(folder, rest="", template="'{{ body }}'"):
    """A task with its template in the manifest."""
    entry = f"data: tickets.csv\n    label: queue\n    template: {template}\n    {rest}\n"
    (task,) = read(folder, f"tasks:\n  tickets:\n    {entry}")
    return task


def rendered(task, row=0):
    result = task.templates[0].render(task.train[row])
    assert result is not None
    return result


# -- what is read ----------------------------------------------------------------------------------


def test_tasks_in_their_order_with_own_templates(folder, monkeypatch):
    text = (
        "tasks:\n  tickets: {data: tickets.csv, templates: promptsource/tickets}\n"
        "  copa: {data: data/copa.jsonl}\n"
        "  why: {data: data/copa.jsonl, templates: copa}\n"
    )
    # Files are relative to the manifest, wherever the process is.
    monkeypatch.chdir("/")
    tickets, copa, why = read(folder, text)
    assert [tickets.name, copa.name, why.name] == ["tickets", "copa", "why"]
    assert [t.name for t in copa.templates] == [t.name for t in load_templates("copa")]
    assert [t.name for t in why.templates] == [t.name for t in copa.templates]
    assert list(copa.train) == [COPA]
    # Neither a task made from the data set, nor one without answer choices.
    assert [t.name for t in tickets.templates] == ["asks"]
    assert rendered(tickets, 1) == Rendered("my parcel?", ("account", "delivery"), 1)


def test_inline_templates(folder):
    task = inline(folder, "", '["{{ body }}\\nCategory:", "of {{ body }} {# #}"]')
    first, second = task.templates
    # The labels made readable, where no choices are given.
    assert rendered(task) == Rendered("my card\nCategory:", ("acct", "ship out"), 0)
    assert second.render(task.train[1]) == Rendered("of my parcel", ("acct", "ship out"), 1)
    assert first.choices_of({}) == ("acct", "ship out")
    # A text without a label can be asked about.
    assert first.render({"body": "a"}, labelled=False) == Rendered(
        "a\nCategory:", ("acct", "ship out"), None
    )


def test_choices_and_their_order(folder):
    task = inline(
        folder,
        'choices: {ship_out: the post, acct: "a {{ bank\'s }} \\"teller\\"", none: é 🙂}',
        "'{{ body }} {{ answer_choices | length }}'",
    )
    words = ("the post", 'a {{ bank\'s }} "teller"', "é 🙂")
    assert rendered(task) == Rendered("my card 3", words, 1)
    assert rendered(task, 1).answer == 0


@pytest.mark.parametrize(
    ("rows", "rest", "answers"),
    [
        # YAML's own reading would make false, true and numbers of these.
        ("text,label\nx,no\ny,yes\n", "choices: {no: bad, yes: good}", [0, 1]),
        ("text,label\nx,01\ny,1\n", "choices: {01: bad, 1: good}", [0, 1]),
        (
            '{"text": "x", "label": false}\n{"text": "y", "label": true}',
            "choices: {true: good, false: bad}",
            [1, 0],
        ),
        ("text,label\nx,it's a\ny,{{ b }}", "choices: {it's a: good, '{{ b }}': bad}", [0, 1]),
        # Jinja has no name for this column.
        ("text,The 'Label'\nx,p\ny,q\n", "label: The 'Label'", [0, 1]),
    ],
)
def test_labels_are_compared_as_text(folder, rows, rest, answers):
    name = "a.jsonl" if rows.startswith("{") else "a.csv"
    (folder / name).write_text(rows, "utf-8")
    (task,) = read(folder, f"tasks: {{x: {{data: {name}, template: '{{{{ text }}}}', {rest}}}}}")
    assert [rendered(task, row).answer for row in (0, 1)] == answers


@pytest.mark.datasets
def test_splits_of_a_folder_of_datasets(folder):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def split(text):
        return datasets.Dataset.from_list([{"body": text, "queue": q} for q in ("acct", "ship")])

    datasets.DatasetDict({n: split(n) for n in ("train", "extra")}).save_to_disk(folder / "many")
    entry = "data: many, template: '{{ body }}', label: queue"
    tasks = read(folder, f"tasks:\n  a: {{{entry}}}\n  b: {{{entry}, split: extra}}\n")
    assert [task.train[0]["body"] for task in tasks] == ["train", "extra"]


# -- what is refused -------------------------------------------------------------------------------

INLINE = "label: queue, template: '{{ body }}'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, expected 'tasks:'"),
        ("tasks:", "tasks is empty, expected 'tasks:'"),
        ("task: {}", "unknown key 'task'.*did you mean 'tasks'"),
        ("tasks: {a: b}", "task 'a' is 'b', expected a mapping with the key 'data'"),
        ("tasks: {'': {}}", "a task's name is empty"),
        ("tasks: {a: {", "is not YAML"),
        ("tasks: {a: {data: a.csv}}", "task 'a': there are no templates of this name: expected"),
        ("tasks: {copa: {}}", "task 'copa': there is no 'data'"),
        ("tasks: {copa: {dta: a.csv}}", "task 'copa': unknown key 'dta'.*did you mean 'data'"),
        ("tasks: {copa: {data: [a.csv]}}", "task 'copa': data is a list, expected a text"),
        ("tasks: {copa: {data: a.csv, label: x}}", "'label' without 'template'"),
    ],
)
def test_unusable_manifests(folder, text, message):
    with pytest.raises(IA3Error, match=message) as caught:
        read(folder, text)
    assert str(folder / "tasks.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("templates: rt", "templates: no templates for a task 'rt'.*did you mean 'rte'"),
        (f"{INLINE}, templates: copa", "there are 'template' and 'templates'"),
        ("template: []", "template is a list, expected a text or"),
        ("label: queue, template: '{{ body }} ||| x'", "expected the prompt alone"),
        ("label: queue, template: '{{ body '", "template '{{ body '"),
        ("template: '{{ body }}'", "tickets.csv, line 2: no column 'label' among"),
        (f"{INLINE}, choices: [acct]", "choices is a list, expected a mapping"),
        (f"{INLINE}, choices: {{acct: [x]}}", "the words of 'acct' are a list"),
        (
            f"{INLINE}, choices: {{acct: one, shipout: two}}",
            "line 3: the label 'ship_out' is not among the choices.*did you mean 'shipout'",
        ),
        (f"{INLINE}, choices: {{acct: a, ship_out: ' a'}}", "'ship_out' have the same words 'a'"),
        (f"{INLINE}, choices: {{acct: one}}", r"\['acct'\], expected at least"),
        (f"{INLINE}, choices: {{acct: 'a ||| b', ship_out: c}}", r"hold '\|\|\|'"),
    ],
)
def test_unusable_entries(folder, entry, message):
    with pytest.raises(IA3Error, match=f"tasks.yaml: task 'a': .*{message}"):
        read(folder, f"tasks: {{a: {{data: tickets.csv, {entry}}}}}")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("tasks: {copa: {data: data/cpa.jsonl}}", "cpa.jsonl"),
        ("tasks: {copa: {data: data/copa.jsonl, templates: promptsource/rte}}", "promptsource/rte"),
        ("tasks: {copa: {data: data/copa.jsonl, templates: data}}", "data/templates.yaml"),
    ],
)
def test_missing_files(folder, text, missing):
    with pytest.raises(FileNotFoundError, match=missing) as caught:
        read(folder, text)
    assert f"{folder / 'tasks.yaml'}: task 'copa': " in str(caught.value)


def test_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.yaml does not exist"):
        read_manifest(tmp_path / "none.yaml")


def test_a_structure_of_many_references_is_refused_in_few_words(folder):
    """Each line refers to the one above ten times: written out, it has 10**12 entries."""
    lines = ["l0: &l0 [x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 13)]
    bomb = "\n".join(f"      {line}" for line in lines)
    text = f"tasks:\n  a:\n    template: x\n    data: tickets.csv\n    choices:\n{bomb}\n"
    with pytest.raises(IA3Error, match="its references repeat more than") as caught:
        read(folder, text)
    assert len(str(caught.value)) < 1000


def test_a_file_of_templates_that_fit_nothing(folder):
    path = folder / "promptsource" / "tickets" / "templates.yaml"
    path.write_text(PROMPTSOURCE.replace("original_task: true", "original_task: false"))
    with pytest.raises(IA3Error, match="task 'a': templates: none of the 3 in promptsource"):
        read(folder, "tasks: {a: {data: tickets.csv, templates: promptsource/tickets}}")
