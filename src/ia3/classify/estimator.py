"""`FewShotClassifier`: few-shot classification of texts behind scikit-learn's interface."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ..adapter.files import Adapter, adapter_files, unread_adapter, write_saved
from ..adapter.layout import open_folder
from ..arguments import LARGEST, check_callable, folder_of, instance, number, path_of, whole
from ..base.embedded import EMBEDDED_ENCODER, EMBEDDED_MODEL
from ..base.encoders import SentenceEncoder, is_sentence_encoder, load_encoder
from ..base.loading import BaseModel, LoadedModel, load_base_model
from ..base.processes import processes
from ..base.sharding import is_asked
from ..base.torch_state import usual_state
from ..errors import (
    BrokenFileError,
    IA3Error,
    InvalidTypeError,
    MissingExtraError,
    MissingFileError,
    StateError,
    naming,
    shown,
    warn_caller,
)
from ..files.labelled_data import MAX_WORDS
from ..files.saved import HEAD_NAME, TASK_NAME, Beside, SavedFolder
from ..sentences.head import Head
from ..tfew.prompts.labels import Label, Text, check_text, readable
from ..tfew.scoring.choices import MAX_TOKENS
from .choosing import AutoEngine, AutoTask
from .encoder import EncoderEngine, fields_joined
from .engine import (
    ENCODER,
    KINDS,
    LANGUAGE_MODEL,
    Candidate,
    Engine,
    Fit,
    Seen,
    Settings,
    Step,
    adapter_to_begin_with,
)
from .head_file import head_bytes, read_head
from .inputs import check_fields, cut_texts, examples_of, with_field
from .language_model import LanguageModelEngine
from .ranking import checked_choices
from .self_training import self_trained
from .task_file import (
    MOST_THREADS,
    MULTILABEL_FORMAT,
    TASK_FORMAT,
    Embedding,
    EngineName,
    TaskFile,
)
from .text_classifier import TextClassifier, read_labelled
from .weights import sample_weights

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
# What a fit depends on besides its data: what is expected, its types, and Python's own one.
SETTINGS: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "chat": ("True or False", bool | np.bool_, bool),
    "steps": ("a whole number", Integral, int),
    "learning_rate": ("a number or None", Real, float),
    "seed": ("a whole number", Integral, int),
    "upper_blocks": ("a whole number or None", Integral, int),
    "threads": ("a whole number or None", Integral, int),
    "max_words": ("a whole number or None", Integral, int),
}
# Those that a task file has.
KEPT = ("chat", "steps", "learning_rate", "seed", "upper_blocks", "max_words")
_MAY_BE_NONE = ("learning_rate", "upper_blocks", "threads", "max_words")
MODELS = (str, os.PathLike, nn.Module)
# Of `"auto"`: the arguments, and what they are where nothing else is said.
_ARGUMENT: dict[EngineName, str] = {ENCODER: "encoder", LANGUAGE_MODEL: "language_model"}
_DEFAULT: dict[EngineName, str] = {ENCODER: EMBEDDED_ENCODER, LANGUAGE_MODEL: EMBEDDED_MODEL}
_EXPECTED = "a model's name, folder or hub id, or a loaded model"


@dataclass(frozen=True)
class Bases:
    """The base models that a fit may train, loaded; it chooses where there are two.

    `left_out` says why there is one alone where two were meant.
    """

    encoder: SentenceEncoder | None
    language_model: BaseModel | None
    left_out: str = ""


class FewShotClassifier(TextClassifier):
    """Text classification from a few labelled examples.

    A frozen model gets (IA)³ vectors that are trained on the examples: a language model by the
    T-Few recipe (paper section 3), which reads a text in a prompt and ranks the labels' words, or a
    sentence encoder, by drawing texts of one class together, with a linear head on its embeddings.
    The model carries the adapter only during a call, so that classifiers of one model share it.

    Args:
        model: `"auto"`, which trains `encoder` or `language_model`, whichever promises more on the
            examples; or the one to train: `"all-minilm-l6-v2"`, `"smollm2-135m-instruct"`, a
            folder, a hub id, or a loaded model. With `"auto"`, a `template`, `choices`, `chat` or
            `upper_blocks` means the language model.
        template: a Jinja template over the fields' names, e.g. `"{{ text }}\\nCategory:"`. A
            language model takes a list of them too: training draws one for each example at each
            step, prediction averages over all. A text that is a string has the one field `text`.
            By default a language model reads the fields, followed by `Category:`, and an encoder
            the fields alone, joined by `". "`.
        choices: label -> the words that a language model ranks for it. By default the label's own
            name made readable. It may name labels that do not occur in training.
        encoder, language_model: the two that `"auto"` chooses from, as `model`.
        steps: the most optimizer steps, 0 or more; 0 is the untuned model. A language model's
            training ends earlier where the loss has stopped falling; an encoder's takes 15 to 100,
            by the number of texts.
        seed: of all draws, 0 to 2**32 - 1.
        device: `"auto"` or torch's name of one; a loaded model stays where it is.
        dtype: `"auto"` or torch's name of a floating-point dtype; a loaded model keeps its own. The
            vectors are float32 in any case.
        learning_rate: at its peak, above 0; `None` is 1e-2 of Adafactor for a language model, and
            2e-2 of AdamW, less for many texts, for an encoder. The paper's is 3e-3; a small model
            learns more at this one (docs/benchmarks.md).
        chat: put the prompt into the language model's chat template.
        tokenizer: for a loaded model whose config does not say where it came from.
        init_from: an adapter's folder or hub id, or an `Adapter`, such as another task's or one
            trained on many tasks: `fit` begins with its vectors, at its sites, instead of ones.
            `model` names the base that it is of.
        max_tokens: the most tokens computed at once, in training and in prediction, 1 or more. What
            has more is computed in parts, with the same results but for rounding. Lower it where
            memory runs out.
        upper_blocks: rescale only this number of uppermost blocks of a decoder-only model instead
            of all. The blocks below them need no gradients.
        threads: of a training step on a CPU; `None` takes one or all, whichever is faster.
        class_weight: label -> how much its texts count in training, 1 where nothing is said; or
            `"balanced"`, by which the texts of a rare label count more, as in scikit-learn. An
            encoder's batches take the labels in turn in any case.
        multilabel: each text has any number of labels, in a list. An encoder is trained then, whose
            head says of each label by itself whether a text has it.
        max_words: of a text's field so many words are read, 1 or more, in training and in
            prediction; one warning tells of longer ones. `None` reads all, which takes a language
            model minutes for a text of thousands of words.
        shard: spread the language model's weights over the processes of the job that `torchrun` or
            `accelerate launch` started, so that none of them holds all; `None` does so where
            accelerate was told to use FSDP 2. All processes then predict together too.

    Attributes:
        classes_: the labels, `[classes]`, sorted.
        engine_: `"encoder"` or `"language-model"`.
        model_: the name of the base model that was trained.
        candidates_: what was seen before training, each a `Candidate`: of the frozen encoder with a
            linear head, and where `"auto"` chose between the two, of the untuned language model and
            then, unless the encoder was ahead already, of the encoder trained on folds.
        held_out_: the same with the answers, each a `Seen`; empty of a classifier that was loaded.
        choices_: the words of each class, `[classes]`.
        templates_: the templates' sources.
        fields_: the names of the examples' fields.
        settings_: `chat`, `steps`, `learning_rate`, `seed`, `upper_blocks` and `max_words`, as they
            were in `fit`.
        adapter_: the `Adapter`: its config, and its vectors, float32 on the CPU.
        head_: an encoder's linear `Head`; `None` of a language model.
        multilabel_: whether a text may have several labels.
        embedding_: how the encoder embedded the texts, an `Embedding`; `None` of a language model.
        temperature_: scores are divided by it before the softmax.
        threads_: how many a step took; `None` where that is not known.
        history_: one record a step that was taken, with `step`, `steps` and `loss`.

    Raises:
        IA3Error: an argument is unusable. Arguments are checked in `fit`, as scikit-learn has it.

    Example:
        >>> from ia3 import FewShotClassifier
        >>> classifier = FewShotClassifier(steps=2)
        >>> texts = ["I was charged twice.", "The courier left my parcel in the rain."]
        >>> classifier.fit(texts, ["billing", "delivery"]).classes_.tolist()
        ['billing', 'delivery']
        >>> classifier.predict_proba(["The bill is wrong.", "Where is the van?"]).shape
        (2, 2)
    """

    engine_: EngineName
    model_: str
    candidates_: list[Candidate]
    held_out_: list[Seen]
    choices_: list[str]
    settings_: dict[str, Any]
    adapter_: Adapter
    head_: Head | None
    embedding_: Embedding | None
    temperature_: float
    threads_: int | None
    history_: list[Any]

    def __init__(
        self,
        model: str | Path | nn.Module = AUTO,
        template: str | Sequence[str] | None = None,
        choices: Mapping[Any, str] | None = None,
        *,
        encoder: str | Path | nn.Module = EMBEDDED_ENCODER,
        language_model: str | Path | nn.Module = EMBEDDED_MODEL,
        steps: int = 100,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        learning_rate: float | None = None,
        chat: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        init_from: str | Path | Adapter | None = None,
        max_tokens: int = MAX_TOKENS,
        upper_blocks: int | None = None,
        threads: int | None = None,
        class_weight: Mapping[Any, float] | str | None = None,
        multilabel: bool = False,
        max_words: int | None = MAX_WORDS,
        shard: bool | None = None,
    ) -> None:
        self.model = model
        self.template = template
        self.choices = choices
        self.encoder = encoder
        self.language_model = language_model
        self.steps = steps
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.learning_rate = learning_rate
        self.chat = chat
        self.tokenizer = tokenizer
        self.init_from = init_from
        self.max_tokens = max_tokens
        self.upper_blocks = upper_blocks
        self.threads = threads
        self.class_weight = class_weight
        self.multilabel = multilabel
        self.max_words = max_words
        self.shard = shard

    @usual_state()
    def fit(
        self,
        X: Sequence[Text],
        y: ArrayLike | Sequence[Collection[Label]],
        sample_weight: ArrayLike | None = None,
        *,
        on_step: Callable[[Step], None] | None = None,
        checkpoints: str | Path | None = None,
        unlabelled: Sequence[Text] | None = None,
    ) -> FewShotClassifier:
        """Train on labelled texts.

        Of several processes that `torchrun` or `accelerate launch` started, each calls this with
        the same texts, computes a part of every step, and is fitted in the end as the first is.

        Args:
            X: strings, or mappings from field names to values, `[examples]`. What a template
                reads is text, a finite number, a date, or lists and mappings of these.
            y: strings, integers of 64 bits or booleans, all of one kind, `[examples]` or
                `[examples, 1]`; a whole floating-point number counts as an integer, and a member of
                an enumeration as its value. With `multilabel`, a list of them for each example.
            sample_weight: how much each text counts, at least 0, `[examples]`; one of 0 leaves its
                text out. `None` is 1 each.
            on_step: called after every optimizer step but those of trainings on folds, by which
                `"auto"` chooses; of several processes, by the first.
            checkpoints: a folder in which the training is kept as it goes. The same call after a
                break goes on from there, and ends as it would have without it.
            unlabelled: more texts of the same kind. What the trained classifier is sure of is
                learned from once, if that makes more right of the labelled texts, each held out in
                turn. It takes up to twelve trainings to see; `candidates_` says what was seen, and
                whether these texts were taken.

        Raises:
            InvalidTypeError: an argument, a setting, a text or a label is of another type.
            StateError: there is no such device, or the model was made in inference mode.
            MissingExtraError: the model comes in a package that is not installed.
            MissingFileError: there is no adapter at `init_from`.
            DivergedError: the loss, a gradient or an update is not finite. What was fitted before
                stays.
            IA3Error: the data, a template or the choices are unusable (the message says which, and
                the row),
                `init_from` does not fit the model, the model has not so many blocks, or the
                checkpoints are those of another run, or were asked for with `unlabelled`; or the
                processes of a job were given different things.
            OSError: a checkpoint cannot be written.
        """
        check_callable("on_step", on_step)
        if checkpoints is not None:
            path_of("checkpoints", checkpoints)
        job = processes()  # before a model is loaded: each process has a device of its own
        engine, task = self._prepare(X, y, sample_weight)
        if job.count > 1:
            asked = {"checkpoints": checkpoints is not None, "unlabelled": unlabelled is not None}
            job.check_same({**task.described(), **asked})
        if unlabelled is None:
            fit = engine.train(task, on_step, checkpoints)
            self._keep(job.from_first(lambda: fit))
            self._base = self.base  # the cache of loaded models is weak
            return self
        for name, given, why in (
            ("checkpoints", checkpoints is not None, "is of one training, and it takes several"),
            ("sample_weight", sample_weight is not None, "says nothing of what it labels"),
            ("multilabel", bool(self.multilabel), "has labels that it is sure of one by one"),
            ("a class_weight of 0", self._leaves_a_class_out(), "leaves a class out"),
        ):
            if given:
                raise IA3Error(f"unlabelled is given, and {name}, which {why}: drop one")
        with naming("unlabelled"):
            names = list(task.data.examples[0])
            others = with_field(examples_of(unlabelled), names)
            check_fields(others, names, task.templates)
        job.check_same({"unlabelled": others})
        self._keep(self_trained(self._new, task.data, others, self.seed, on_step))
        self._base = self.base
        return self

    @property
    def base(self) -> BaseModel | SentenceEncoder:
        """The model and its tokenizer, loaded when first used, shared with others of its name.

        Raises:
            InvalidTypeError: a setting is of another type.
            StateError: there is no such device, or `"auto"` has not chosen yet: call `fit`.
            IA3Error: the model is unknown, cannot be loaded, or cannot classify.
        """
        model, engine = self.model, getattr(self, "engine_", None)
        if self._chooses():
            if engine is None:
                raise StateError(
                    "model is 'auto', which fit chooses: call fit first, or name a model"
                )
            model = self.encoder if engine == ENCODER else self.language_model
        # The cache of loaded models is weak: this reference keeps the model in memory.
        self._base = self._load(model, engine)
        return self._base

    # -- fitting ----------------------------------------------------------------------------------

    def _chooses(self) -> bool:
        return isinstance(self.model, str) and self.model == AUTO

    def _load(
        self, model: str | Path | nn.Module, engine: EngineName | None = None
    ) -> BaseModel | SentenceEncoder:
        """A model for an engine, or for the one that its files say."""
        if engine is None:
            engine = ENCODER if is_sentence_encoder(model) else LANGUAGE_MODEL
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if engine == LANGUAGE_MODEL:
            options["shard"] = is_asked(self.shard)
            return load_base_model(model, tokenizer=self.tokenizer, **options)
        if self.shard and not self._chooses():
            raise IA3Error(
                f"shard spreads a language model over processes, and {shown(model)} is a sentence "
                "encoder, which each of them holds: leave out shard"
            )
        return load_encoder(model, tokenizer=self.tokenizer, **options)

    def _leaves_a_class_out(self) -> bool:
        return isinstance(self.class_weight, Mapping) and 0 in self.class_weight.values()

    def _new(self, engine: EngineName | None) -> FewShotClassifier:
        """One that is not fitted, with these settings; on the engine's model where one is named."""
        new: FewShotClassifier = self.__sklearn_clone__()
        if engine is not None and self._chooses():
            new.model = self.encoder if engine == ENCODER else self.language_model
        return new

    def _settings(self) -> Settings:
        """The settings of a fit, checked, as Python's own numbers; a grid's may be numpy's."""
        settings: dict[str, Any] = {}
        for name, (expected, kinds, plain) in SETTINGS.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                settings[name] = None
                continue
            if not isinstance(value, kinds) or (plain is not bool and isinstance(value, bool)):
                what = f"{name} is {shown(value)} ({type(value).__name__})"
                raise InvalidTypeError(f"{what}, expected {expected}")
            settings[name] = number(name, value, expected) if plain is float else plain(value)
        whole("steps", settings["steps"], 0, expected="at least 0")
        expected = "a number above 0"
        if settings["learning_rate"] is not None and not 0 < settings["learning_rate"] < math.inf:
            raise IA3Error(f"learning_rate is {self.learning_rate}, expected {expected}")
        whole("seed", settings["seed"], 0, 2**32 - 1, "0 to 2**32 - 1")
        if settings["upper_blocks"] is not None:
            whole("upper_blocks", settings["upper_blocks"], -LARGEST)
        if settings["threads"] is not None:
            whole("threads", settings["threads"], 1, MOST_THREADS, f"1 to {MOST_THREADS}")
        if settings["max_words"] is not None:
            whole("max_words", settings["max_words"], 1, expected="at least 1, or None")
        for name in ("model", "encoder", "language_model"):
            expected = f"'auto', {_EXPECTED}" if name == "model" else _EXPECTED
            instance(name, getattr(self, name), MODELS, expected)
        instance("multilabel", self.multilabel, (bool, np.bool_), "True or False")
        self._check_together()
        most = whole("max_tokens", self.max_tokens, 1, expected="at least 1")
        return Settings(max_tokens=most, **settings)

    def _check_together(self) -> None:
        """Raise `IA3Error` for settings of which one leaves no room for another."""
        if self.init_from is not None and self.upper_blocks is not None:
            raise IA3Error(
                f"upper_blocks is {self.upper_blocks}, and init_from brings the sites of its "
                "adapter: give one of them"
            )
        for name in ("tokenizer", "init_from"):
            if self._chooses() and getattr(self, name) is not None:
                raise IA3Error(f"{name} is given and model is 'auto': name the model that it is of")

    def _bases(self) -> Bases:
        """The base models that a fit may train, loaded."""
        if not self._chooses():
            base = self._load(self.model)
            if self.multilabel and not isinstance(base, SentenceEncoder):
                raise IA3Error(
                    f"several labels a text are an encoder's: {base.name!r} is a language model; "
                    f"name a sentence encoder, e.g. model={EMBEDDED_ENCODER!r}, or leave out model"
                )
            return Bases(base, None) if isinstance(base, SentenceEncoder) else Bases(None, base)
        asks = (self.template, self.choices, self.upper_blocks, self.chat or None)
        if self.multilabel:
            return Bases(self._candidate(ENCODER), None)
        if any(asked is not None for asked in asks):
            return Bases(None, self._candidate(LANGUAGE_MODEL))
        found: dict[EngineName, Any] = {}
        missing = []
        for engine in (ENCODER, LANGUAGE_MODEL):
            try:
                found[engine] = self._candidate(engine)
            except MissingExtraError as error:
                # Who names a model wants it.
                if getattr(self, _ARGUMENT[engine]) != _DEFAULT[engine]:
                    raise
                missing.append(str(error))
        if not found:
            raise IA3Error(f"neither model that 'auto' chooses from is there: {'; '.join(missing)}")
        return Bases(found.get(ENCODER), found.get(LANGUAGE_MODEL), "".join(missing))

    def _candidate(self, engine: EngineName) -> Any:
        """The encoder or the language model that `"auto"` has, loaded."""
        name = _ARGUMENT[engine]
        model = getattr(self, name)
        with naming(name):
            if is_sentence_encoder(model) != (engine == ENCODER):
                what = f"a {type(model).__name__}" if isinstance(model, nn.Module) else shown(model)
                other: EngineName = LANGUAGE_MODEL if engine == ENCODER else ENCODER
                raise IA3Error(
                    f"{what} is no {KINDS[engine]}, it is a {KINDS[other]}: give it as "
                    f"{_ARGUMENT[other]}, or as model"
                )
            return self._load(model, engine)

    def _prepare(
        self,
        texts: Sequence[Text],
        labels: Any,
        sample_weight: Any = None,
        bases: Bases | None = None,
    ) -> tuple[Engine, Any]:
        """The engine and the task for it: all is checked before a model changes.

        `bases` are those of `_bases`, where they are loaded already.
        """
        settings = self._settings()
        choices = checked_choices(self.choices)
        if self.multilabel and choices is not None:
            raise IA3Error(
                "choices are a language model's, and several labels a text an encoder's: leave out "
                "choices or multilabel"
            )
        data, named = read_labelled(texts, labels, choices or (), multilabel=self.multilabel)
        weights = sample_weights(sample_weight, len(data.examples))
        data = data.weighted(weights, self.class_weight)
        words = None if choices is None else dict(zip(named, choices.values(), strict=True))
        bases = bases or self._bases()
        if bases.left_out:
            warn_caller(f"model is 'auto', and one of its two is left out: {bases.left_out}")
        if bases.encoder is not None and words is not None:
            raise IA3Error(
                f"choices are a language model's: {bases.encoder.name!r} is a sentence encoder; "
                "leave them out, or name a language model"
            )
        # What a language model would not read, an encoder beside it does not either.
        cut = cut_for(bases.language_model or bases.encoder, data.examples, settings.max_words)
        data = replace(data, examples=cut)
        start = adapter_to_begin_with(self.init_from)
        if bases.encoder is None:
            assert bases.language_model is not None
            asks = LanguageModelEngine(bases.language_model, settings)
            return asks, asks.prepare(data, self.template, words, start)
        encoder = EncoderEngine(bases.encoder, settings)
        task = encoder.prepare(data, self.template, start)
        if bases.language_model is None:
            return encoder, task
        asks = LanguageModelEngine(bases.language_model, settings)
        try:
            other = asks.prepare(data, self.template, words, start, advise=False)
        except IA3Error as error:  # an encoder reads nothing into labels, nor all choices at once
            warn_caller(f"model is 'auto', and the language model is left out: {error}")
            return encoder, task
        return AutoEngine(encoder, asks), AutoTask(task, other)

    def _keep(self, fit: Fit) -> None:
        """Be fitted so, at once: a thread that predicts meanwhile sees one fit, whole."""
        kept = {f"{name}_": value for name, value in vars(fit).items()}
        self.__dict__.update(kept, classes_=np.array(fit.classes))

    @property
    def _fit(self) -> Fit:
        """What it is fitted as."""
        kept = {each.name: getattr(self, f"{each.name}_") for each in fields(Fit)}
        return Fit(**{**kept, "classes": self.classes_.tolist()})

    def _probabilities(
        self, examples: list[Mapping[str, Any]], progress: Callable[[int], None] | None
    ) -> Tensor:
        return self._read(examples, progress)[0]

    def _read(
        self, examples: list[Mapping[str, Any]], progress: Callable[[int], None] | None
    ) -> tuple[Tensor, Tensor]:
        """Probabilities, `[examples, classes]`, and vectors that tell how like two texts are."""
        fit = self._fit
        examples = cut_for(self.base, examples, fit.settings.get("max_words"))
        engine = engine_on(self.base, Settings(max_tokens=self.max_tokens, **fit.settings))
        return engine.read(fit, examples, progress)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What was pickled by an earlier version lacks some.
        added: dict[str, Any] = {"class_weight": None, "multilabel": False, "max_words": None}
        if "classes_" in state:
            added |= {"held_out_": [], "multilabel_": False, "embedding_": None}
        super().__setstate__({**added, **state})

    # -- files ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's two files, and the task and an encoder's head beside them.

        Killed at any moment, it leaves the classifier that was there or this one.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: an argument is of another type.
            NotAFolderError: there is a file of that name.
            IA3Error: the folder's name is malformed, the model's name cannot be written (a folder
                whose name is not UTF-8), a vector is not finite, or an attribute was set to what
                cannot be read again, such as a `temperature_` of 0.
            OSError: the disk is full or may not be written; what was there before stays.
        """
        write_saved(folder_of("folder", folder), self.to_files())

    def to_files(self) -> dict[str, bytes]:
        """What `save` writes, by file name; raises as it does, but for the folder's errors."""
        self._check_fitted()
        fitted = self._as_fitted()
        return classifier_files(replace(fitted._fit, model=fitted.base.name))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        model: str | Path | nn.Module | None = None,
        device: str = "auto",
        dtype: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> FewShotClassifier:
        """Read what `save` wrote.

        Args:
            folder: written by `save`.
            model: in place of the one the adapter was trained on, e.g. where it lies elsewhere now.
            device, dtype, tokenizer, max_tokens: as in the constructor.

        Raises:
            InvalidTypeError: an argument is of another type.
            MissingFileError: the folder or one of its files is not there.
            BrokenFileError: a file is damaged, a value in one is of another type or range, or
                another program has replaced the vectors or the head.
            IA3Error: the task file names no model, and none is given.
        """
        fit = read_classifier(folder)
        if model is None:
            if not fit.model:
                path = Path(folder) / TASK_NAME
                raise IA3Error(f"{path} names no model: give the one it was fitted on as model=")
            model = fit.model
        given = {**fit.settings, "device": device, "dtype": dtype, "tokenizer": tokenizer}
        if fit.engine == LANGUAGE_MODEL:
            given["choices"] = dict(zip(fit.classes, fit.choices, strict=True))
        template = fit.templates if fit.engine == LANGUAGE_MODEL else fit.templates[0]
        given["multilabel"] = fit.multilabel
        classifier = cls(model, template, max_tokens=max_tokens, **given)
        classifier._keep(fit)
        return classifier


