"""promptsource's files, read and rendered as promptsource does, with errors where it has none."""

import tempfile
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings, strategies as st
from support.paths import DATA, needs_data
from support.tfew import tiny_llama, word_tokenizer

from ia3.base.loading import BaseModel
from ia3.errors import BrokenFileError, IA3Error
from ia3.files.tables import Row, read_table
from ia3.tfew import evaluate
from ia3.tfew.prompts.encoding import Encoder
from ia3.tfew.prompts.promptsource import PromptTemplate, read_promptsource
from ia3.tfew.prompts.tasks import Task
from ia3.tfew.prompts.templates import Template

# promptsource's files, and the T-Few authors' samples with the fields they name.
FILES = {
    **{f"anli-r{i}": "anli" for i in (1, 2, 3)},
    **{name: f"super_glue/{name}" for name in ("boolq", "cb", "copa", "rte", "wic")},
    "h-swag": "hellaswag",
    "sst2": "glue/sst2",
    "storycloze": "story_cloze/2016",
    "winogrande": "winogrande/winogrande_xl",
    "wsc": "super_glue/wsc.fixed",
}

FILE = """
dataset: letters
templates:
  0: !Template
    id: 0
    name: whose
    jinja: "{{ text }}\\nWhose is it? ||| {{ answer_choices[label] }}"
    answer_choices: mine ||| yours
    reference: ''
    metadata: !TemplateMetadata {languages: [en], metrics: [Accuracy], original_task: true}
  1: !Template
    id: 1
    name: free
    jinja: "{{ text }} goes on: ||| {{ rest }}"
    answer_choices: null
    reference: ''
    metadata: !TemplateMetadata {metrics: [BLEU, ROUGE], original_task: false}
"""


def written(folder, text):
    path = folder / "templates.yaml"
    path.write_text(text, "utf-8")
    return path


def of(jinja, choices="no ||| yes"):
    return PromptTemplate("asked", Template(jinja, "asked"), choices and Template(choices, "asked"))


plain_jinja = cache(jinja2.Environment().from_string)


def as_promptsource_renders(template, row):
    """Its two steps in plain Jinja: the choices, and the parts; three bars in fields are hidden."""
    hidden = {k: v.replace("|||", "<bars>") if isinstance(v, str) else v for k, v in row.items()}

    def parts(source, **more):
        rendered = plain_jinja(source).render(**hidden, **more)
        return [part.strip().replace("<bars>", "|||") for part in rendered.split("|||")]

    choices = parts(template.choices.source)
    return choices, parts(template.prompt.source, answer_choices=choices)


# -- against promptsource --------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("task", FILES)
def test_its_files_render_as_it_renders_them(task):
    templates = [t for t in read_promptsource(DATA / "promptsource" / FILES[task]) if t.choices]
    nothing = 0
    rows = [row for path in (DATA / "tfew" / task).glob("*.jsonl") for row in read_table(path)]
    for template in templates:
        # Its draws differ from call to call, and so between prompt and target.
        draws = "choice %}" in template.prompt.source or "choice}}" in template.prompt.source
        for row in rows:
            rendered = template.render(row)
            if draws:
                assert rendered.answer is not None
                continue
            choices, parts = as_promptsource_renders(template, row)
            if rendered is None:
                nothing += 1
                assert parts == [""]
                continue
            assert list(rendered.choices) == choices
            assert [rendered.prompt, choices[rendered.answer]] == parts
            assert template.prompt.render(row, choices) == parts[0]
            if template.original_task:
                assert rendered.answer == row["label"]
    # Only COPA's have some that ask about causes alone, or effects alone.
    assert (nothing > 0) == (task == "copa")


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
# A bar at the end of a choice runs into the three that separate choices.
barless = words.filter(lambda text: "|" not in text)


@given(text=words, bars=st.booleans(), choices=st.lists(barless, min_size=2, max_size=5))
def test_any_text_renders_as_in_promptsource(text, bars, choices):
    row = {"text": f"{text}|||{text}" if bars else text, "words": choices, "label": 0}
    jinja = "About {{ text }}: ||| {{ answer_choices[label] }}"
    template = of(jinja, "{{ words | join('|||') }} ||| z")
    expected, parts = as_promptsource_renders(template, {**row, "words": choices})
    assume(all(expected) and len(set(expected)) == len(choices) + 1)
    rendered = template.render(row)
    assert [rendered.prompt, rendered.choices[rendered.answer]] == parts


# -- files -----------------------------------------------------------------------------------------


def test_a_file_gives_its_templates_by_name(tmp_path):
    free, whose = read_promptsource(written(tmp_path, FILE))
    assert (whose.name, free.name) == ("whose", "free")
    assert whose.original_task
    assert not free.original_task
    assert whose.choices_of({}) == ("mine", "yours")
    assert free.choices is None
    assert read_promptsource(tmp_path)[1].name == "whose"
    rendered = whose.render({"text": "A letter.", "label": 1})
    assert rendered.prompt == "A letter.\nWhose is it?"
    assert rendered.choices[rendered.answer] == "yours"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {path}']", "!Other {{}}"])
