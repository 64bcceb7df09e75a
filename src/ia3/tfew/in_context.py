"""In-context learning, T-Few's rival: labelled examples stand in the prompt, nothing is trained.

The demonstrations are the same for every text. A decoder-only model computes them once: their keys
and values are kept, and the texts of a batch follow them in one row, each seeing the demonstrations
and itself. Where a model cannot take that (`caches_prefix` tries it out), and with an
encoder-decoder, whose encoder lets the demonstrations see the text, whole prompts are computed.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..base_model import EMBEDDED_MODEL, BaseModel
from ..errors import IA3Error
from ..ranking import LabelledTexts, RankingClassifier, Text, warn_of_cut_texts
from .encoding import EncodedExample, Encoder, _context_length
from .losses import TokenScores
from .scoring import (
    PROBE_TOLERANCE,
    _common_prefix,
    _compute_dtype,
    _expanded_scores,
    _longest,
    _longest_shared,
    _output_layer,
    _project_only,
    _scores,
    _Targets,
    _tree_mask,
    choice_scores,
)
from .templates import Template

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

Ensemble = Literal["none", "orderings", "one-shot"]
ENSEMBLES: tuple[Ensemble, ...] = ("none", "orderings", "one-shot")

# Between a demonstration and what follows it.
BREAK = "\n\n"
# What stands for a text without content, in calibration.
CONTENT_FREE = "N/A"
# So many tokens follow a cached prefix at once. More would spend attention on what the mask hides.
ROW = 512
# So many prompts are held as token ids at a time: with demonstrations they are long.
ENCODED_AT_ONCE = 256

_verdicts: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class InContextClassifier(RankingClassifier):
    """Text classification by demonstrations in the prompt, for comparison with `FewShotClassifier`.

    Each prompt is preceded by labelled examples: the same template, filled in, with its answer.
    `fit` trains nothing: it draws the order of the demonstrations and checks that they fit. Their
    keys and values are computed in the first prediction and kept for later ones; if the model's
    weights change, or the adapter on it, fit again.

    Args:
        model: `"smollm2-135m-instruct"`, a folder, a hub id, or a loaded transformers model.
        template: a Jinja template over the fields' names; several are averaged. Strings have the
            one field `text`.
        choices: label -> the words that are ranked for it, as in `FewShotClassifier`.
        ensemble: `"none"`: one prompt holds all demonstrations. `"orderings"`: several do, each in
            an order of its own. `"one-shot"`: every demonstration has a prompt of its own, as in
            the paper's appendix F for T5+LM; it suits encoder-decoder models, whose context is
            short. Probabilities are averaged.
        orderings: how many, with that ensemble.
        calibrate: divide the probabilities by those of a text without content, "N/A", in the same
            prompt (Zhao et al. 2021, arXiv 2102.09690). Of a mapping's values the strings become
            that; the others stay those of the first example.
        seed: of the order of the demonstrations.
        device: `"auto"` or torch's name of one; a loaded model stays where it is.
        dtype: `"auto"` or torch's name of one; a loaded model keeps its own.
        chat: put each prompt, demonstrations included, into the tokenizer's chat template.
        tokenizer: for a loaded model whose config does not say where it came from.

    Attributes:
        classes_: the labels, `[classes]`, sorted.
        choices_: the words ranked for each of them.
        templates_: the templates' sources.
        fields_: the names of the examples' fields.
        demonstrations_: what precedes the prompts: a text for each member of the ensemble, for each
            template, `[templates][members]`.
        demonstration_tokens_: the number of tokens of each of these texts.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = EMBEDDED_MODEL,
        template: str | Sequence[str] | None = None,
        choices: Mapping[Any, str] | None = None,
        *,
        ensemble: Ensemble = "none",
        orderings: int = 5,
        calibrate: bool = False,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        chat: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model = model
        self.template = template
        self.choices = choices
        self.ensemble = ensemble
        self.orderings = orderings
        self.calibrate = calibrate
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.chat = chat
        self.tokenizer = tokenizer

    def fit(self, texts: Sequence[Text], labels: ArrayLike) -> InContextClassifier:
        """Take labelled texts as demonstrations.

        Args:
            texts: strings, or mappings from field names to values, `[examples]`.
            labels: strings, integers or booleans, `[examples]`.

        Raises:
            IA3Error: the data, a template or the choices are unusable, or the demonstrations and
                the longest of the texts exceed the model's context; the message says how many fit.
        """
        if self.ensemble not in ENSEMBLES:
            raise IA3Error(f"ensemble is {self.ensemble!r}, expected one of {list(ENSEMBLES)}")
        if self.orderings < 1:
            raise IA3Error(f"orderings is {self.orderings}, expected at least 1")
        task = self._read_task(texts, labels)
        groups = self._groups(len(task.examples))
        encoder = Encoder(self.base, task.choices, chat=self.chat)
        demonstrations, tokens = [], []
        for template in task.templates:
            written = _written(task, template)
            members = ["".join(written[i] for i in group) for group in groups]
            tokens.append(self._check_fit(encoder, task, template, members, written))
            demonstrations.append(members)
        self._keep_task(
            task.classes, task.choices, [t.source for t in task.templates], list(task.examples[0])
        )
        self.demonstrations_ = demonstrations
        self.demonstration_tokens_ = tokens
        self.settings_ = {"chat": self.chat, "calibrate": self.calibrate}
        self._content_free = {
            name: CONTENT_FREE if isinstance(value, str) else value
            for name, value in task.examples[0].items()
        }
        self._prefixes: dict[tuple[str, str], Prefix] = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The keys and values belong to the model, which is not saved either.
        state = super().__getstate__()
        return {**state, "_prefixes": {}} if "_prefixes" in state else state

    def _groups(self, count: int) -> list[list[int]]:
        """Which demonstrations precede a prompt, in which order: one list a member."""
        if self.ensemble == "one-shot":
            return [[i] for i in range(count)]
        draw = random.Random(self.seed)
        members = self.orderings if self.ensemble == "orderings" else 1
        return [draw.sample(range(count), count) for _ in range(members)]

    def _check_fit(
        self,
        encoder: Encoder,
        task: LabelledTexts,
        template: Template,
        members: Sequence[str],
        written: Sequence[str],
    ) -> list[int]:
        """The number of tokens of each member's demonstrations; an error where one is too long."""
        asked = [encoder.encode(example, template) for example in task.examples]
        # An encoder's input has no answer in it.
        longest = max(len(e.prompt) if self.base.is_encoder_decoder else _longest(e) for e in asked)
        context = _context_length(self.base)
        room = context - longest
        counts = _token_counts(self.base, members)
        if max(counts) > room:
            # So many fit whichever they are.
            sums = accumulate(sorted(_token_counts(self.base, written), reverse=True))
            fitting = sum(total <= room for total in sums)
            advice = "give so many, or shorter ones" if fitting else "give shorter ones"
            if self.ensemble != "one-shot" and fitting:
                advice += ", or use ensemble='one-shot', where each has a prompt of its own"
            raise IA3Error(
                f"the demonstrations have {max(counts)} tokens and the longest text with its "
                f"answer {longest}; the context of {self.base.name!r} has {context}: {fitting} "
                f"demonstrations fit; {advice}"
            )
        return counts

    def _probabilities(
        self, examples: list[Mapping[str, Any]], progress: Callable[[int], None] | None
    ) -> Tensor:
        base = self.base
        encoder = Encoder(base, self.choices_, chat=self.settings_["chat"])
        members = [
            WithDemonstrations(source, demonstrations)
            for source, of_template in zip(self.templates_, self.demonstrations_, strict=True)
            for demonstrations in of_template
        ]
        total = torch.zeros(len(examples), len(self.choices_), dtype=torch.float64)
        with base.lock:
            for member in members:
                scores = self._scores(base, encoder, member, examples, progress)
                if self.settings_["calibrate"]:
                    # Before the softmax, so that no probability is divided by a tiny one.
                    scores -= self._scores(base, encoder, member, [self._content_free], None)
                total += scores.softmax(-1)
        warn_of_cut_texts(encoder, len(examples) * len(members), stacklevel=4)
        return total / len(members)

    def _scores(
        self,
        base: BaseModel,
        encoder: Encoder,
        member: WithDemonstrations,
        examples: Sequence[Mapping[str, Any]],
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """`[examples, choices]`, float64: the mean log-probabilities of one member."""
        parts = []
        for start in range(0, len(examples), ENCODED_AT_ONCE):
            encoded = [encoder.encode(e, member) for e in examples[start : start + ENCODED_AT_ONCE]]
            if not caches_prefix(base):
                parts.append(choice_scores(base, encoded, progress=progress))
                continue
            key = (member.source, member.demonstrations)
            prefix = self._prefixes.get(key)
            if prefix is None or not prefix.belongs_to(base):
                # Whatever the others share with the first prompt is found by comparing them.
                prefix = self._prefixes[key] = cached_prefix(base, encoded[0].prompt)
            parts.append(choice_scores_after(base, prefix, encoded, progress=progress))
        return torch.cat(parts).double()


class WithDemonstrations(Template):
    """A template whose prompts begin with the same text.

    Args:
        source: of the prompts themselves.
        demonstrations: precedes each of them.
    """

    def __init__(self, source: str, demonstrations: str) -> None:
        super().__init__(source)
        self.demonstrations = demonstrations

    def render(self, example: Mapping[str, Any], answer_choices: Sequence[str]) -> str:
        """The prompt for one example, after the demonstrations.

        Raises:
            IA3Error: as in `Template`.
        """
        return self.demonstrations + super().render(example, answer_choices)


def _written(task: LabelledTexts, template: Template) -> list[str]:
    """Every example as a demonstration: its prompt and its answer."""
    words = dict(zip(task.classes, task.choices, strict=True))
    return [
        f"{template.render(example, task.choices)} {words[label]}{BREAK}"
        for example, label in zip(task.examples, task.labels, strict=True)
    ]


def _token_counts(base: BaseModel, texts: Sequence[str]) -> list[int]:
    ids = base.tokenizer(list(texts), add_special_tokens=False, truncation=False)["input_ids"]
    return [len(of_text) for of_text in ids]


# -- scores after a cached prefix ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prefix:
    """What prompts begin with, as a model has computed it.

    Attributes:
        ids: its tokens.
        layers: each layer's keys and values, `[1, heads, len(ids), head_dim]`.
        model: that has computed them.
    """

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]
    model: nn.Module

    def belongs_to(self, base: BaseModel) -> bool:
        """Whether the keys and values are this model's, and on the device that it is on now."""
        parameter = _output_layer(base.model).get_parameter("weight")
        keys = self.layers[-1][0]
        return self.model is base.model and keys.device == parameter.device

    def shared_with(self, examples: Sequence[EncodedExample]) -> int:
        """The number of tokens that all prompts begin with, less the last, which predicts."""
        common = zip(self.ids, _common_prefix(examples), strict=False)
        return sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], common))


