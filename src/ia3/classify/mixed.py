"""Texts of many classifiers in one batch: each row has an adapter, labels and a head of its own."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import instance, listed
from ..bank.bank import AdapterBank, Version
from ..base.encoders import SentenceEncoder, is_sentence_encoder, load_encoder
from ..base.loading import BaseModel, load_base_model
from ..base.torch_state import usual_state
from ..core.sites import Site
from ..errors import IA3Error, InvalidTypeError, MissingFileError, StateError, naming, shown
from ..files.saved import TASK_NAME
from ..model.adapters import check_string
from ..sentences.embedding import embeddings, tokenized
from ..sentences.head import Head
from ..tfew.prompts.encoding import EncodedExample, Encoder, warn_of_cut_texts
from ..tfew.prompts.labels import Label, Text
from ..tfew.prompts.templates import Template
from ..tfew.scoring.choices import choice_scores
from .encoder import check_embeds_so, fields_joined
from .engine import ENCODER, KINDS, LANGUAGE_MODEL
from .estimator import cut_for, read_task
from .inputs import check_fields, examples_of, with_field
from .task_file import EngineName, TaskFile
from .text_classifier import not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classified:
    """What a classifier says of a text.

    Attributes:
        label: the most probable one.
        probability: of that label.
        probabilities: label -> its probability, in the order of the classifier's `classes_`.
        labels: all that the text has: `label` alone; of a classifier whose texts have several, each
            whose probability is at least one half.
    """

    label: Label
    probability: float
    probabilities: dict[Label, float]
    labels: list[Label]


@usual_state()
def classify(
    bank: AdapterBank,
    texts: Sequence[Text],
    names: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Classified]:
    """Classify texts in one batch, each by the classifier of its name.

    Each row is computed with the adapter of its classifier, and read by its head, or asked by its
    templates for its choices: as `FewShotClassifier.predict_proba` of that classifier alone. Labels
    and vectors are those of one save: what `refresh` takes up counts for calls that begin later.

    Args:
        bank: of the model that the classifiers were fitted on. Each is added by the folder that
            `FewShotClassifier.save` wrote, e.g. `bank.add("customer-a", "classifiers/a")`.
        texts: strings, or mappings from field names to values, `[texts]`.
        names: of the bank's classifiers, one a text; no more different ones than have room.
        tokenizer: for a model whose config does not say where it came from.

    Returns:
        `[texts]`: a list, as each classifier has labels of its own.

    Raises:
        InvalidTypeError: an argument, a name or a text is of another type.
        UnknownNameError: the bank has no adapter of a name.
        MissingFileError: an adapter is no classifier: it has no task beside it, or no head.
        BrokenFileError: a classifier's task or head is damaged, or of other vectors.
        StateError: an adapter cannot be loaded, there is no room for all, the bank was closed, its
            model's adapters are merged or disabled, or its encoder is in training mode.
        IA3Error: there is not one name a text; a text lacks a field or has one that is
            no text, finite number or date; the bank's model has no tokenizer, or is not the one
            that a classifier was fitted on; or scores are not finite.

    Example:
        >>> from transformers import AutoModel
        >>> import ia3
        >>> from ia3.base.embedded import embedded_encoder_folder
        >>> classifier = ia3.FewShotClassifier("all-minilm-l6-v2", steps=2)
        >>> texts = ["I was charged twice.", "The courier left my parcel in the rain."]
        >>> classifier.fit(texts, ["billing", "delivery"]).save("customer-a")
        >>> bank = ia3.AdapterBank(AutoModel.from_pretrained(embedded_encoder_folder()))
        >>> bank.add("customer-a", "customer-a")
        >>> ia3.classify(bank, ["Charged again!"], ["customer-a"])[0].label
        'billing'
    """
    instance("bank", bank, AdapterBank, "an AdapterBank")
    expected = "a list of names, one a text"
    if isinstance(names, Set):
        raise InvalidTypeError(f"names is {shown(names)}, which has no order: expected {expected}")
    asked = listed("names", names, expected)
    for name in asked:
        check_string(name)
    examples = examples_of(texts)
    if len(asked) != len(examples):
        raise IA3Error(f"there are {len(asked)} names and {len(examples)} texts: expected one each")
    if not asked:
        return []
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(asked):
        rows.setdefault(name, []).append(row)
    # The values and what is beside them, at once: a task never meets another version's vectors.
    values, versions = bank.versions([*rows])
    served = _served(bank, tokenizer)
    tasks = {n: served.task(n, version) for n, version in zip(rows, versions, strict=True)}
    for name, task in tasks.items():
        of_task = with_field([examples[row] for row in rows[name]], task.file.fields)
        check_fields(of_task, task.file.fields, task.templates, rows[name])
        of_task = cut_for(served.base, of_task, task.file.max_words)
        for row, example in zip(rows[name], of_task, strict=True):
            examples[row] = example
    batch = _Batch(bank, values, tasks, asked, examples)
    if isinstance(served.base, SentenceEncoder):
        found = batch.by_embeddings(served.base, rows)
    else:
        found = batch.by_ranking(served.base)
    return [_classified(row, tasks[asked[row]], found[row]) for row in range(len(asked))]


def _classified(row: int, task: _Task, probabilities: list[float]) -> Classified:
    if not math.isfinite(sum(probabilities)):
        raise not_finite(row)
    most, labels = max(probabilities), task.file.labels
    label = labels[probabilities.index(most)]
    by_label = dict(zip(labels, probabilities, strict=True))
    own = [name for name, p in by_label.items() if p >= 0.5] if task.file.multilabel else [label]
    return Classified(label, most, by_label, own)


@dataclass(frozen=True, eq=False)
class _Task:
    """A classifier besides its vectors; an encoder's head is float64."""

    file: TaskFile
    templates: list[Template]
    encoder: Encoder | None = None
    head: Head | None = None