def test_nothing_but_the_two_tags_is_built(tmp_path, tag):
    text = FILE.replace("mine ||| yours", tag.format(path=tmp_path / "made"))
    with pytest.raises(IA3Error, match="is not YAML"):
        read_promptsource(written(tmp_path, text))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("templates:", "prompts:", "has no templates"),
        ("name: whose", "name: 3", "name of template 0 is 3, expected a text"),
        ("name: whose", "name: free", "two templates of the name 'free'"),
        ("mine ||| yours", "7", r"answer_choices of template 'whose' is 7.*quotes"),
        ("{{ text }}\\nWhose", "{{ text", "template 'whose'.*line"),
        ("it? |||", "it?", r"template 'whose' has no '\|\|\|'"),
        ("  0: !Template", "  0: [1]\n  2: !Template", "template 0 is list, expected a mapping"),
    ],
)
def test_a_broken_file_is_explained(tmp_path, old, new, message):
    with pytest.raises(IA3Error, match=message) as caught:
        read_promptsource(written(tmp_path, FILE.replace(old, new, 1)))
    assert "templates.yaml" in str(caught.value)


# -- rendering -------------------------------------------------------------------------------------


def test_a_condition_around_all_of_it_leaves_examples_out():
    template = of("{% if ask %} {{ q }} ||| {{ answer_choices[1] }} {% endif %}")
    assert template.render({"ask": False, "q": "Is it?"}) is None
    assert template.render({"ask": False, "q": "Is it?"}, labelled=False) is None
    assert template.render({"ask": True, "q": "Is it?"}).prompt == "Is it?"
    assert template.render({"ask": True, "q": "Is it?"}, labelled=False).prompt == "Is it?"


def test_an_unknown_label_has_no_answer_and_an_unlabelled_example_needs_none():
    template = of("{{ q }} ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}")
    assert template.render({"q": "Is it?", "label": -1}).answer is None
    template = of("{{ q }} ||| {{ answer_choices[label] }}")
    rendered = template.render({"q": "Is it?"}, labelled=False)
    assert (rendered.prompt, rendered.choices, rendered.answer) == ("Is it?", ("no", "yes"), None)
    with pytest.raises(IA3Error, match=r"fields \['q'\], not 'label'"):
        template.render({"q": "Is it?"})


@pytest.mark.parametrize(
    ("target", "field", "known"),
    [
        ("{{ answer_choices[label] }}", -1, 1),
        ("{{ answer_choices[label] }}", None, 1),
        ("{{ answer_choices[label] }}", np.int64(-1), np.int64(1)),
        ("{{ answer_choices[label | int] }}", "-1", "1"),
        ("{{ answer_choices[label | int] }}", "", "1"),
        ("{{ answer_choices[label | int] }}", None, "1"),
        ("{{ answer_choices[label | int - 1] }}", " ", "2"),
        ("{{ answer_choices[label - 1] }}", 0, 2),
        ('{{ ["no", "yes"][label] }}', -1, 1),
        ('{{ ("no", "yes")[label] }}', -100, 1),
        ("{{ answer_choices[{'a': 0, 'b': 1}.get(label)] }}", "", "b"),
        ("{{ 'AB'[label] and answer_choices[label] }}", -1, 1),
    ],
)
def test_an_unknown_label_is_never_the_last_choice_nor_the_first(target, field, known):
    template = of("{{ q }} ||| " + target)
    rendered = template.render({"q": "Is it?", "label": field})
    assert (rendered.prompt, rendered.choices, rendered.answer) == ("Is it?", ("no", "yes"), None)
    assert template.render({"q": "Is it?", "label": known}).answer == 1
    row = {"q": "Is it?", "label": field}
    task = Task("letters", [template], [{"q": "Is it?", "label": known}, row], [row])
    base = BaseModel(tiny_llama(), word_tokenizer(["Is", "it", "no", "yes"]), "tiny")
    with pytest.raises(IA3Error, match=r"'asked' renders no target for .*'Is it\?'.* labelled"):
        task.training_examples(Encoder(base, chat=False))
    with pytest.raises(IA3Error, match=r"'asked' renders no target"):
        evaluate(base, task)


def test_a_prompt_that_depends_on_an_unknown_label_is_an_error():
    template = of("{{ q }} {{ answer_choices[label] }}? ||| {{ answer_choices[label] }}")
    with pytest.raises(IA3Error, match=r"'asked': the item -1 .* unknown label.*'Is it\?'"):
        template.render({"q": "Is it?", "label": -1})


def test_a_minus_that_the_template_writes_counts_from_the_end():
    template = of("{{ words[-1] }} {{ words[-back] }} {{ -5 }} ||| {{ answer_choices[-2] }}")
    rendered = template.render({"words": ["a", "b", "c"], "back": 2})
    assert (rendered.prompt, rendered.answer) == ("c b -5", 0)
    assert Template("{{ age | int }}").render({"age": ""}, []) == "0"