def classifier_files(fit: Fit) -> dict[str, bytes]:
    """What `FewShotClassifier.save` writes, by file name.

    Raises `IA3Error` where the model's name is no text, or a value is not finite.
    """
    check_text(fit.model, "the model's name")
    head = None if fit.head is None else head_bytes(fit.head.weight, fit.head.bias)
    values = {
        "format": MULTILABEL_FORMAT if fit.multilabel else TASK_FORMAT,
        "multilabel": fit.multilabel,
        "engine": fit.engine,
        "model": fit.model,
        "templates": fit.templates,
        "fields": fit.fields,
        "labels": fit.classes,
        "choices": fit.choices,
        "temperature": fit.temperature,
        "threads": fit.threads,
        "selection": fit.candidates or None,
        "embedding": fit.embedding,
        "head": None if head is None else hashlib.sha256(head).hexdigest(),
        **fit.settings,
    }
    with naming("the classifier cannot be saved"):
        task = TaskFile.of(values)

    def beside(digest: str) -> dict[str, str | bytes]:
        # The hash tells where another program has replaced the vectors since.
        files: dict[str, str | bytes] = {
            TASK_NAME: task.model_copy(update={"vectors": digest}).to_json()
        }
        return files if head is None else {**files, HEAD_NAME: head}

    return adapter_files(fit.adapter, beside)


