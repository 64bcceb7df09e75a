"""The engine behind `model="auto"`: it trains on the encoder or on the language model.

Both are asked before any training. The encoder answers by a logistic regression on its frozen
embeddings, each text by one that was fitted without it; the language model by its untuned ranking.
With one text a class nothing can be held out: both answer by the labels' names then, of which
neither has seen an example, so that a measured side is not weighed against an unmeasured one.
No answer depends on how fast the machine is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .encoder import EncoderEngine, EncoderTask
from .engine import ENCODER, LANGUAGE_MODEL, Candidate, Fit, candidate
from .language_model import LanguageModelEngine, RankingTask
from .task_file import EngineName

# The language model is asked as many texts as have so many tokens together.
ASKED_TOKENS = 16_384
# Of fewer, unless there are no more, the answers say nothing.
FEWEST_ASKED = 16


@dataclass(frozen=True)
class AutoTask:
    """The same task, prepared for both engines."""

    encoder: EncoderTask
    language_model: RankingTask

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
        if promises_more(seen) == ENCODER:
            return self.encoder.train(task.encoder, on_step, checkpoints, seen)
        fit = self.language_model.train(task.language_model, on_step, checkpoints)
        return replace(fit, candidates=seen)

    def seen(self, task: AutoTask) -> list[Candidate]:
        """Both candidates; the encoder alone where the texts are too long to ask about many."""
        targets, asks = task.encoder.data.targets, self.language_model
        asked = asks.to_ask(task.language_model, ASKED_TOKENS)
        seen = self.encoder.seen(task.encoder)
        if len(asked) < min(FEWEST_ASKED, len(targets)):
            return seen
        answers = asks.untuned_answers(task.language_model, asked)
        how = "untuned, calibrated" if asks.settings.steps else "untuned"
        of_asked = [targets[text] for text in asked]
        return [*seen, candidate(LANGUAGE_MODEL, asks.base.name, answers, of_asked, how)]


def promises_more(seen: Sequence[Candidate]) -> EngineName:
    """The engine to train: the language model only where its untuned answers are the better ones.

    What costs more has to promise more.
    """
    of = {each.engine: each.accuracy for each in seen}
    return LANGUAGE_MODEL if of.get(LANGUAGE_MODEL, 0.0) > of[ENCODER] else ENCODER
