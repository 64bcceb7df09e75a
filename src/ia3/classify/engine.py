"""What an engine is given, and what it makes of it: one adapter on one base model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ..adapter.files import Adapter, check_finite, read_adapter
from ..base.loading import LoadedModel
from ..base.processes import processes
from ..base.threads import Threads, most_threads
from ..core.route import changing
from ..errors import StateError, counted, naming
from ..files.hub import adapter_folder
from ..files.labelled_data import MAX_WORDS
from ..model.ia3_model import DEFAULT_ADAPTER, IA3Model
from ..sentences.head import Head
from .task_file import LONGEST_NAME, Candidate as Candidate, Embedding, EngineName
from .text_classifier import LabelledTexts

ENCODER: Final = "encoder"
LANGUAGE_MODEL: Final = "language-model"
# What each is on, in words.
KINDS: dict[EngineName, str] = {ENCODER: "sentence encoder", LANGUAGE_MODEL: "language model"}


class Step(Protocol):
    """One optimizer step, as `on_step` gets it."""

    @property
    def step(self) -> int:
        """Counted from 1."""

    @property
    def steps(self) -> int:
        """How many there are at most."""

    @property
    def loss(self) -> float:
        """Of the step's batch."""


@dataclass(frozen=True)
class Settings:
    """What a fit depends on besides its data and its model, checked; `None` is the engine's own."""

    steps: int
    seed: int
    learning_rate: float | None
    chat: bool
    upper_blocks: int | None
    max_tokens: int
    threads: int | None = None
    max_words: int | None = None

    @property
    def bound(self) -> dict[str, Any]:
        """`max_words` in what identifies a run, unless it is the usual one."""
        # Runs of earlier versions have none, and their texts are in what identifies them.
        return {} if self.max_words == MAX_WORDS else {"max_words": self.max_words}

    def kept(self, learning_rate: float) -> dict[str, Any]:
        """Those that a saved classifier has, with the rate that was taken."""
        return {
            "chat": self.chat,
            "steps": self.steps,
            "learning_rate": learning_rate,
            "seed": self.seed,
            "upper_blocks": self.upper_blocks,
            "max_words": self.max_words,
        }


@dataclass(frozen=True, eq=False)
class Seen:
    """A candidate, and its answers to training texts that it was asked without having seen them.

    Attributes:
        candidate: which engine, and how often it was right.
        rows: the places of the texts that were asked, among those of the fit whose weight is above
            0.
        probabilities: `[rows, classes]`, float64; `None` where no text was held out.
    """

    candidate: Candidate
    rows: list[int]
    probabilities: Tensor | None


@dataclass(frozen=True)
class Fit:
    """A fitted classifier: what predictions are made with, and how that came about.

    Attributes:
        engine: `ENCODER` or `LANGUAGE_MODEL`.
        model: the base model's name; empty where it had none.
        classes: the labels, `[classes]`, sorted.
        choices: the words of each class, `[classes]`.
        templates: the sources of the templates that texts are read in.
        fields: the names of the examples' fields.
        adapter: its vectors are float32, on the CPU.
        settings: `chat`, `steps`, `learning_rate`, `seed`, `upper_blocks` and `max_words`.
        temperature: scores are divided by it before the softmax.
        head: an encoder's.
        multilabel: whether a text may have several labels: each then has a sigmoid of its own.
        embedding: how an encoder embedded the texts; `None` of a language model, and where a file
            does not say it.
        threads: how many a step took.
        history: one record a step.
        candidates: what was seen of the engines before training, an encoder's frozen embeddings
            among it; empty where nothing was.
        held_out: the same with the answers, of which none is saved.
    """

    engine: EngineName
    model: str
    classes: list[Any]
    choices: list[str]
    templates: list[str]
    fields: list[str]
    adapter: Adapter
    settings: dict[str, Any]
    temperature: float = 1.0
    head: Head | None = None
    multilabel: bool = False
    embedding: Embedding | None = None
    threads: int | None = None
    history: list[Any] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    held_out: list[Seen] = field(default_factory=list)


class Engine(Protocol):
    """One way to fit a classifier, on base models that are loaded."""

    def train(
        self,
        task: Any,
        on_step: Callable[[Any], None] | None = None,
        checkpoints: str | Path | None = None,
    ) -> Fit:
        """Train an adapter for what was prepared; the base model is left as it was."""


def candidate(
    engine: EngineName, name: str, right: Tensor, how: str, weights: Tensor | None = None
) -> Candidate:
    """How often texts are right.

    Args:
        engine: what answered.
        name: of the model that it answered with.
        right: how much of each text's labels is right, `[texts]`, 0 to 1.
        how: the answers came about, in words.
        weights: how much each text counts, `[texts]`.
    """
    right = right.double()
    counts = torch.ones_like(right) if weights is None else weights.double()
    accuracy = float((right * counts).sum() / counts.sum())
    # Of answers that were drawn several times too: there are no more texts for that.
    error = math.sqrt(max(0.0, accuracy * (1 - accuracy))) * float(counts.norm() / counts.sum())
    note = f"{how}, {counted(len(right), 'text')}"
    # A folder's name need not be text, and a file of such a one is not written.
    named = name.encode(errors="replace").decode()[:LONGEST_NAME]
    return Candidate(engine=engine, name=named, accuracy=accuracy, error=error, note=note)


def seen_of(
    engine: EngineName,
    name: str,
    data: LabelledTexts,
    rows: list[int],
    right: Tensor,
    how: str,
    probabilities: Tensor | None,
) -> Seen:
    """What an engine answered to some of the texts, each of which counts by its weight.

    The other arguments are those of `Seen` and `candidate`.
    """
    weights = data.text_weights
    counts = None if weights is None else weights[rows]
    return Seen(candidate(engine, name, right, how, counts), rows, probabilities)


def threads_of(settings: Settings, base: LoadedModel) -> Threads:
    """What chooses how many threads a step of this model takes; on a GPU torch's number stays.

    Several processes that share the steps take their shares of the machine, untimed: what is faster
    for one would have the others wait.
    """
    if base.device.type != "cpu":
        return Threads(torch.get_num_threads())
    shared = most_threads() if processes().count > 1 else None
    return Threads(settings.threads or shared)


def check_trainable(settings: Settings, base: LoadedModel) -> None:
    """Raise `StateError` where torch can pass no gradient through the model's weights."""
    if settings.steps == 0:
        return
    with base.lock:  # the adapters of other threads come and go among the modules
        in_inference_mode = any(value.is_inference() for value in base.model.parameters())
    if in_inference_mode:
        raise StateError(
            f"the model {base.name or type(base.model).__name__!r} was made in inference mode, and "
            "nothing can be trained on it: make or load it outside of torch.inference_mode()"
        )


def adapter_to_begin_with(given: str | Path | Adapter | None) -> Adapter | None:
    """The argument `init_from`, read, to be trained on the model that it is put on.

    Raises `IA3Error` where a vector is not finite.
    """
    if given is None:
        return None
    if not isinstance(given, Adapter):
        given = read_adapter(adapter_folder(given, ["adapter_*"]))
    with naming("init_from"):
        check_finite(given.vectors)
    config = replace(given.config, inference_mode=False, base_model_name_or_path=None)
    return replace(given, config=config)


def trained_adapter(model: IA3Model) -> Adapter:
    """The adapter on a model, with vectors of its own, on the CPU."""
    adapter = model.adapter(DEFAULT_ADAPTER)
    with changing():
        vectors = {name: vector.cpu().clone() for name, vector in adapter.vectors.items()}
    return replace(adapter, vectors=vectors)