DRAWS = "{% set i = range(40) | choice %}{{ text }} {{ i }}? ||| {{ answer_choices[i] }}"


def test_a_draw_is_the_same_in_prompt_and_target():
    template = of(DRAWS, " ||| ".join(f"n{i}" for i in range(40)))
    drawn = set()
    for number in range(30):
        example = {"text": f"{number} words " * 50}
        rendered = template.render(example)
        assert rendered.prompt.endswith(f" {rendered.answer}?")
        # A prompt that is too long for the model is rendered again, with its text cut.
        again = template.prompt.render({"text": example["text"][:80]}, rendered.choices)
        assert again.endswith(f" {rendered.answer}?")
        drawn.add(rendered.answer)
    assert len(drawn) > 10


def test_what_promptsource_adds_to_jinja():
    source = "{% for a, b in zip(xs, ys) %}{{ a }}{{ b }} {% endfor %}{{ xs | most_frequent }}"
    assert Template(source).render({"xs": [3, 1, 3, 1, 2], "ys": "abc"}, []) == "3a 1b 3c [3, 1]"


def test_three_bars_end_the_prompt():
    template = Template("{{ q }} {{ bars }} ||| {{ nowhere }}")
    assert template.render({"q": " Is it?", "bars": "a|||b"}, []) == "Is it? a|||b"
    assert Template("no ||| yes").parts({}, []) == ["no", "yes"]


# -- errors ----------------------------------------------------------------------------------------

EXAMPLE = Row({"q": "Is it?", "x": "same", "label": 1}, "data.csv, line 7")


@pytest.mark.parametrize(
    ("jinja", "choices", "message"),
    [
        ("{{ question }} ||| {{ answer_choices[label] }}", "no ||| yes", "'question' is undefined"),
        ("{{ q }} ||| {{ answer_choices[label] }}", "no ||| {{ y }}", "'y' is undefined"),
        ("{{ q }} ||| {{ answer_choices[label] }}", None, "has no answer choices"),
        ("{{ q }} ||| no", "{% if not q %}no ||| yes{% endif %}", "renders no answer choices"),
        ("{{ q }} ||| no", "no ||| ", r"empty choice \(number 2\)"),
        ("{{ q }} ||| same", "{{ x }} ||| same", "renders the choice 'same' twice"),
        ("{{ q }} ||| maybe", "no ||| yes", r"target 'maybe', which is not among .*'no', 'yes'"),
        ("{{ q }} ||| no ||| yes", "no ||| yes", "renders 3 parts"),
        ("{{ q }} ||| no", "no ||| {{ q.__class__.__base__ }}", "refused|undefined|unsafe"),
    ],
)
def test_errors_name_the_template_and_the_example(jinja, choices, message):
    with pytest.raises(IA3Error, match=message) as caught:
        of(jinja, choices).render(EXAMPLE)
    assert "'asked'" in str(caught.value)
    assert "data.csv, line 7" in str(caught.value)
    assert "'Is it?'" in str(caught.value)


def test_a_long_example_is_cut_in_the_message():
    with pytest.raises(IA3Error, match="Is it") as caught:
        of("{{ q }} ||| maybe").render({"q": "Is it? " * 10_000})
    assert len(str(caught.value)) < 1000


# -- files -----------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a{|}% ", max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=4,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "name": ANYTHING | st.just("a"),
        "jinja": ANYTHING | st.just("{{ a }} ||| b"),
        "answer_choices": ANYTHING | st.just("a ||| b"),
        "metadata": ANYTHING | st.fixed_dictionaries({"original_task": ANYTHING}),
    },
)


@given(st.dictionaries(st.integers() | st.text("ab"), ENTRY | ANYTHING, max_size=3) | ANYTHING)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_any_fields_are_templates_or_an_error_that_names_the_file(entries):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "templates.yaml"
        path.write_text(yaml.safe_dump({"templates": entries}))
        try:
            templates = read_promptsource(path)
        except IA3Error as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            assert len(str(error)) < 1000  # noqa: PT017
            return
        assert all(template.name for template in templates)


@pytest.mark.parametrize("field", ["name", "jinja", "answer_choices", "metadata"])
def test_long_and_wrong_fields_are_cut_in_messages(tmp_path, field):
    entry = {"name": "a", "jinja": "{{ a }} ||| b", field: [["x"] * 2000]}
    (tmp_path / "templates.yaml").write_text(yaml.safe_dump({"templates": {"k" * 9000: entry}}))
    with pytest.raises(BrokenFileError, match=f"{field}.* is ") as caught:
        read_promptsource(tmp_path)
    assert len(str(caught.value)) < 1000


def test_ten_thousand_choices():
    template = of("{{ q }} ||| c1", " ||| ".join(f"c{number}" for number in range(10_000)))
    assert template.render({"q": "Is it?"}).answer == 1
