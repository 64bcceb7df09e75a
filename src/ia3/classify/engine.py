"""What an engine is given, and what it makes of it: one adapter on one base model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ..adapter.files import Adapter, check_finite, read_adapter
from ..base.loading import LoadedModel
from ..base.threads import Threads
from ..core.route import changing
from ..errors import StateError, naming
from ..files.hub import adapter_folder
from ..model.ia3_model import DEFAULT_ADAPTER, IA3Model
from ..sentences.head import Head
from .task_file import LONGEST_NAME, Candidate as Candidate, EngineName

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

    def kept(self, learning_rate: float) -> dict[str, Any]:
        """Those that a saved classifier has, with the rate that was taken."""
        return {
            "chat": self.chat,
            "steps": self.steps,
            "learning_rate": learning_rate,
            "seed": self.seed,
            "upper_blocks": self.upper_blocks,
        }


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
        settings: `chat`, `steps`, `learning_rate`, `seed` and `upper_blocks`.
        temperature: scores are divided by it before the softmax.
        head: an encoder's.
        threads: how many a step took.
        history: one record a step.
        candidates: what was seen of the engines before training, an encoder's frozen embeddings
            among it; empty where nothing was.
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
    threads: int | None = None
    history: list[Any] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)


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
    engine: EngineName, name: str, scores: Tensor, targets: Sequence[int], how: str
) -> Candidate:
    """How often scores, `[texts, classes]`, are highest for the texts' classes, `[texts]`."""
    right = scores.argmax(1) == torch.tensor(targets)
    accuracy = float(right.double().mean())
    error = math.sqrt(accuracy * (1 - accuracy) / len(right))
    note = f"{how}, {len(right):,} texts"
    # A folder's name need not be text, and a file of such a one is not written.
    named = name.encode(errors="replace").decode()[:LONGEST_NAME]
    return Candidate(engine=engine, name=named, accuracy=accuracy, error=error, note=note)


def threads_of(settings: Settings, base: LoadedModel) -> Threads:
    """What chooses how many threads a step of this model takes; on a GPU torch's number stays."""
    on_gpu = base.device.type != "cpu"
    return Threads(torch.get_num_threads() if on_gpu else settings.threads)


def check_trainable(settings: Settings, base: LoadedModel) -> None:
    """Raise `StateError` where torch can pass no gradient through the model's weights."""
    if settings.steps > 0 and any(value.is_inference() for value in base.model.parameters()):
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
