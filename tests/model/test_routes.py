"""Batches whose rows have different adapters: each is what it would be alone."""

import asyncio
import contextvars
import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import transformers as hf
from hypothesis import given, settings, strategies as st
from support.architectures import ARCHITECTURES, SIZES, VOCABULARY, batch, build
from support.pairs import randomize, relative, vectors
from support.snapshots import hooks_on
from torch import nn
from torch.utils.checkpoint import checkpoint

import ia3
from ia3.core import route as routing

BASE = "__base__"
NAMES = ["default", "b", "c"]
MIXES = [NAMES, ["b", BASE, "c"], ["c", "c", "default"], [BASE] * 3]
KINDS = ["llama", "gpt2", "opt", "t5", "mt5", "bart", "qwen3", "gemma3", "falcon", "bert"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]


def several(kind, names=NAMES, dtype=torch.float32, **config):
    """A model with adapters of random vectors; the last one has fewer sites than the others."""
    config = {**ARCHITECTURES[kind].modules, **config}
    model = ia3.get_peft_model(build(kind, dtype), ia3.IA3Config(**config), names[0])
    sites = model.vectors(names[0])
    fewer = {"target_modules": list(sites)[::2]}
    inputs = [name for name in fewer["target_modules"] if sites[name].shape[0] == 1]
    fewer["feedforward_modules"] = inputs
    for name in names[1:]:
        if name == names[-1] and "paper_sites" not in config:
            config = {**config, **fewer}
        model.add_adapter(name, ia3.IA3Config(**config))
    for seed, name in enumerate(names):
        randomize(vectors(model, name), seed)
    model.set_adapter(names[0], inference_mode=True)
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def by_adapter(model, compute):
    """What is computed with each adapter active, and with none."""
    before = model.active_adapters
    found = {}
    for name in model.peft_config:
        model.set_adapter(name, inference_mode=True)
        found[name] = compute()
    with model.disable_adapter():
        found[BASE] = compute()
    model.set_adapter(before, inference_mode=True)
    return found


def logits_by_name(model, **inputs):
    return by_adapter(model, lambda: logits(model, **inputs))


def picked(of, names):
    return torch.stack([of[name][row] for row, name in enumerate(names)])


@pytest.fixture
def model():
    return several("llama")


@pytest.fixture
def inputs():
    return batch("llama")


def hooks(model):
    return sum(map(hooks_on, model.modules()))


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_it_would_be_with_its_adapter_active(kind):
    model, inputs = several(kind), batch(kind)
    expected = logits_by_name(model, **inputs)
    for names in MIXES:
        found = logits(model, **inputs, adapter_names=names)
        assert torch.equal(found, picked(expected, names)), names
        with model.route(names):
            assert torch.equal(logits(model, **inputs), found)
            assert torch.equal(logits(model.get_base_model(), **inputs), found)
    assert relative(expected["b"], expected[BASE]) > 1e-3
    assert torch.equal(logits(model, **inputs), expected["default"])


@pytest.mark.parametrize("how", ["plain", "fused", "all-linear", "merged and back", "frozen"])
def test_every_way_of_rescaling_is_routed(how):
    # GPT-2's queries, keys and values are one layer, whose first rows stay one.
    kind = "gpt2" if how == "frozen" else "llama"
    config = {"all-linear": {"target_modules": "all-linear"}, "frozen": {"paper_sites": True}}
    model, inputs = several(kind, **config.get(how, {})), batch(kind)
    if how == "plain":
        model.use_plain_product()
    if how == "fused":
        model.fuse_mlp()
    if how == "merged and back":
        model.merge_adapter()
        with pytest.raises(ia3.IA3Error, match="merged"):
            logits(model, **inputs, adapter_names=NAMES)
        model.unmerge_adapter()
    expected = logits_by_name(model, **inputs)
    for names in MIXES:
        found = logits(model, **inputs, adapter_names=names)
        assert torch.equal(found, picked(expected, names)), names


