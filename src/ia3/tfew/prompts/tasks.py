"""Tasks: labelled examples, few-shot samples of them, and the templates to ask with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...arguments import instance, listed, whole
from ...errors import IA3Error, UnknownNameError, did_you_mean, naming
from .encoding import EncodedExample, Encoder, TrainingExample
from .promptsource import PromptTemplate, described, read_promptsource

_Row = TypeVar("_Row")

# The T-Few authors' five samples of each data set, in the order they ran them.
SEEDS = (42, 1024, 0, 1, 32)

# The tasks held out of T0's training, on which the paper compares methods (section 4.1).
HELD_OUT_TASKS = (
    *("copa", "h-swag", "storycloze", "anli-r1", "anli-r2", "anli-r3"),
    *("cb", "rte", "wsc", "winogrande", "wic"),
)
RAFT_TASKS = (
    *("ade_corpus_v2", "banking_77", "neurips_impact_statement_risks", "one_stop_english"),
    *("overruling", "semiconductor_org_types", "systematic_review_inclusion"),
    *("tai_safety_research", "terms_of_service", "tweet_eval_hate", "twitter_complaints"),
)


ROWS = "a list of mappings from field names to values"


@dataclass(frozen=True)
class Task:
    """A data set and the ways to ask for its labels.

    An example's label is what a template's target renders.

    Attributes:
        name: for results and messages.
        templates: all that are trained on and evaluated with. Of a promptsource file, the paper
            takes those whose `original_task` is true.
        train: field name -> value, for each example.
        test: in the same fields.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: there are no templates.
    """

    name: str
    templates: Sequence[PromptTemplate]
    train: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        instance("the task's name", self.name, str, "a text")
        for template in listed("templates", self.templates, "a list of templates"):
            instance("a template", template, PromptTemplate, "a PromptTemplate")
        for name in ("train", "test"):
            for row in listed(name, getattr(self, name), ROWS):
                instance(f"a row of {name}", row, Mapping, ROWS)
        if not self.templates:
            raise IA3Error(f"task {self.name!r} has no templates")

    def training_examples(self, encoder: Encoder) -> list[TrainingExample]:
        """The training set, each example with all templates that ask something of it.

        The right choice is put first everywhere, so that the examples' `label` is 0.

        Raises:
            InvalidTypeError: an argument is of another type.
            IA3Error: an example has no answer, no template asks anything of it, or see
                `PromptTemplate.render` and `Encoder.encode`.
        """
        instance("encoder", encoder, Encoder, "an Encoder")
        examples = []
        with naming(f"task {self.name!r}"):
            for number, row in enumerate(self.train):
                labelled = [encode_labelled(encoder, template, row) for template in self.templates]
                encoded = tuple(_right_choice_first(*each) for each in labelled if each is not None)
                if not encoded:
                    which = f"training example {number}: {dict(row)!r}"
                    raise IA3Error(f"no template asks anything of {which}")
                examples.append(TrainingExample(encoded, 0))
        return examples


def encode_labelled(
    encoder: Encoder, template: PromptTemplate, row: Mapping[str, Any]
) -> tuple[EncodedExample, int] | None:
    """An example's token ids and right choice's index, `None` if the template does not ask it."""
    rendered = template.render(row)
    if rendered is None:
        return None
    named = f"template {template.name!r}"
    if rendered.answer is None:
        problem = f"{named} renders no target for {described(row)}"
        raise IA3Error(f"{problem}: expected a labelled example")
    try:
        return encoder.encode(row, template.prompt, rendered.choices), rendered.answer
    except IA3Error as error:
        problem = str(error) if str(error).startswith(named) else f"{named}: {error}"
        raise IA3Error(f"{problem}, for {described(row)}") from error


def _right_choice_first(encoded: EncodedExample, answer: int) -> EncodedExample:
    choices = encoded.choices
    reordered = (choices[answer], *choices[:answer], *choices[answer + 1 :])
    return EncodedExample(encoded.prompt, reordered)


def load_templates(task: str) -> list[PromptTemplate]:
    """This project's own templates of one of `HELD_OUT_TASKS` or `RAFT_TASKS`.

    The fields are named as the task's data has them.

    Raises:
        InvalidTypeError: an argument is of another type.
        UnknownNameError: there is no such task.
    """
    known = (*HELD_OUT_TASKS, *RAFT_TASKS)
    if instance("task", task, str, "a task's name") not in known:
        expected = f"expected one of {', '.join(known)}{did_you_mean(task, known)}"
        raise UnknownNameError(f"no templates for a task {task!r}: {expected}")
    # ANLI is one task in three rounds of data, and so has one file of templates.
    name = "anli" if task.startswith("anli-") else task
    return read_promptsource(Path(__file__).parent / "template_files" / f"{name}.yaml")


def few_shot(rows: Sequence[_Row], k: int, seed: int) -> list[_Row]:
    """A sample of `k` rows, whatever their labels: with `SEEDS`, the T-Few authors' own.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: there are fewer rows, or the seed is not one.
    """
    rows = listed("rows", rows, "a list of rows")
    if not 1 <= whole("k", k) <= len(rows):
        raise IA3Error(f"a sample of {k} rows of {len(rows)}, expected 1 to {len(rows)}")
    whole("seed", seed, 0, 2**32 - 1, "0 to 2**32 - 1")
    order = np.random.RandomState(seed).permutation(len(rows))
    return [rows[i] for i in order[:k]]
