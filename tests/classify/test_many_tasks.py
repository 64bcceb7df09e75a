"""Many tasks trained in the same batches: each one's vectors are those it gets alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tfew import VOCABULARY, random_base, state_bits, tiny_llama, tiny_t5, word_tokenizer
from torch import Tensor
from transformers import (
    BloomConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    SwitchTransformersConfig,
)

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.base.loading import BaseModel
from ia3.classify.many_tasks import (
    PADDING,
    Ended,
    TaskToTrain,
    _passes,
    _Piece,
    batches,
    train_many,
)
from ia3.core.inventory import sites
from ia3.tfew import TFewConfig, TFewTrainer, TrainingExample, TrainingStep, train
from ia3.tfew import training_arguments as make_arguments
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.training.trainer import DivergedError

BLOOM = BloomConfig(
    vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2
)
# Prompts longer than the window take rows of their own, the others share one.
WINDOW = MistralConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    sliding_window=14,
)
EXPERTS = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)
# Its experts are modules in a list, each of which sees the tokens that are routed to it.
LISTED_EXPERTS = SwitchTransformersConfig(
    vocab_size=VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_sparse_encoder_layers=1,
    num_decoder_layers=2,
    num_sparse_decoder_layers=1,
    num_heads=4,
    num_experts=4,
    decoder_start_token_id=0,
)
RECIPE = TFewConfig(steps=20, batch_size=4, learning_rate=1e-2)


def llama() -> BaseModel:
    return BaseModel(tiny_llama(), word_tokenizer(), "llama")


def t5() -> BaseModel:
    return BaseModel(tiny_t5(), word_tokenizer(), "t5")


MODELS: dict[str, Callable[[], BaseModel]] = {
    "llama": llama,
    "bloom": lambda: random_base(BLOOM),
    "window": lambda: random_base(WINDOW),
    "t5": t5,
}


def examples(
    seed: int, count: int, choices: int = 2, prompt: tuple[int, int] = (3, 19), shared: int = 0
) -> list[TrainingExample]:
    """Of two templates each, whose prompts begin alike.

    Choices have two tokens at least: a decoder whose rows have one attends to nothing else, and its
    gradients there are rounding alone.
    """
    generator = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, VOCABULARY) for _ in range(length))

    begins = ids(shared)
    answers = tuple(ids(generator.randint(2, 3)) for _ in range(choices))
    return [
        TrainingExample(
            tuple(
                EncodedExample(begins + ids(generator.randint(*prompt)), answers) for _ in range(2)
            ),
            i % choices,
        )
        for i in range(count)
    ]


def unlike_tasks() -> dict[str, TaskToTrain]:
    """Of other data, numbers of examples and choices, steps, seeds, rates and batches."""
    return {
        "a": TaskToTrain(examples(1, 6), RECIPE, "default"),
        "b": TaskToTrain(
            examples(2, 9, choices=5, shared=7), replace(RECIPE, seed=7, steps=13), "default"
        ),
        "c": TaskToTrain(
            examples(3, 5, choices=3),
            replace(RECIPE, batch_size=2, learning_rate=3e-2, max_grad_norm=0.3, seed=3),
            "default",
        ),
        "d": TaskToTrain(examples(1, 6), replace(RECIPE, steps=2, unlikelihood=0.0), "default"),
    }


def adapted(base: BaseModel) -> IA3Model:
    return IA3Model(base.model, IA3Config(target_modules="all-linear"))


def alone(
    make_base: Callable[[], BaseModel], task: TaskToTrain
) -> tuple[dict[str, Tensor], list[TrainingStep]]:
    base = make_base()
    model = adapted(base)
    history = train(base, model, task.examples, task.config)
    return {name: v.detach().clone() for name, v in model.vectors("default").items()}, history


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all vectors."""
    assert found.keys() == expected.keys()
    a, b = (
        torch.cat([v[name].detach().flatten() for name in sorted(v)]) for v in (found, expected)
    )
    return float((a - b).norm() / b.norm())


def assert_as_alone(
    ended: Mapping[str, Ended], tasks: Mapping[str, TaskToTrain], kind: str = "llama"
) -> None:
    for name in ended:
        vectors, history = alone(MODELS[kind], tasks[name])
        assert ended[name].error is None
        assert any((v != 1).any() for v in vectors.values())
        assert difference(ended[name].vectors, vectors) < 1e-5
        assert [s.step for s in ended[name].history] == [s.step for s in history]
        for found, expected in zip(ended[name].history, history, strict=True):
            assert found.loss == pytest.approx(expected.loss, rel=1e-4)
            assert found.unlikelihood == pytest.approx(expected.unlikelihood, abs=1e-5)


# -- as alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_each_task_ends_as_it_would_alone(kind: str) -> None:
    base = MODELS[kind]()
    tasks = unlike_tasks()
    ended = train_many(base, adapted(base), tasks)
    assert list(ended) == ["d", "b", "a", "c"]
    assert_as_alone(ended, tasks, kind)