def test_convolutions_are_routed():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten()).eval()
    config = ia3.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])
    model = ia3.IA3Model(base, config)
    model.add_adapter("b", config)
    for seed, name in enumerate(["default", "b"]):
        randomize(vectors(model, name), seed)
    pictures = torch.randn(3, 3, 6, 6)
    expected = by_adapter(model, lambda: model(pictures).detach())
    model.set_adapter("b")
    names = ["b", "default", "b"]
    found = model(pictures, adapter_names=names)
    assert torch.equal(found, picked(expected, names))
    found.square().sum().backward()
    assert all(vector.grad is not None for vector in vectors(model, "b").values())


MODEL_IN = cache(lambda dtype: several("llama", dtype=dtype))


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from([*NAMES, BASE]), min_size=1, max_size=6),
    length=st.integers(1, 9),
    left=st.booleans(),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_mix_equals_its_rows_alone(names, length, left, seed, dtype):
    model = MODEL_IN(dtype)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(names), length), generator=generator)
    padding = torch.randint(0, length, (len(names), 1), generator=generator)
    mask = (torch.arange(length) >= padding).long()
    if not left:
        mask = mask.flip(1)
    found = logits(model, input_ids=ids, attention_mask=mask, adapter_names=names)
    assert found.dtype == dtype
    within = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for row, name in enumerate(names):
        alone = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        expected = logits(model, **alone, adapter_names=[name])
        seen = mask[row].bool()
        assert relative(found[row][seen], expected[0][seen]) < within, name


def test_a_copy_of_a_routed_model_is_its_own(model, inputs, tmp_path):
    with model.route(NAMES):
        expected = logits(model, **inputs)
        twin = copy.deepcopy(model)
        # The copy is not routed.
        assert torch.equal(logits(twin, **inputs)[0], expected[0])
        assert not torch.equal(logits(twin, **inputs)[1], expected[1])
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (twin, read):
        assert torch.equal(logits(each, **inputs, adapter_names=NAMES), expected)
        base = each.unload()
        assert hooks(base) == 0


def test_a_model_of_another_kind_in_the_same_call_keeps_its_adapters():
    model, other = several("llama"), several("qwen3")
    inputs = batch("llama")
    expected = logits(model, **inputs, adapter_names=MIXES[1])
    active = logits(other, **inputs)
    with model.route(MIXES[1]):
        assert torch.equal(logits(other, **inputs), active)
        with other.route(MIXES[2]):
            routed = logits(other, **inputs)
            assert torch.equal(logits(model, **inputs), expected)
        assert torch.equal(logits(other, **inputs), active)
    assert torch.equal(routed, logits(other, **inputs, adapter_names=MIXES[2]))


def _packed():
    """Sequences, and all of them in one row."""
    generator = torch.Generator().manual_seed(3)
    alone = [torch.randint(3, VOCABULARY, (1, n), generator=generator) for n in (4, 6, 3)]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in alone])[None]
    return alone, {"input_ids": torch.cat(alone, 1), "position_ids": positions}


@pytest.mark.parametrize("training", [False, True])
def test_packed_sequences_have_an_adapter_each(model, training):
    if training:
        model.set_adapter(NAMES)
    alone, packed = _packed()
    names = ["c", BASE, "b"]
    by_token = [n for n, ids in zip(names, alone, strict=True) for _ in range(ids.shape[1])]
    index = torch.tensor([[names.index(name) for name in by_token]])
    found = logits(model, **packed, adapter_names=[by_token])
    with model.route(names, index):
        assert torch.equal(logits(model, **packed), found)
    parts = found.split([ids.shape[1] for ids in alone], 1)
    for ids, name, part in zip(alone, names, parts, strict=True):
        expected = logits(model, input_ids=ids, adapter_names=[name])
        assert relative(part, expected) < 1e-5, name


