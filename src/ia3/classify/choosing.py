"""The engine behind `model="auto"`: it trains on the encoder or on the language model.

Both are asked before any training. The encoder answers by a logistic regression on its frozen
embeddings, each text by one that was fitted without it; the language model by its untuned ranking.
Unless the encoder is ahead then, it answers again, by trainings on folds.
With one text a class nothing can be held out: both answer by the labels' names then, of which
neither has seen an example, so that a measured side is not weighed against an unmeasured one.
No answer depends on how fast the machine is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base.processes import processes
from ..sentences.targets import share_right
from ..tfew.prompts.templates import Template
from .encoder import EncoderEngine, EncoderTask
from .engine import ENCODER, LANGUAGE_MODEL, Candidate, Fit, Seen, seen_of
from .language_model import LanguageModelEngine, RankingTask
from .ranking import advise_on_words
from .task_file import EngineName
from .text_classifier import LabelledTexts

# The language model is asked as many texts as have so many tokens together.
ASKED_TOKENS = 16_384
# By what share of the texts the encoder has to be ahead: more than on samples of sentiment, which
# is the language model's, and less than on those of question types (docs/benchmarks.md).
AHEAD = 0.2
# Or what part of the language model's errors it may have: training seldom leaves that one fewer.
FEW_ERRORS = 0.25
# Of fewer, unless there are no more, the answers say nothing.
FEWEST_ASKED = 16


@dataclass(frozen=True)
class AutoTask:
    """The same task, prepared for both engines."""

    encoder: EncoderTask
    language_model: RankingTask

    @property
    def data(self) -> LabelledTexts:
        """The labelled texts."""
        return self.encoder.data

    @property
    def templates(self) -> list[Template]:
        """What reads the texts; the fields' names are the same for both engines."""
        return self.encoder.templates

    def described(self) -> dict[str, Any]:
        """What the choice and the vectors depend on, as values of JSON."""
        return {ENCODER: self.encoder.described(), LANGUAGE_MODEL: self.language_model.described()}


class AutoEngine:
    """Chooses between two engines inside the training set, and trains with the better one."""

    def __init__(self, encoder: EncoderEngine, language_model: LanguageModelEngine) -> None:
        self.encoder = encoder
        self.language_model = language_model

    def train(
        self,
        task: AutoTask,
        on_step: Callable[[Any], None] | None = None,
        checkpoints: str | Path | None = None,
    ) -> Fit:
        """Choose, then train; the fit says what was seen."""
        seen = self.seen(task)
        candidates = [each.candidate for each in seen]
        if promises_more(candidates) == ENCODER:
            return self.encoder.train(task.encoder, on_step, checkpoints, seen)
        # Not before: an encoder reads nothing into labels.
        advise_on_words(task.language_model.data.classes)
        fit = self.language_model.train(task.language_model, on_step, checkpoints)
        return replace(fit, candidates=candidates, held_out=seen)

    def seen(self, task: AutoTask) -> list[Seen]:
        """What both answer, and then the trained encoder, unless the frozen one is ahead already.

        The encoder alone is asked where the texts are too long to ask about many.
        """
        targets, asks = task.data.targets, self.language_model
        asked = asks.to_ask(task.language_model, ASKED_TOKENS)
        seen = self.encoder.seen(task.encoder)
        if len(asked) < min(FEWEST_ASKED, len(targets)):
            return seen
        answers = asks.untuned_answers(task.language_model, asked)
        how = "untuned, calibrated" if asks.settings.steps else "untuned"
        right = share_right(answers, [targets[text] for text in asked])
        probabilities, name = answers.softmax(-1), asks.base.name
        said = seen_of(LANGUAGE_MODEL, name, task.data, asked, right, how, probabilities)
        both = processes().from_first(lambda: [*seen, said])
        is_ahead = promises_more([each.candidate for each in both]) == ENCODER
        can_be_held_out = seen[0].probabilities is not None
        if is_ahead or not can_be_held_out or asks.settings.steps == 0:
            return both
        return [*both, self.encoder.seen_trained(task.encoder, seen)]


def promises_more(seen: Sequence[Candidate]) -> EngineName:
    """The engine to train: the encoder where its last answers are ahead by more than `AHEAD`.

    They come of labels, of which the untuned language model has seen none: of two that are right
    about as often, the language model has more to gain. But training seldom leaves it fewer than
    `FEW_ERRORS` of its errors: the encoder is taken too where it has no more, or none.
    """
    of = {each.engine: each.accuracy for each in seen}
    if LANGUAGE_MODEL not in of:
        return ENCODER
    encoder, untuned = of[ENCODER], of[LANGUAGE_MODEL]
    is_ahead = encoder - untuned > AHEAD or 1 - encoder <= FEW_ERRORS * (1 - untuned)
    return ENCODER if is_ahead else LANGUAGE_MODEL