@pytest.mark.parametrize("kind", ["llama", "bloom", "t5"])
def test_small_passes_change_nothing(kind: str) -> None:
    # Less than one example of task b: its choices are computed in parts, and again for gradients.
    base = MODELS[kind]()
    tasks = {name: unlike_tasks()[name] for name in ("b", "c")}
    tasks = {name: replace(t, config=replace(t.config, steps=3)) for name, t in tasks.items()}
    ended = train_many(base, adapted(base), tasks, max_tokens=30)
    assert_as_alone(ended, tasks, kind)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_batches_are_the_trainers(count: int, tmp_path: object) -> None:
    seen: list[tuple[list[EncodedExample], list[int]]] = []

    class Watched(TFewTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            seen.append((inputs["examples"], inputs["labels"].tolist()))
            return super().training_step(model, inputs, num_items_in_batch)

    base = llama()
    config = replace(RECIPE, batch_size=3, steps=7, seed=11)
    arguments = make_arguments(base, config, str(tmp_path))
    Watched(base, adapted(base), examples(5, count), config, arguments).train()
    drawn = [batch for batch, _ in zip(batches(examples(5, count), config), range(7), strict=False)]
    assert [(batch.examples, batch.labels) for batch in drawn] == seen


# -- ends ------------------------------------------------------------------------------------------


def test_a_task_ends_when_it_is_told_to() -> None:
    base = llama()
    tasks = unlike_tasks()
    seen: list[tuple[str, int]] = []

    def on_step(name: str, step: TrainingStep) -> bool:
        seen.append((name, step.step))
        return name == "a" and step.step == 4

    ended = train_many(base, adapted(base), tasks, on_step=on_step)
    assert [name for name, _ in seen].count("a") == 4 == len(ended["a"].history)
    # Vectors after four steps of twenty, whose learning rate rises and falls with the twenty.
    stopped: dict[str, Tensor] = {}
    other = llama()
    model = adapted(other)

    def keep(step: TrainingStep) -> None:
        if step.step == 4:
            stopped.update({n: v.detach().clone() for n, v in model.vectors("default").items()})

    train(other, model, tasks["a"].examples, tasks["a"].config, keep)
    assert difference(ended["a"].vectors, stopped) < 1e-5
    del ended["a"]
    assert_as_alone(ended, tasks)


def test_a_task_that_diverges_does_so_alone() -> None:
    base = llama()
    tasks = unlike_tasks()
    tasks["c"] = replace(tasks["c"], config=replace(tasks["c"].config, learning_rate=1e30))
    before = state_bits(base.model)
    model = adapted(base)
    ended = train_many(base, model, tasks)
    error = ended["c"].error
    assert isinstance(error, DivergedError)
    with pytest.raises(DivergedError) as raised:
        alone(llama, tasks["c"])
    assert error.step == raised.value.step
    assert all(math.isfinite(step.loss) for step in ended["c"].history)
    del ended["c"]
    assert_as_alone(ended, tasks)
    model.unload()
    torch.testing.assert_close(state_bits(base.model), before, rtol=0, atol=0)


def test_rows_reach_their_own_vectors_only() -> None:
    # Two tasks of the same data end in the same vectors whatever a third one has.
    base = llama()
    a = unlike_tasks()["a"]
    ended = train_many(base, adapted(base), {"one": a, "other": unlike_tasks()["c"], "two": a})
    assert difference(ended["one"].vectors, ended["two"].vectors) < 1e-5
    assert difference(ended["one"].vectors, ended["other"].vectors) > 1e-3


# -- vectors to begin with -------------------------------------------------------------------------


def test_tasks_may_begin_with_vectors_at_other_sites() -> None:
    def two_adapters(base: BaseModel) -> IA3Model:
        model = adapted(base)
        config = IA3Config(
            target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
        model.add_adapter("few", config)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for vector in model.vectors("few").values():
                vector.normal_(1, 0.1)
        return model

    base = llama()
    a, b = (unlike_tasks()[name] for name in "ab")
    b = replace(b, adapter="few")
    ended = train_many(base, two_adapters(base), {"a": a, "b": b})
    assert_as_alone({"a": ended["a"]}, {"a": a})
    other = llama()
    model = two_adapters(other)
    model.set_adapter("few")
    train(other, model, b.examples, b.config)
    assert len(ended["b"].vectors) == 4
    assert difference(ended["b"].vectors, model.vectors("few")) < 1e-5


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (EXPERTS, IA3Config(paper_sites=True)),
        (LISTED_EXPERTS, IA3Config(target_modules=["wo"], feedforward_modules=["wo"])),
        (LISTED_EXPERTS, IA3Config(target_modules=["wi"], feedforward_modules=[])),
    ],
)
def test_vectors_within_experts_are_refused(kind: PreTrainedConfig, config: IA3Config) -> None:
    base = random_base(kind)
    model = IA3Model(base.model, config)
    with pytest.raises(IA3Error, match="within experts"):
        train_many(base, model, {"a": unlike_tasks()["a"]})


def test_values_that_stay_one_stay_one() -> None:
    base = llama()
    model = adapted(base)
    for _, _, site in sites(model):
        vector = site["default"].detach()
        site.remove("default")
        site.add("default", vector, frozen=((0, 5),))
    ended = train_many(base, model, {"a": unlike_tasks()["a"], "b": unlike_tasks()["b"]})
    for vector in ended["a"].vectors.values():
        assert (vector.flatten()[:5] == 1).all()
        assert (vector.flatten()[5:] != 1).all()


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 4)), min_size=1), st.integers(1, 4096)
)
def test_a_short_task_is_not_filled_up_to_a_long_one(
    sizes: list[tuple[int, int]], max_tokens: int
) -> None:
    """A row of 50 tokens beside one of 900 would cost eighteen times as much as alone."""
    pieces = [_Piece(None, (i,), rows, n, None, False) for i, (n, rows) in enumerate(sizes)]  # type: ignore[arg-type]
    passes = list(_passes(pieces, max_tokens))
    assert sorted(piece.members for of in passes for piece in of) == [p.members for p in pieces]
    for of_pass in passes:
        longest = max(piece.length for piece in of_pass)
        assert longest - min(p.length for p in of_pass) <= max(PADDING, longest // 4)
        tokens = longest * sum(piece.rows for piece in of_pass)
        assert tokens <= max_tokens or len(of_pass) == 1