def test_tokens_that_were_not_named_are_refused(model):
    _, packed = _packed()
    with pytest.raises(ia3.IA3Error, match=r"\[1, 12\] tokens.*\[1, 13\]"):
        logits(model, **packed, adapter_names=[["b"] * 12])
    with model.route([["b"] * 12]), pytest.raises(ia3.IA3Error, match=r"\[1, 12\] tokens"):
        logits(model, **packed)
    for arguments, message in (
        ((["b", "c"], torch.tensor([[0, 1, 2]])), "from 0 to 2, expected 0 to 1"),
        ((["b"], torch.zeros(1, 3)), r"torch\.float32, expected"),
        (([["b"]], torch.zeros(1, 3, dtype=torch.long)), "expected plain names beside"),
        (([["b", "b"], ["c"]],), r"lists of \[2, 1\] names"),
    ):
        with pytest.raises(ia3.IA3Error, match=message):
            model.route(*arguments).__enter__()
    with pytest.raises(ia3.IA3Error, match="those to come have no names"):
        model.generate(packed["input_ids"], adapter_names=[["b"] * 13])
    with pytest.raises(ia3.IA3Error, match="encoder and a decoder"):
        logits(several("t5"), **batch("t5"), adapter_names=[["b"] * 7] * 3)


# -- generation ------------------------------------------------------------------------------------

GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several of the beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("how", GENERATION)
def test_generation_goes_on_with_each_rows_adapter(kind, how):
    model = several(kind)
    ids = batch(kind)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, **GENERATION[how]}
    each = options.get("num_return_sequences", 1)
    by_name = by_adapter(model, lambda: model.generate(ids, **options).unflatten(0, (3, each)))
    assert not torch.equal(by_name["b"], by_name[BASE])
    for names in MIXES[:2]:
        expected = picked(by_name, names).flatten(0, 1)
        assert torch.equal(model.generate(ids, **options, adapter_names=names), expected)
        config = hf.GenerationConfig(**options)
        with model.route(names):
            assert torch.equal(model.generate(ids, config), expected)


@pytest.mark.parametrize(("beams", "each"), [(1, 1), (3, 1), (3, 2), (3, 3)])
def test_speech_is_generated_with_each_rows_adapter(beams, each):
    """Whisper repeats its input for the sequences before it is repeated for the beams."""
    feedforward = {"feedforward_modules": ["fc2"]}
    model = several("whisper", target_modules=["k_proj", "v_proj", "fc2"], **feedforward)
    sound = batch("whisper")["input_features"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"num_beams": beams, "num_return_sequences": each}
    by_name = by_adapter(model, lambda: model.generate(sound, **options).unflatten(0, (3, each)))
    assert not torch.equal(by_name["b"], by_name[BASE])
    for names in MIXES[:2]:
        found = model.generate(sound, **options, adapter_names=names)
        assert torch.equal(found, picked(by_name, names).flatten(0, 1))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_continuous_batching_is_never_routed(model):
    """It packs rows, in a thread that has no route: they would all get the active adapter."""
    prompts, base = [[5, 6, 7], [8, 9]], model.get_base_model()
    config = hf.GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0)
    # By default it takes nine tenths of the machine's memory.
    small = hf.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)

    def generated(model):
        found = model.generate_batch(prompts, config, continuous_batching_config=small)
        return [r.generated_tokens for r in found.values()]

    model.set_adapter("b", inference_mode=True)
    assert generated(model) == generated(base)
    ways = ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
    for way in ways:
        call = getattr(model, way)
        for names in (["b", BASE], ["b", "unknown"]):
            with pytest.raises(ia3.IA3Error, match=r"cannot be routed.*use generate"):
                call(prompts, adapter_names=names)
        with model.route(["b", BASE]), pytest.raises(ia3.IA3Error, match="cannot be routed"):
            call(prompts)


def test_sampled_sequences_have_their_rows_adapter(model):
    ids = batch("llama")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, **options, adapter_names=NAMES)
    rows = [name for name in NAMES for _ in range(4)]
    last = logits(model, input_ids=found.sequences[:, :-1], adapter_names=rows)[:, -1]
    assert relative(found.logits[-1], last) < 1e-5


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_generation(model, how):
    ids = batch("llama")["input_ids"][:1]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assisted = {"prompt_lookup_num_tokens": 2}
    if how == "assistant":
        assistant = several("llama")
        assistant.set_adapter("c")
        assisted = {"assistant_model": assistant}
    for name in ("b", BASE):
        options["adapter_names"] = [name]
        found = model.generate(ids, **options, **assisted)
        assert torch.equal(found, model.generate(ids, **options))