def cut_for(
    base: LoadedModel | None, examples: list[Mapping[str, Any]], max_words: int | None
) -> list[Mapping[str, Any]]:
    """The examples as far as they are read; of an encoder's own bound it warns itself."""
    if max_words is None or (isinstance(base, SentenceEncoder) and base.max_length <= max_words):
        return examples
    return cut_texts(examples, max_words)


def engine_on(
    base: BaseModel | SentenceEncoder, settings: Settings
) -> EncoderEngine | LanguageModelEngine:
    """The engine for a base model."""
    if isinstance(base, SentenceEncoder):
        return EncoderEngine(base, settings)
    return LanguageModelEngine(base, settings)


def read_classifier(folder: str | Path) -> Fit:
    """What `FewShotClassifier.save` wrote; raises as `FewShotClassifier.load` does."""
    path_of("folder", folder)
    with naming(f"no classifier in {folder}"):
        saved_folder = open_folder(folder)
    with saved_folder as saved:
        adapter = unread_adapter(saved).whole()
        task, head = read_task(saved)
    return Fit(
        engine=task.engine,
        model=task.model or "",
        classes=task.labels,
        choices=task.choices or [readable(label) for label in task.labels],
        templates=task.templates or [fields_joined(task.fields)],
        fields=task.fields,
        adapter=adapter,
        settings={name: getattr(task, name) for name in KEPT},
        temperature=task.temperature,
        head=head,
        multilabel=task.multilabel,
        embedding=task.embedding,
        threads=task.threads,
        candidates=task.selection or [],
    )


def read_task(saved: SavedFolder | Beside) -> tuple[TaskFile, Head | None]:
    """The task of a classifier whose vectors were read, and an encoder's head.

    Raises:
        MissingFileError: there is no task, or no head where there is to be one.
        BrokenFileError: one is damaged, or of another save than the vectors.
    """
    text, where = saved.text(TASK_NAME), saved.folder / TASK_NAME
    if text is None:
        raise MissingFileError(f"no classifier in {saved.folder}: {TASK_NAME} is not there")
    task = TaskFile.from_json(text, str(where))
    head = read_head(saved, len(task.labels), task.head)
    if task.vectors not in (None, saved.digest):
        raise BrokenFileError(
            f"{where} is of other vectors than {saved.path.name} beside it has, which another "
            "program has replaced: fit and save the classifier again; or, if it is meant to have "
            f"these vectors, remove 'vectors' from {TASK_NAME}"
        )
    return task, head
