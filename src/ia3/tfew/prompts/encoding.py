"""From an example's fields to token ids: the prompt's and every answer choice's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...arguments import flag, instance, listed, whole
from ...base.loading import BaseModel
from ...errors import IA3Error, counted, warn_caller
from .templates import Template

# A choice is tokenised after so many last characters of the prompt, which decide how.
_TAIL_CHARACTERS = 12


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a prompt and of its answer choices, ready to be scored."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TrainingExample:
    """One example, encoded with every template, and the index of its right choice.

    Its loss is multiplied by the `weight`.
    """

    encoded: tuple[EncodedExample, ...]
    label: int
    weight: float = 1.0


def _words(choices: Sequence[str]) -> list[str]:
    expected = "a list of words"
    words = listed("answer_choices", choices, expected)
    return [instance("an answer choice", word, str, "words") for word in words]


class Encoder:
    """Renders and tokenises examples for one model.

    Args:
        base: the model and its tokenizer.
        answer_choices: the words to rank, unless an example brings its own.
        chat: put the prompt into the tokenizer's chat template, as the user's message.
        max_prompt_tokens: a longer prompt is cut as one is that exceeds the model's context.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: `max_prompt_tokens` is below 1, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        base: BaseModel,
        answer_choices: Sequence[str] = (),
        *,
        chat: bool,
        max_prompt_tokens: int | None = None,
    ) -> None:
        instance("base", base, BaseModel, "a BaseModel, as load_base_model gives it")
        chat = flag("chat", chat)
        if chat and not base.tokenizer.chat_template:
            raise IA3Error(f"the tokenizer of {base.name!r} has no chat template: use chat=False")
        if max_prompt_tokens is not None:
            whole("max_prompt_tokens", max_prompt_tokens, 1, expected="at least 1")
        self.answer_choices = _words(answer_choices)
        self.truncated = 0
        self.base = base
        self._tokenizer = base.tokenizer
        self._chat = chat
        self._encoder_decoder = base.is_encoder_decoder
        self._max_length = context_length(base)
        self._max_prompt_tokens = max_prompt_tokens
        # The same choices follow the same end of a prompt again and again.
        self._choice_ids = lru_cache(maxsize=1024)(self._choice_ids_after)

    def encode(
        self,
        example: Mapping[str, Any],
        template: Template,
        answer_choices: Sequence[str] | None = None,
    ) -> EncodedExample:
        """Token ids of one example.

        A prompt longer than the model's context, or than `max_prompt_tokens`, is shortened by
        cutting the end of its longest field; `truncated` counts the examples that were cut. The
        choices, by default the encoder's, are never cut.

        Raises:
            InvalidTypeError: an argument is of another type.
            TemplateError: the template does not render.
            IA3Error: it does not fit even with empty fields, there is no
                choice to rank, two choices are the same tokens, or one has none.
        """
        instance("template", template, Template, "a Template")
        instance("example", example, Mapping, "a mapping from field names to values")
        words = tuple(self.answer_choices if answer_choices is None else _words(answer_choices))
        if not words:
            raise IA3Error(f"template {template.name!r} has no answer choices to rank")
        text = self._prompt_text(example, template, words)
        prompt = self._prompt_ids(text)
        if not prompt:
            raise IA3Error(f"the prompt {text!r} has no token: there is nothing to answer")
        choices = self._choice_ids(text[-_TAIL_CHARACTERS:], words)
        room = self._max_length
        if not self._encoder_decoder:
            room -= max(len(choice) for choice in choices)
        if self._max_prompt_tokens is not None:
            room = min(room, self._max_prompt_tokens)
        if len(prompt) > room:
            self.truncated += 1
            prompt = self._truncated_prompt(dict(example), template, words, room)
        return EncodedExample(prompt, choices)

    def _prompt_text(
        self, example: Mapping[str, Any], template: Template, words: tuple[str, ...]
    ) -> str:
        text = template.render(example, words)
        if not text.strip():
            raise IA3Error(f"template {template.name!r} renders nothing for {dict(example)!r}")
        if self._chat:
            messages = [{"role": "user", "content": text}]
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        return text

    def _prompt_ids(self, text: str) -> tuple[int, ...]:
        # A chat template writes its special tokens itself.
        ids = self._tokenizer(text, add_special_tokens=not self._chat)["input_ids"]
        writes_end = not (self._encoder_decoder or self._chat)
        if writes_end and ids and ids[-1] == self._tokenizer.eos_token_id:
            ids = ids[:-1]
        return tuple(ids)

    def _choice_ids_after(self, tail: str, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Token ids of the choices, with the separating space, behind the end of a prompt."""
        if self._encoder_decoder:
            ids = [tuple(self._tokenizer(word)["input_ids"]) for word in words]
        else:
            separator = "" if tail[-1].isspace() else " "
            ids = [self._ids_after(tail, separator + word) for word in words]
        for index, choice in enumerate(ids):
            if not choice:
                raise IA3Error(f"choice {words[index]!r} has no token")
            if choice in ids[:index]:
                both = f"{words[ids.index(choice)]!r} and {words[index]!r}"
                raise IA3Error(f"choices {both} are the same tokens: give one other words")
        return tuple(ids)

    def _ids_after(self, before: str, text: str) -> tuple[int, ...]:
        first = self._tokenizer(before, add_special_tokens=False)["input_ids"]
        both = self._tokenizer(before + text, add_special_tokens=False)["input_ids"]
        if both[: len(first)] == first:
            return tuple(both[len(first) :])
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _truncated_prompt(
        self, example: dict[str, Any], template: Template, words: tuple[str, ...], room: int
    ) -> tuple[int, ...]:
        while True:
            prompt = self._prompt_ids(self._prompt_text(example, template, words))
            if len(prompt) <= room:
                return prompt
            texts = {
                name: value
                for name, value in example.items()
                if isinstance(value, str) and value and template.reads(name)
            }
            if not texts:
                by_setting = room == self._max_prompt_tokens
                limit = "max_prompt_tokens is" if by_setting else "the model's context has room for"
                needs = f"needs {len(prompt)} tokens without any text"
                raise IA3Error(f"template {template.name!r} {needs}; {limit} {room}")
            longest = max(texts, key=lambda name: len(texts[name]))
            example[longest] = self._without_last_tokens(texts[longest], len(prompt) - room)

    def _without_last_tokens(self, text: str, count: int) -> str:
        """The text's beginning, shorter by so many tokens, and by one character at least."""
        if not self._tokenizer.is_fast:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            shorter: str = self._tokenizer.decode(ids[: max(0, len(ids) - count)])
            return shorter if len(shorter) < len(text) else text[: len(text) // 2]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        # The place where the first token to cut begins: a character of several tokens goes whole.
        end = offsets[-count][0] if count < len(offsets) else 0
        return text[: min(end, len(text) - 1)]


def context_length(base: BaseModel) -> int:
    """How many tokens the model takes: by its positions, else by its tokenizer."""
    config = base.model.config
    # T5's relative positions have no end, whatever its config says.
    if getattr(config, "model_type", "") not in ("t5", "mt5"):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return int(min(base.tokenizer.model_max_length, 10**9))


def warn_of_cut_texts(cut: int, prompts: int) -> None:
    """One warning for all texts that were cut (`Encoder.truncated`), if there are any."""
    if cut:
        are = "is" if cut == 1 else "are"
        which = f"{cut} of {counted(prompts, 'prompt')} {are} longer than the model's context"
        warn_caller(f"{which}: {'its text was' if cut == 1 else 'their texts were'} cut at the end")