def test_rows_that_became_several_elsewhere_are_refused(model):
    ids = batch("llama")["input_ids"]
    message = r"\[3\] rows.*\[6, 7\].*IA3Model\.generate"
    with model.route(NAMES), pytest.raises(ia3.IA3Error, match=message):
        model.get_base_model().generate(ids, num_beams=2, max_new_tokens=2, pad_token_id=0)


# -- training --------------------------------------------------------------------------------------


def _loss(model, rows=slice(None), given=None, **options):
    """The sum of the rows' losses."""
    inputs = {name: value[rows] for name, value in (given or batch("llama")).items()}
    result = model(**inputs, use_cache=False, **options).logits
    targets = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))[rows]
    return nn.functional.cross_entropy(result.flatten(0, 1), targets.flatten(), reduction="sum")


def _gradients(model, names=NAMES):
    found = {
        f"{adapter} {name}": vector.grad
        for adapter in names
        for name, vector in vectors(model, adapter).items()
        if vector.grad is not None
    }
    model.zero_grad()
    return found


def _separate(model, names):
    """The gradients of a run for each row, with its adapter alone."""
    for row, name in enumerate(names):
        model.set_adapter(name)
        _loss(model, slice(row, row + 1)).backward()
    return _gradients(model)


def _assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("how", ["usual", "plain", "fused"])
@pytest.mark.parametrize("names", [NAMES, ["c", "b", "c"]], ids=str)
def test_gradients_are_those_of_separate_runs(model, how, names):
    if how == "plain":
        model.use_plain_product()
    if how == "fused":
        model.fuse_mlp()
    with torch.no_grad():  # A zero must learn, too.
        next(iter(vectors(model, "c").values())).view(-1)[:2] = 0
    expected = _separate(model, names)
    model.set_adapter(NAMES)
    _loss(model, adapter_names=names).backward()
    _assert_alike(_gradients(model), expected)


def test_one_adapter_trains_beside_others_that_do_not(model):
    expected = _separate(model, ["b"])
    model.set_adapter("b")
    _loss(model, adapter_names=["b", "c", BASE]).backward()
    found = _gradients(model)
    assert {name.split()[0] for name in found} == {"b"}
    _assert_alike(found, expected)


def test_steps_within_one_route_see_each_others_values(model):
    model.set_adapter(NAMES)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with model.route(NAMES):
        _loss(model).backward()
        optimizer.step()
        after = logits(model, **batch("llama"))
    assert torch.equal(after, picked(logits_by_name(model, **batch("llama")), NAMES))


# -- what is refused -------------------------------------------------------------------------------


def test_bad_names_are_refused_before_anything_runs(model):
    ran = []
    handle = model.get_base_model().register_forward_pre_hook(lambda *_: ran.append(1))
    inputs = batch("llama")
    bad = [
        (
            ["default", "bb", "c"],
            r"no adapter 'bb' on .* which has \['b', 'c', 'default'\]; '__base__'.* mean 'b'",
        ),
        (["default", "b"], r"\[2\] rows, but the input is \[3, 7\]"),
        ([*NAMES, "b"], r"\[4\] rows, but the input is \[3, 7\]"),
        ("b", "is 'b', expected a list"),
        ([], r"is \[\], expected a list"),
        (["b", 3, "c"], "holds 3, expected names"),
        (["b", None, "c"], "'__base__' is the base model"),
        ([["b", "c"], "bc"], "one name a token"),
    ]
    for names, message in bad:
        with pytest.raises(ia3.IA3Error, match=message):
            logits(model, **inputs, adapter_names=names)
        with pytest.raises(ia3.IA3Error, match=message):
            model.generate(inputs["input_ids"], adapter_names=names)
    assert not ran
    handle.remove()
    six = torch.cat([inputs["input_ids"]] * 2)
    for called in (model, model.get_base_model()):
        with model.route(NAMES), pytest.raises(ia3.IA3Error, match="expected one name each"):
            called(input_ids=six)
    with pytest.raises(ia3.IA3Error, match="means the base model"):
        model.add_adapter(BASE, ia3.IA3Config())


