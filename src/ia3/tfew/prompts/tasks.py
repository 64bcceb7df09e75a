"""Tasks: labelled examples, few-shot samples of them, and the templates to ask with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...errors import IA3Error, did_you_mean, naming
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
    """

    name: str
    templates: Sequence[PromptTemplate]
    train: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if not self.templates:
            raise IA3Error(f"task {self.name!r} has no templates")

    def training_examples(self, encoder: Encoder) -> list[TrainingExample]:
        """The training set, each example with all templates that ask something of it.

        The right choice is put first everywhere, so that the examples' `label` is 0.

        Raises:
            IA3Error: an example has no answer, no template asks anything of it, or see
                `PromptTemplate.render` and `Encoder.encode`.
        """
        examples = []
        with naming(f"task {self.name!r}"):
            for number, row in enumerate(self.train):
                labelled = [encode_labelled(encoder, template, row) for template in self.templates]
                encoded = tuple(_right_choice_first(*each) for each in labelled if each is not None)
                if not encoded:
                    raise IA3Error(
                        f"no template asks anything of training example {number}: {dict(row)!r}"
                    )
                examples.append(TrainingExample(encoded, 0))
        return examples


def encode_labelled(
    encoder: Encoder, template: PromptTemplate, row: Mapping[str, Any]
) -> tuple[EncodedExample, int] | None:
    """An example's token ids and the index of its right choice.

    Returns:
        `None` where the template asks nothing of this example.

    Raises:
        IA3Error: the example has no answer, or see `PromptTemplate.render` and `Encoder.encode`;
            the message names the template and the example.
    """
    rendered = template.render(row)
    if rendered is None:
        return None
    named = f"template {template.name!r}"
    if rendered.answer is None:
        raise IA3Error(
            f"{named} renders no target for {described(row)}: expected a labelled example"
        )
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
        IA3Error: there is no such task.
    """
    known = (*HELD_OUT_TASKS, *RAFT_TASKS)
    if task not in known:
        raise IA3Error(
            f"no templates for a task {task!r}: expected one of {', '.join(known)}"
            f"{did_you_mean(task, known)}"
        )
    # ANLI is one task in three rounds of data, and so has one file of templates.
    name = "anli" if task.startswith("anli-") else task
    return read_promptsource(Path(__file__).parent / "template_files" / f"{name}.yaml")


def few_shot(rows: Sequence[_Row], k: int, seed: int) -> list[_Row]:
    """A sample of `k` rows, whatever their labels: with `SEEDS`, the T-Few authors' own.

    Raises:
        IA3Error: there are fewer rows, or the seed is not one.
    """
    if not 1 <= k <= len(rows):
        raise IA3Error(f"a sample of {k} rows of {len(rows)}, expected 1 to {len(rows)}")
    if not 0 <= seed < 2**32:
        raise IA3Error(f"seed is {seed}, expected 0 to 2**32 - 1")
    order = np.random.RandomState(seed).permutation(len(rows))
    return [rows[i] for i in order[:k]]