def cached_prefix(base: BaseModel, ids: Sequence[int]) -> Prefix:
    """Compute the keys and values of the tokens that prompts begin with, without gradients."""
    from transformers import DynamicCache

    # Not the cache that the model would make: a sliding window's forgets what lies behind it.
    cache = DynamicCache()
    last = torch.tensor([len(ids) - 1], device=base.device)
    with _evaluating(base.model), _project_only(base.model, last):
        base.model(
            input_ids=torch.tensor([list(ids)], device=base.device),
            past_key_values=cache,
            use_cache=True,
        )
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Prefix(tuple(ids), layers, base.model)


def choice_scores_after(
    base: BaseModel,
    prefix: Prefix,
    examples: Sequence[EncodedExample],
    *,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`choice_scores`, with what the prompts share with the prefix not computed again.

    Args:
        base: a model that `caches_prefix`, as it was when the prefix was computed.
        prefix: of most of the prompts, in whole or in part.
        examples: all with the same number of choices.
        progress: called with the number of examples done since the last call.

    Returns:
        `[examples, choices]`, float32, on the CPU.
    """
    results = torch.empty(len(examples), len(examples[0].choices))
    limit = _longest_shared(base)
    near = [i for i, e in enumerate(examples) if _longest(e) <= limit and prefix.shared_with([e])]
    far = sorted({*range(len(examples))} - {*near})
    if far:
        results[far] = choice_scores(base, [examples[i] for i in far], progress=progress)
    with _evaluating(base.model):
        for batch in _rows(prefix, examples, near):
            scores = _scores_after(base, prefix, [examples[i] for i in batch])
            results[batch] = scores.mean_log_probs().float().cpu()
            if progress is not None:
                progress(len(batch))
    return results


def caches_prefix(base: BaseModel) -> bool:
    """Whether the model computes the same scores after a cached prefix as with whole prompts.

    Tried out once on every model that shares prompts: against whole prompts, and, for scale,
    against the keys and values of another prefix.
    """
    if _longest_shared(base) == 0:
        return False
    if base.model not in _verdicts:
        verdict = _probe(base)
        if verdict is None:
            return False
        _verdicts[base.model] = verdict
    return _verdicts[base.model]


def _probe(base: BaseModel) -> bool | None:
    """The verdict, or `None` where the model's state allows none: it is tried again next time."""
    vocabulary = int(_output_layer(base.model).get_parameter("weight").shape[0])
    ids = [(13 + 7919 * i) % vocabulary for i in range(20)]
    start, other = tuple(ids[:4]), tuple(ids[4:8])
    examples = [
        EncodedExample((*start, *ids[8:10]), (tuple(ids[10:12]), (ids[12],))),
        EncodedExample((*start, ids[13]), ((ids[14],), tuple(ids[15:17]))),
    ]
    with _evaluating(base.model):
        whole = _expanded_scores(base, examples).log_probs
        try:
            prefix = cached_prefix(base, start)
            after = _scores_after(base, prefix, examples).log_probs
            wrong = replace(prefix, layers=cached_prefix(base, other).layers)
            astray = _scores_after(base, wrong, examples).log_probs
        except Exception:
            # As with the mask: whatever a model raises that keeps no plain keys and values.
            return False
    error, scale = (after - whole).abs().max(), (astray - whole).abs().max()
    if not torch.isfinite(error + scale) or scale == 0:
        return None
    return bool(error <= PROBE_TOLERANCE * scale)


def _scores_after(
    base: BaseModel, prefix: Prefix, examples: Sequence[EncodedExample]
) -> TokenScores:
    """All examples in one row behind the prefix; each sees it, itself and none of the others."""
    from transformers import DynamicCache

    shared = prefix.shared_with(examples)
    ids: list[int] = []
    positions: list[int] = []
    owner: list[int] = []
    branch: list[int] = []
    targets = _Targets()
    for i, example in enumerate(examples):
        end = len(example.prompt)
        ids += example.prompt[shared:]
        positions += range(shared, end)
        branch += [0] * (end - shared)
        first = targets.project(len(ids) - 1)
        for c, choice in enumerate(example.choices):
            targets.score(first, choice[0], (i, c, 0))
            for t, (token, following) in enumerate(pairwise(choice)):
                ids.append(token)
                positions.append(end + t)
                branch.append(c + 1)
                targets.score(targets.project(len(ids) - 1), following, (i, c, t + 1))
        owner += [i] * (len(ids) - len(owner))
    device = base.device
    mask = _tree_mask(
        torch.tensor([owner], device=device),
        torch.tensor([branch], device=device),
        _compute_dtype(base.model),
        hide_other_choices=True,
    )
    # A cache of its own: the model appends to it.
    cache = DynamicCache()
    for index, (keys, values) in enumerate(prefix.layers):
        cache.update(keys[:, :, :shared], values[:, :, :shared], index)
    return _scores(
        base,
        examples,
        targets,
        input_ids=torch.tensor([ids], device=device),
        attention_mask=F.pad(mask, (shared, 0)),
        position_ids=torch.tensor([positions], device=device),
        past_key_values=cache,
        use_cache=True,
    )


def _rows(
    prefix: Prefix, examples: Sequence[EncodedExample], indices: Sequence[int]
) -> Iterator[list[int]]:
    """The indices in groups whose tokens behind the prefix are at most `ROW`, or of one."""
    row: list[int] = []
    length = 0
    for i in indices:
        example = examples[i]
        new = len(example.prompt) - prefix.shared_with([example]) + sum(map(len, example.choices))
        if row and length + new > ROW:
            yield row
            row, length = [], 0
        row.append(i)
        length += new
    if row:
        yield row


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context a model has no dropout, and no gradients are kept."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