def test_adapters_with_copies_or_experts_are_not_mixed(model, inputs):
    model.add_adapter("head", ia3.IA3Config(modules_to_save=["lm_head"]))
    expected = logits(model, **inputs, adapter_names=NAMES)
    with pytest.raises(ia3.IA3Error, match=r"'head' has a copy of 'lm_head' \(modules_to_save\)"):
        logits(model, **inputs, adapter_names=["b", "head", "c"])
    model.set_adapter("head")
    with pytest.raises(ia3.IA3Error, match=r"'head' is active, whose copy of 'lm_head'"):
        logits(model, **inputs, adapter_names=NAMES)
    model.set_adapter("default")
    assert torch.equal(logits(model, **inputs, adapter_names=NAMES), expected)

    keys = ia3.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    inner = ia3.IA3Config(target_modules=["experts"], feedforward_modules=["experts"])
    experts = ia3.get_peft_model(build("mixtral"), keys)
    experts.add_adapter("inner", inner)
    for seed, name in enumerate(["default", "inner"]):
        randomize(vectors(experts, name), seed)
    with pytest.raises(ia3.IA3Error, match="'inner' rescales within the experts"):
        logits(experts, **batch("mixtral"), adapter_names=["inner"] * 3)
    with experts.disable_adapter():
        base = logits(experts, **batch("mixtral"))
    experts.set_adapter("inner")
    assert torch.equal(logits(experts, **batch("mixtral"), adapter_names=[BASE] * 3), base)


def test_layers_that_see_the_tokens_of_one_expert_are_not_mixed():
    """As many tokens as rows, or twice as many, may come to an expert by chance."""

    class Block(nn.ModuleDict):
        def forward(self, values):
            tokens = values.flatten(0, 1)
            halves = tokens[::2], tokens[1::2]
            return torch.cat([e(h) for e, h in zip(self["experts"], halves, strict=True)])

    block = Block({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    config = ia3.IA3Config(target_modules=["0", "1"], feedforward_modules=[])
    model = ia3.IA3Model(block, config)
    with pytest.raises(ia3.IA3Error, match=r"within the experts 'experts\.0'"):
        model(torch.ones(2, 4, 4), adapter_names=["default", BASE])


def test_what_would_change_an_open_route_is_refused(model, inputs):
    expected = logits(model, **inputs, adapter_names=NAMES)
    with model.route(NAMES):
        refused = (model.unload, model.merge_adapter, model.disable_adapter_layers)
        for change in (*refused, lambda: model.delete_adapter("b")):
            with pytest.raises(ia3.IA3Error, match="a route of this model is on"):
                change()
        model.set_adapter("c")
        assert torch.equal(logits(model, **inputs), expected)
    with model.disable_adapter(), pytest.raises(ia3.IA3Error, match="disabled"):
        logits(model, **inputs, adapter_names=NAMES)
    model.set_adapter("c")
    unrouted = hooks(model)
    with pytest.raises(KeyError), model.route(NAMES):
        raise KeyError
    assert hooks(model) > unrouted  # they stay for the next one
    assert torch.equal(logits(model, **inputs), logits_by_name(model, **inputs)["c"])
    model.set_adapter("c")
    assert hooks(model) == unrouted
    assert hooks(model.unload()) == 0


def test_a_module_that_sees_something_else_than_the_batch_is_refused():
    """DeBERTa's keys are also taken of its relative positions, which have no rows."""
    relative = {"relative_attention": True, "share_att_key": True, "pos_att_type": ["c2p", "p2c"]}
    base = hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SIZES, **relative)).eval()
    model = ia3.get_peft_model(base, ia3.IA3Config())
    inputs = batch("deberta-v2")
    with pytest.raises(ia3.IA3Error, match=r"3 rows.*key_proj.*cannot be routed"):
        model(**inputs, adapter_names=["default", BASE, "default"])


# -- checkpointing and threads ---------------------------------------------------------------------


