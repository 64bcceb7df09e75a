"""In-context learning, T-Few's rival: labelled examples stand in the prompt, nothing is trained.

The demonstrations are the same for every text. A decoder-only model computes them once: their keys
and values are cached, and the texts of a batch follow in one row, each seeing the demonstrations
and itself. Where a model cannot take that (`caches_prefix` tries it out), and with an
encoder-decoder, whose encoder lets the demonstrations see the text, whole prompts are computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, zip_longest
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..base.loading import EMBEDDED_MODEL, BaseModel
from ..classify.ranking import RankingClassifier
from ..errors import IA3Error, InvalidTypeError, did_you_mean
from ..tfew.prompts.encoding import EncodedExample, Encoder, context_length, warn_of_cut_texts
from ..tfew.prompts.labels import Label, Text
from ..tfew.prompts.templates import Template
from ..tfew.scoring.choices import choice_scores, longest_sequence, longest_shared
from ..tfew.scoring.prefix import Prefix, cached_prefix, caches_prefix, choice_scores_after

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

Ensemble = Literal["none", "orderings", "one-shot"]
ENSEMBLES: tuple[Ensemble, ...] = ("none", "orderings", "one-shot")

# Separates a demonstration from the text after it.
BREAK = "\n\n"
# In calibration, this stands for a text without content.
CONTENT_FREE = "N/A"
# Prompts with demonstrations are long, so only this many are held as token ids at a time.
ENCODED_AT_ONCE = 256


class InContextClassifier(RankingClassifier):
    """Text classification by demonstrations in the prompt, for comparison with `FewShotClassifier`.

    Each prompt is preceded by labelled examples: the same template, filled in, with its answer.
    `fit` trains nothing: it draws the order of the demonstrations and checks that they fit. Their
    keys and values are computed in the first prediction and cached for later ones; if the model's
    weights change, or the adapter on it, fit again.

    Args:
        model, template, choices, device, dtype, chat, tokenizer: as in `FewShotClassifier`; with
            `chat` the demonstrations are within the tokenizer's chat template too.
        ensemble: `"none"`: one prompt holds all demonstrations. `"orderings"`: several do, each in
            an order of its own. `"one-shot"`: every demonstration has a prompt of its own, as in
            the paper's appendix F for T5+LM; it suits encoder-decoder models, whose context is
            short. Probabilities are averaged.
        orderings: how many, with that ensemble.
        calibrate: divide the probabilities by those of a text without content, "N/A", in the same
            prompt (Zhao et al. 2021, arXiv 2102.09690). Of a mapping's values the strings become
            that; the others stay those of the first example.
        leave_out: leave out demonstrations that do not fit the model's context, of all labels
            alike, instead of refusing them. A text may take half of the context, and is cut where
            the demonstrations leave it less than it needs.
        seed: of the order of the demonstrations, and of those that are left out.

    Attributes:
        classes_, choices_, templates_, fields_: as in `FewShotClassifier`.
        demonstrations_: what precedes the prompts: a text for each member of the ensemble, for each
            template, `[templates][members]`.
        demonstration_tokens_: the number of tokens of each of these texts.
        examples_used_: how many of the examples are demonstrations; all but with `leave_out`.
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
        leave_out: bool = False,
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
        self.leave_out = leave_out
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.chat = chat
        self.tokenizer = tokenizer

    def fit(self, X: Sequence[Text], y: ArrayLike) -> InContextClassifier:
        """Take labelled texts as demonstrations.

        Args:
            X: strings, or mappings from field names to values, `[examples]`.
            y: strings, integers or booleans, `[examples]`.

        Raises:
            InvalidTypeError: a setting, a text or a label is of another type.
            StateError: there is no such device.
            IA3Error: the data, a template or the choices are unusable, or the demonstrations and
                the longest of the texts exceed the model's context; the message says how many fit.
                With `leave_out` only where none does.
        """
        check_ensemble(self.ensemble)
        seed: Any = self.seed
        if not isinstance(seed, Integral):
            kind = type(seed).__name__
            raise InvalidTypeError(f"seed is {seed!r} ({kind}), expected a whole number")
        if self.orderings < 1:
            raise IA3Error(f"orderings is {self.orderings}, expected at least 1")
        data, prompts = self._read_task(X, y)
        encoder = Encoder(self.base, prompts.choices, chat=self.chat)
        words = dict(zip(data.classes, prompts.choices, strict=True))
        answers = [f" {words[label]}{BREAK}" for label in data.labels]
        shots = list(zip(data.examples, answers, strict=True))
        written = [[t.render(e, prompts.choices) + a for e, a in shots] for t in prompts.templates]
        longest = [
            longest_input(self.base, [encoder.encode(e, template) for e in data.examples])
            for template in prompts.templates
        ]
        chosen: Sequence[int] = range(len(data.examples))
        if self.leave_out:
            # A longer text is cut, so that one very long text still leaves room for demonstrations.
            longest = [min(text, context_length(self.base) // 2) for text in longest]
            # If none fits, the check below raises an error about all of them.
            chosen = self._fitting(data.labels, written, longest) or chosen
        groups = self._groups(chosen)
        demonstrations = [_joined(of_template, groups) for of_template in written]
        tokens = list(map(self._check_fit, demonstrations, written, longest))
        self._keep_task(data, prompts)
        self.demonstrations_ = demonstrations
        self.demonstration_tokens_ = tokens
        self.examples_used_ = len(chosen)
        self.settings_ = {"chat": self.chat, "calibrate": self.calibrate}
        self._content_free = {
            name: CONTENT_FREE if isinstance(value, str) else value
            for name, value in data.examples[0].items()
        }
        self._prefixes: dict[tuple[str, str], Prefix] = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The keys and values belong to the model, which is not saved either.
        state = super().__getstate__()
        return {**state, "_prefixes": {}} if "_prefixes" in state else state

    def _groups(self, chosen: Sequence[int]) -> list[list[int]]:
        """The demonstrations of each member of the ensemble."""
        if self.ensemble == "one-shot":
            return [[i] for i in chosen]
        draw = random.Random(int(self.seed))  # it may be numpy's
        members = self.orderings if self.ensemble == "orderings" else 1
        return [draw.sample(chosen, len(chosen)) for _ in range(members)]

    def _fitting(
        self, labels: Sequence[Label], written: Sequence[Sequence[str]], longest: Sequence[int]
    ) -> list[int]:
        """As many of the demonstrations as fit, `written` and `longest` for each template."""
        context = context_length(self.base)

        def fit(chosen: Sequence[int]) -> bool:
            members = self._groups(chosen)
            return all(
                max(token_counts(self.base, _joined(of_template, members))) <= context - text
                for of_template, text in zip(written, longest, strict=True)
            )

        # One example of each label, drawn, then another of each.
        draw = random.Random(self.seed)
        groups = by_label(labels).values()
        for indices in groups:
            draw.shuffle(indices)
        order = [i for turn in zip_longest(*groups) for i in turn if i is not None]
        if self.ensemble == "one-shot":
            return sorted(i for i in order if fit([i]))
        chosen = fitting(self.base, written, [context - text for text in longest], order)
        # Joined in the drawn order, they may have a few tokens more.
        while chosen and not fit(sorted(chosen)):
            chosen.pop()
        return sorted(chosen)

    def _check_fit(self, members: Sequence[str], written: Sequence[str], longest: int) -> list[int]:
        """The number of tokens of each member's demonstrations; an error where one is too long."""
        context = context_length(self.base)
        room = context - longest
        counts = token_counts(self.base, members)
        if max(counts) > room:
            # Any selection of this many fits.
            sums = accumulate(sorted(token_counts(self.base, written), reverse=True))
            fitting = sum(total <= room for total in sums)
            advice = "give so many, or shorter ones" if fitting else "give shorter ones"
            if self.ensemble != "one-shot" and fitting:
                alone = "ensemble='one-shot': each has a prompt of its own"
                advice += f", or use leave_out=True, or {alone}"
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
                scores = self._scores(encoder, member, examples, progress)
                if self.settings_["calibrate"]:
                    # Before the softmax, so that no probability is divided by a tiny one.
                    scores -= self._scores(encoder, member, [self._content_free])
                total += scores.softmax(-1)
        warn_of_cut_texts(encoder.truncated, len(examples) * len(members))
        return total / len(members)

    def _scores(
        self,
        encoder: Encoder,
        member: WithDemonstrations,
        examples: Sequence[Mapping[str, Any]],
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """`[examples, choices]`, float64: the mean log-probabilities of one member."""
        base, parts = self.base, []
        for start in range(0, len(examples), ENCODED_AT_ONCE):
            encoded = [encoder.encode(e, member) for e in examples[start : start + ENCODED_AT_ONCE]]
            near = min(map(longest_sequence, encoded)) <= longest_shared(base)
            if not (near and caches_prefix(base)):
                parts.append(choice_scores(base, encoded, progress=progress))
                continue
            key = (member.source, member.demonstrations)
            prefix = self._prefixes.get(key)
            if prefix is None or not prefix.belongs_to(base):
                # The common beginning is found by comparing the other prompts with the first.
                prefix = self._prefixes[key] = cached_prefix(base, encoded[0].prompt)
            parts.append(choice_scores_after(base, prefix, encoded, progress=progress))
        return torch.cat(parts).double()


class WithDemonstrations(Template):
    """A template whose prompts begin with the same text."""

    def __init__(self, source: str, demonstrations: str) -> None:
        super().__init__(source)
        self.demonstrations = demonstrations

    def render(self, example: Mapping[str, Any], answer_choices: Sequence[str]) -> str:
        """The demonstrations and the prompt for one example."""
        return self.demonstrations + super().render(example, answer_choices)


def fitting(
    base: BaseModel, written: Sequence[Sequence[str]], room: Sequence[int], order: Sequence[int]
) -> list[int]:
    """As many demonstrations as fit, in the order given; one that does not is passed over.

    `written` is `[templates][demonstrations]`, `room` the tokens for all of them, `[templates]`.
    """
    alone = [token_counts(base, of_template) for of_template in written]
    chosen: list[int] = []
    texts, tokens = [""] * len(written), [0] * len(written)
    for i in order:
        # The sum of tokens rules most out without joining and counting the texts again.
        if any(t + a[i] > r for t, a, r in zip(tokens, alone, room, strict=True)):
            continue
        with_next = [text + w[i] for text, w in zip(texts, written, strict=True)]
        # Counted together, because tokens may run across the break.
        counts = token_counts(base, with_next)
        if all(count <= r for count, r in zip(counts, room, strict=True)):
            chosen.append(i)
            texts, tokens = with_next, counts
    return chosen


def longest_input(base: BaseModel, examples: Sequence[EncodedExample]) -> int:
    """The tokens of the longest prompt, with its longest answer where the model reads that."""
    # An encoder's input has no answer in it.
    return max(len(e.prompt) if base.is_encoder_decoder else longest_sequence(e) for e in examples)


def _joined(written: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    return ["".join(written[i] for i in group) for group in groups]


def check_ensemble(ensemble: str) -> None:
    """Raise `IA3Error` for an unknown ensemble."""
    if ensemble not in ENSEMBLES:
        hint = did_you_mean(ensemble, ENSEMBLES)
        raise IA3Error(f"ensemble is {ensemble!r}, expected one of {', '.join(ENSEMBLES)}{hint}")


def by_label(labels: Sequence[Label]) -> dict[Label, list[int]]:
    """The indices of each label's examples, in the order of the data."""
    indices: dict[Label, list[int]] = {}
    for i, label in enumerate(labels):
        indices.setdefault(label, []).append(i)
    return indices


def token_counts(base: BaseModel, texts: Sequence[str]) -> list[int]:
    """The number of each text's tokens, without special ones."""
    ids = base.tokenizer(list(texts), add_special_tokens=False, truncation=False)["input_ids"]
    return [len(of_text) for of_text in ids]