@dataclass(frozen=True, eq=False)
class _Served:
    """The base model of a bank, and its classifiers' tasks: each is read once a version."""

    base: SentenceEncoder | BaseModel
    tasks: weakref.WeakKeyDictionary[Version, _Task] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def task(self, name: str, version: Version | None) -> _Task:
        """The task of a classifier, checked against the base model."""
        if version is None:
            raise MissingFileError(
                f"adapter {name!r} is no classifier: it has no {TASK_NAME} beside it; save the "
                "FewShotClassifier, and add the folder that it was saved in"
            )
        task = self.tasks.get(version)
        if task is None:
            with naming(f"adapter {name!r}"):
                task = self.tasks[version] = _read(version, self.base)
        return task


def _read(version: Version, base: SentenceEncoder | BaseModel) -> _Task:
    file, head = read_task(version.beside)
    engine: EngineName = ENCODER if isinstance(base, SentenceEncoder) else LANGUAGE_MODEL
    if file.engine != engine:
        raise IA3Error(
            f"it is a classifier on a {KINDS[file.engine]}, and the bank's model is a "
            f"{KINDS[engine]}: add it to a bank of {file.model or 'the model it was fitted on'!r}"
        )
    if version.base is not None and (other := version.base.difference(base.model)):
        raise IA3Error(f"it was fitted on another model than the bank's: {other}")
    templates = [Template(source) for source in file.templates]
    if isinstance(base, BaseModel):
        return _Task(file, templates, Encoder(base, file.choices, chat=file.chat))
    assert head is not None
    templates = templates or [Template(fields_joined(file.fields))]
    check_embeds_so(base, file.embedding)
    head.check_fits(base.dimension)
    return _Task(file, templates, None, Head(head.weight.double(), head.bias.double()))


# By bank. A reference to the base keeps it, and with it its tokenizer, in memory.
_of_banks: weakref.WeakKeyDictionary[AdapterBank, _Served] = weakref.WeakKeyDictionary()


def _served(bank: AdapterBank, tokenizer: Any) -> _Served:
    """What was read for a bank before, or is now: with this tokenizer, or with whichever."""
    found = _of_banks.get(bank)
    if found is None or tokenizer not in (None, found.base.tokenizer):
        model = bank.model.get_base_model()
        load = load_encoder if is_sentence_encoder(model) else load_base_model
        found = _of_banks[bank] = _Served(load(model, tokenizer=tokenizer))
    return found


@dataclass(frozen=True)
class _Batch:
    """The texts of a call, with a name each; `values` are in the order of the `tasks`."""

    bank: AdapterBank
    values: Mapping[Site, Tensor]
    tasks: dict[str, _Task]
    names: list[str]
    examples: list[Mapping[str, Any]]

    def by_embeddings(self, base: SentenceEncoder, rows: dict[str, list[int]]) -> list[list[float]]:
        """The probabilities that the heads give, `[texts][classes]`; `rows` are by name."""
        if base.model.training:
            raise StateError("the bank's encoder is in training mode: call eval() on it first")
        places = {name: place for place, name in enumerate(self.tasks)}

        def routed(adapter_names: Sequence[str], **inputs: Any) -> Any:
            index = torch.tensor([places[name] for name in adapter_names])
            with self._routed(index):
                return base.model(**inputs)

        templates = [self.tasks[name].templates[0] for name in self.names]
        pairs = zip(templates, self.examples, strict=True)
        ids = tokenized(base, [template.render(example, []) for template, example in pairs])
        found = embeddings(base, ids, model=routed, adapter_names=self.names)
        probabilities: list[list[float]] = [[]] * len(ids)
        for name, members in rows.items():
            head, file = self.tasks[name].head, self.tasks[name].file
            assert head is not None
            of_name = head.probabilities(
                found[members], file.temperature, multilabel=file.multilabel
            )
            for row, of_row in zip(members, of_name.tolist(), strict=True):
                probabilities[row] = of_row
        return probabilities

    def by_ranking(self, base: BaseModel) -> list[list[float]]:
        """The probabilities of the choices, averaged over the templates, `[texts][classes]`."""
        places = {name: place for place, name in enumerate(self.tasks)}
        # Scoring catches the input of the output layer, for one thread at a time.
        with base.lock:
            prompts = self._prompts()
            place_of = torch.tensor(
                [places[n] for n, some in zip(self.names, prompts, strict=True) for _ in some]
            )
            scores = choice_scores(
                base,
                [prompt for some in prompts for prompt in some],
                routing=lambda examples: self._routed(place_of[examples.cpu()]),
            )
        probabilities = []
        of_texts = torch.split(scores, [*map(len, prompts)])
        for name, some in zip(self.names, of_texts, strict=True):
            file = self.tasks[name].file
            of_choices = some[:, : len(file.labels)].double() / file.temperature
            probabilities.append(of_choices.softmax(-1).mean(0).tolist())
        return probabilities

    def _prompts(self) -> list[list[EncodedExample]]:
        """Each text in each template of its task, `[texts][templates]`."""
        prompts, cut = [], 0
        for name, example in zip(self.names, self.examples, strict=True):
            encoder, templates = self.tasks[name].encoder, self.tasks[name].templates
            assert encoder is not None
            encoder.truncated = 0
            prompts.append([encoder.encode(example, template) for template in templates])
            cut += encoder.truncated
        warn_of_cut_texts(cut, sum(map(len, prompts)))
        return prompts

    def _routed(self, index: Tensor) -> AbstractContextManager[None]:
        """Rows, or tokens, have the adapters of these tasks."""
        return self.bank.model.routes.entered_with(self.values, index)