def _in_another_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("where", ["here", "another thread", "another route", "disabled"])
@pytest.mark.parametrize("which", ["blocks", "blocks of one call", "the whole model"])
def test_what_is_computed_again_has_the_same_route(model, reentrant, where, which):
    expected = _separate(model, ["c", "b", "c"])
    model.set_adapter(NAMES)
    model.train()
    names = ["c", "b", "c"]
    if which.startswith("blocks"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if which == "blocks of one call":
        loss = _loss(model, adapter_names=names)
        _loss(model, adapter_names=[BASE, "b", BASE])
    else:
        with model.route(names):
            loss = _loss(model) if which == "blocks" else _checkpointed_loss(model, reentrant)
    if where == "another thread":
        _in_another_thread(loss.backward)
    else:
        other = {
            "another route": lambda: model.route([BASE] * 3),
            "disabled": model.disable_adapter,
        }
        with other.get(where, nullcontext)():
            loss.backward()
    _assert_alike(_gradients(model), expected)


def _checkpointed_loss(model, reentrant):
    inputs = batch("llama")
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
    del inputs["input_ids"]

    def loss(values):
        return _loss(model, given={**inputs, "inputs_embeds": values})

    return checkpoint(loss, embeddings, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_what_was_not_routed_is_not_routed_when_it_is_computed_again(model, reentrant):
    model.set_adapter("b")
    _loss(model).backward()
    expected = _gradients(model)
    with model.route(NAMES):
        pass  # of the first one on, checkpoints know
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = _loss(model)
    with model.route([BASE] * 3):
        loss.backward()
    _assert_alike(_gradients(model), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("first", [["b"], ["c"], ["default", "b"]], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_adapter("default"),
        lambda model: model.disable_adapter_layers(),
        lambda model: (model.add_adapter("d", ia3.IA3Config()), model.set_adapter("d")),
    ],
    ids=["switched", "disabled", "added"],
)
def test_what_is_computed_again_sees_the_adapters_of_its_call(model, reentrant, first, change):
    """As long as they train. Also in another thread, and nothing is left behind."""
    model.set_adapter(first)
    _loss(model).backward()
    expected = _gradients(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses = [_loss(model) for _ in range(2)]
    change(model)
    for name in model.peft_config:
        for vector in model.vectors(name).values():
            vector.requires_grad_(name in first)
    now = logits(model, **batch("llama"))
    losses[0].backward()
    _assert_alike(_gradients(model), expected)
    _in_another_thread(losses[1].backward)
    _assert_alike(_gradients(model), expected)
    assert torch.equal(logits(model, **batch("llama")), now)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.unload(), "'b' was deleted or unloaded"),
        (lambda model: model.merge_adapter(), "merged or unmerged"),
        (lambda model: model.delete_adapter("b"), "'b' was deleted or unloaded"),
    ],
)
def test_what_can_no_longer_be_computed_again_is_refused(model, change, message):
    model.set_adapter("b")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss = _loss(model)
    model.set_adapter("c")
    change(model)
    with pytest.raises(ia3.IA3Error, match=message):
        loss.backward()


def test_frozen_adapters_are_computed_again_as_they_were(model, inputs):
    """Gradients flow through to the embeddings, whatever the adapters are by then."""
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

    def loss():
        with model.route(["b", "c", "b"]):
            return _loss(model, given={**inputs, "inputs_embeds": embeddings})

    (expected,) = torch.autograd.grad(loss(), embeddings)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    again = loss()
    randomize(vectors(model, "b"), seed=9)
    again.backward()
    assert relative(embeddings.grad, expected) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.unload(), "lost adapters"),
        (lambda model: model.merge_adapter(), "are merged"),
        (lambda model: model.delete_adapter("b"), "'b' was deleted"),
    ],
)
def test_a_backward_pass_after_the_adapters_are_gone_is_refused(model, change, message):
    model.set_adapter(NAMES)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss = _loss(model, adapter_names=NAMES)
    change(model)
    with pytest.raises(ia3.IA3Error, match=message):
        loss.backward()


def test_threads_do_not_see_each_others_routes(model, inputs):
    mixes = [*MIXES, ["default", BASE, "b"], None]
    expected = [logits(model, **inputs, adapter_names=names) for names in mixes]
    together = threading.Barrier(len(mixes))

    def run(names):
        together.wait()
        found = []
        for turn in range(20):
            by_call = names is None or turn % 2
            with nullcontext() if by_call else model.route(names):
                given = {"adapter_names": names} if by_call else {}
                found.append(logits(model, **inputs, **given))
        return found

    with ThreadPoolExecutor(len(mixes)) as pool:
        for results, wanted in zip(pool.map(run, mixes), expected, strict=True):
            assert all(torch.equal(found, wanted) for found in results)

    with model.route(MIXES[1]):
        assert torch.equal(_in_another_thread(lambda: logits(model, **inputs)), expected[-1])
        _in_another_thread(lambda: model.set_adapter("c"))  # takes no hooks away
        assert torch.equal(logits(model, **inputs), expected[1])


def test_a_torch_without_the_places_to_bind_does_not_train_routed(model, monkeypatch):
    monkeypatch.setattr(routing, "bind", routing.bind.__wrapped__)
    monkeypatch.delattr(torch.utils.checkpoint, "CheckpointFunction")
    assert logits(model, **batch("llama"), adapter_names=NAMES).isfinite().all()
    with pytest.raises(ia3.IA3Error, match="no checkpointing that could be told"):
        _loss(model, adapter_names=NAMES)


# -- compilers -------------------------------------------------------------------------------------


@pytest.fixture
def _reset_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_reset_compiler")
@pytest.mark.parametrize("what", ["base", "adapted", "fused"])
def test_a_compiled_model_follows_routes(model, what):
    if what == "fused":
        model.fuse_mlp()
    inputs = batch("llama")
    by_name = logits_by_name(model, **inputs)
    compiled = torch.compile(model.get_base_model() if what == "base" else model, backend="eager")

    def check(names):
        assert relative(logits(compiled, **inputs), picked(by_name, names)) < 1e-6

    model.set_adapter("b", inference_mode=True)
    for names in MIXES:
        check(["b"] * 3)
        with model.route(names):
            check(names)
    model.set_adapter("b", inference_mode=True)
    check(["b"] * 3)
    with model.route(MIXES[0]):
        check(MIXES[0])
    found = logits(torch.compile(model, backend="eager"), **inputs, adapter_names=MIXES[1])
    assert relative(found, picked(by_name, MIXES[1])) < 1e-6


@pytest.mark.usefixtures("_reset_compiler")
def test_one_graph_cannot_be_routed(model, inputs):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = logits(compiled, **inputs)
    with model.route(NAMES), pytest.raises(torch._dynamo.exc.Unsupported):
        logits(compiled, **inputs)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        logits(compiled, **inputs, adapter_names=NAMES)
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(logits(compiled, **inputs), expected)


@pytest.mark.usefixtures("_reset_compiler")
def test_an_exported_graph_does_not_keep_a_route():
    config = ia3.IA3Config(target_modules=["0"], feedforward_modules=[])
    model = ia3.IA3Model(nn.Sequential(nn.Linear(4, 5)).eval(), config)
    refused = pytest.raises(Exception, match=r"routed|graph break|disable")
    with model.route(["default", BASE]), refused:
        torch.export.export(model.get_base_model(), (torch.ones(2, 3, 4),), strict=False)


# -- what must not go wrong silently ---------------------------------------------------------------


def test_an_unloaded_model_stays_plain(model):
    route = model.routes._route([BASE])
    base = model.unload()
    with pytest.raises(ia3.IA3Error, match="was unloaded"), routing.entered(route):
        pass
    assert hooks_on(base) == 0


def test_yielding_within_a_route_is_an_error_and_leaves_none_behind(model, inputs):
    before = logits(model, **inputs)

    def streamed(names):
        with model.route(names):
            yield logits(model, **inputs)

    one, other = streamed(["b"] * 3), streamed([BASE] * 3)
    next(one), next(other)
    with pytest.raises(ia3.IA3Error, match="do not yield"):
        list(one)
    list(other)
    assert routing.current_route(model.routes) is None
    assert torch.equal(logits(model, **inputs), before)
    model.delete_adapter("b")  # no route counts as open

    elsewhere = streamed(["c"] * 3)
    contextvars.copy_context().run(next, elsewhere)
    with pytest.raises(ia3.IA3Error, match="do not yield"):
        contextvars.copy_context().run(list, elsewhere)


def test_the_values_of_a_route_are_freed(model, inputs):
    with model.route(NAMES):
        logits(model, **inputs)
        gone = weakref.ref(routing.current_route(model.routes))
    gc.collect()
    assert gone() is None


def test_a_task_has_the_route_it_was_started_in(model, inputs):
    expected = logits(model, **inputs, adapter_names=["b"] * 3)

    async def later():
        await asyncio.sleep(0)
        return logits(model, **inputs)

    async def start():
        with model.route(["b"] * 3):
            awaited, left = asyncio.create_task(later()), asyncio.create_task(later())
            within = await awaited
        return within, await left

    assert all(torch.equal(found, expected) for found in asyncio.run(start()))


def _in_a_task_of_a_route_that_was_left(model, meanwhile, action):
    """Start a task within a route, leave that, do something, and then something in the task."""

    async def start():
        begin = asyncio.Event()

        async def later():
            await begin.wait()
            return action()

        with model.route(["b"] * 3):
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        meanwhile()
        begin.set()
        return await task

    return asyncio.run(start())


CHANGES = {
    "switched": lambda model: model.set_adapter("c"),
    "switched off": lambda model: model.set_adapter([]),
    "another was put on": lambda model: model.add_adapter("d", ia3.IA3Config()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_task_outlives_its_route_and_keeps_it(model, inputs, change):
    expected = logits(model, **inputs, adapter_names=["b"] * 3)
    other = logits(model, **inputs, adapter_names=["c"] * 3)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = inputs["input_ids"]
    generated = model.generate(ids, **options, adapter_names=["b"] * 3)

    def calls():
        first = logits(model, **inputs)
        with model.route(["c"] * 3):
            within = logits(model, **inputs)
        base = logits(model.get_base_model(), **inputs)
        return (first, base, within), model.generate(ids, **options)

    (first, base, within), again = _in_a_task_of_a_route_that_was_left(
        model, lambda: CHANGES[change](model), calls
    )
    assert torch.equal(first, expected)
    assert torch.equal(base, expected)
    assert torch.equal(within, other)
    assert torch.equal(again, generated)
    gc.collect()
    model.set_adapter([], inference_mode=True)
    assert not sum(hooks_on(m) for _, m, _ in model._adapters.contents().sites)


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        (lambda m: m.merge_adapter(), lambda m: m(**batch("llama")), "are merged"),
        (lambda m: m.set_adapter("c"), lambda m: m.model.model(**batch("llama")), "whole model"),
    ],
    ids=["merged", "a part of the model"],
)
def test_a_route_that_a_task_cannot_have_again_is_an_error(model, change, call, message):
    with pytest.raises(ia3.IA3Error, match=message):
        _in_a_task_of_a_route_that_was_left(model, lambda: change(model), lambda: call(model))


def test_an_adapter_activated_within_a_route_does_not_reach_its_rows(model, inputs):
    with model.route(["b"] * 3):
        expected = logits(model, **inputs)
        model.add_adapter("new", ia3.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        randomize(model.vectors("new"), 9)
        model.set_adapter("new", inference_mode=True)
        assert torch.equal(logits(model, **inputs), expected)
    assert relative(logits(model, **inputs), expected) > 1e-3


def test_a_generation_config_that_leaves_beams_to_the_models_own(model):
    model.generation_config.num_beams = 3
    ids = batch("llama")["input_ids"][:2]
    config = hf.GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    found = model.generate(ids, config, adapter_names=["b", BASE])
    again = model.generate(ids, generation_config=config, adapter_names=["b", BASE])
    assert torch.equal(found, again)
    assert config.disable_compile is not True
    model.set_adapter("b", inference_mode=True)
    assert torch.equal(found[:1], model.generate(ids[:1], config))
