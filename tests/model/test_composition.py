"""Adapted models in the hands of everything else: copies, compilers, casts, generation, files."""

import copy
import io
import pickle

import pytest
import torch
from support import pairs
from support.architectures import ARCHITECTURES, VOCABULARY, batch, build, output
from support.pairs import adapted_pair, randomize, relative, vectors
from support.snapshots import hooks_on
from torch import nn
from transformers import PreTrainedModel

import ia3

EVERY_MODEL = pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "gemma3"])

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # transformers' own, under torch 2.13 and its own newer names.
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]


def adapted(kind, dtype=torch.float32):
    """A model of that kind with an adapter of random vectors."""
    return pairs.adapted(build(kind, dtype), **ARCHITECTURES[kind].modules)


def logits(kind, model):
    with torch.no_grad():
        return output(kind, model)


def loss_of(kind, model):
    result = model(**batch(kind), use_cache=False).logits.float()
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(VOCABULARY, result.shape[:-1], generator=generator)
    return nn.functional.cross_entropy(result.flatten(0, -2), targets.flatten())


def gradients(model):
    found = {name: vector.grad.clone() for name, vector in vectors(model).items()}
    model.zero_grad()
    return found


def hooks(model):
    return {name: count for name, m in model.named_modules() if (count := hooks_on(m))}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved]


def test_a_copy_of_a_compiled_model_calls_itself():
    model = adapted("llama")
    model.compile(backend="eager")
    expected = logits("llama", model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits("llama", twin), expected)
    randomize(vectors(twin, "default"), seed=1)
    assert relative(logits("llama", twin), expected) > 1e-3
    assert torch.equal(logits("llama", model), expected)


@EVERY_MODEL
@pytest.mark.parametrize("copied", COPIES)
def test_copies_are_whole_and_independent(kind, copied):
    base_logits = logits(kind, build(kind))
    model = adapted(kind)
    model.add_adapter("second", ia3.IA3Config())
    randomize(vectors(model, "second"), seed=1)
    model.set_adapter(["default", "second"])
    expected = logits(kind, model)
    twin = copied(model)
    assert twin.active_adapters == ["default", "second"]
    assert torch.equal(logits(kind, twin), expected)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}

    randomize(vectors(twin, "second"), seed=2)
    changed = logits(kind, twin)
    assert relative(changed, expected) > 1e-3
    assert torch.equal(logits(kind, model), expected)
    model.unload()
    assert torch.equal(logits(kind, twin), changed)

    loss_of(kind, twin).backward()
    assert all(vector.grad is not None for vector in vectors(twin, "second").values())
    twin.set_adapter("default")
    twin.delete_adapter("second")
    assert torch.equal(logits(kind, twin), logits(kind, adapted(kind)))
    assert torch.equal(logits(kind, twin.unload()), base_logits)
    assert not hooks(twin.model)


@EVERY_MODEL
def test_compiled_as_one_graph(kind):
    model = adapted(kind)
    loss = loss_of(kind, model)
    loss.backward()
    expected = gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = loss_of(kind, compiled)
    found.backward()
    assert relative(found, loss) < 1e-6
    for name, gradient in gradients(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name


class _Logits(nn.Module):
    """A graph's arguments and result are tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["in place", "plain", "fused", "the base model", "no gradients"])
def test_traced(how):
    """The graph is the same with gradients and without, which the tracer checks."""
    model, ids = adapted("llama"), batch("llama")["input_ids"]
    model.use_plain_product(how == "plain")
    if how == "fused":
        model.fuse_mlp()
    expected = _Logits(model)(ids)
    with torch.set_grad_enabled(how != "no gradients"):
        of = _Logits(model.get_base_model() if how == "the base model" else model)
        traced = torch.jit.trace(of, ids)
    assert relative(traced(ids), expected) < 1e-6
    others = ids.roll(1, -1)
    assert relative(traced(others), _Logits(model)(others)) < 1e-6


COPY = {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]}
EXPERTS = {"target_modules": ["experts"], "feedforward_modules": ["experts"]}


@pytest.mark.parametrize("how", ["made", "added", "combined", "loaded", "copied", "merged"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("llama", {}), ("gpt2", {"paper_sites": True}), ("llama", COPY), ("mixtral", EXPERTS)],
    ids=["vectors", "frozen values", "copies", "experts"],
)
def test_what_was_made_in_inference_mode_trains(kind, config, how, tmp_path):
    if how == "combined" and "modules_to_save" in config:
        return
    base, config = build(kind), ia3.IA3Config(**config)
    if how == "made":
        with torch.inference_mode():
            model = ia3.get_peft_model(base, config)
    else:
        model = ia3.get_peft_model(base, config)
        model.save_pretrained(tmp_path)
    with torch.inference_mode():
        if how == "added":
            model.add_adapter("other", config)
            model.set_adapter("other")
        if how == "combined":
            model.add_weighted_adapter(["default"], [0.5], "other")
            model.set_adapter("other")
        if how == "loaded":
            model = ia3.IA3Model.from_pretrained(model.unload(), tmp_path, is_trainable=True)
        if how == "copied":
            model = copy.deepcopy(model)
        if how == "merged":
            merged = model.merge_and_unload()
            model = ia3.get_peft_model(merged, config)
    loss_of(kind, model).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize(
    ("kind", "config"),
    [("llama", {}), ("llama", COPY), ("mixtral", EXPERTS)],
    ids=["vectors", "copies", "experts"],
)
def test_a_base_model_that_was_made_in_inference_mode_is_merged(kind, config):
    with torch.inference_mode():
        model = ia3.get_peft_model(build(kind), ia3.IA3Config(**config, init_ia3_weights=False))
        expected = loss_of(kind, model)
        model.merge_adapter()
        assert torch.allclose(loss_of(kind, model), expected)
        model.unmerge_adapter()
        assert torch.equal(loss_of(kind, model), expected)
        assert torch.allclose(loss_of(kind, model.merge_and_unload()), expected)


@EVERY_MODEL
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", ["adapter", "checkpointing"])
def test_gradient_checkpointing_needs_nothing_more(kind, reentrant, first):
    """Enabled on the adapted model, or before it on the base, gradients are the usual ones."""
    model = adapted(kind).train()
    loss_of(kind, model).backward()
    expected = gradients(model)

    options = {"use_reentrant": reentrant}
    base = build(kind).train()
    if first == "checkpointing":
        base.gradient_checkpointing_enable(options)
    model = pairs.adapted(base)
    if first == "adapter":
        model.gradient_checkpointing_enable(options)
    loss_of(kind, model).backward()
    for name, gradient in gradients(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name

    model.unload()
    without_adapter = build(kind)
    without_adapter.gradient_checkpointing_enable(options)  # may leave hooks of its own
    assert hooks(base) == hooks(without_adapter)


@EVERY_MODEL
def test_autocast_is_pefts(kind):
    results = []
    for model in adapted_pair(lambda dtype: build(kind, dtype), ARCHITECTURES[kind].modules):
        with torch.autocast("cpu", torch.bfloat16):
            result = model(**batch(kind), use_cache=False).logits
            loss = loss_of(kind, model)
        loss.backward()
        results.append((result, loss, gradients(model)))
    (ours, our_loss, our_gradients), (theirs, their_loss, their_gradients) = results
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative(ours, theirs) < 1e-2
    assert relative(our_loss, their_loss) < 1e-2
    assert relative(ours, logits(kind, adapted(kind))) > 1e-4  # it was computed in bfloat16
    for name, expected in their_gradients.items():
        assert our_gradients[name].dtype == torch.float32
        assert relative(our_gradients[name], expected) < 1e-2, name


CASTS = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to device and dtype": (lambda model: model.to("cpu", torch.float16), torch.float16),
    "the base alone": (lambda model: model.model.to(torch.bfloat16), torch.bfloat16),
    "there and back": (lambda model: model.half().float().bfloat16(), torch.bfloat16),
}


@EVERY_MODEL
@pytest.mark.parametrize("cast", CASTS)
def test_vectors_stay_float32_over_a_base_that_is_cast(kind, cast):
    """So that the vectors can still learn; PEFT's are cast too."""
    change, dtype = CASTS[cast]
    model = adapted(kind)
    before = {name: vector.detach().clone() for name, vector in vectors(model).items()}
    parameters = dict(vectors(model))
    change(model)
    base = [p for name, p in model.named_parameters() if "ia3_l" not in name]
    assert {p.dtype for p in base} == {dtype}
    for name, vector in vectors(model).items():
        assert vector is parameters[name]  # the one in the optimizer
        assert vector.dtype == torch.float32
        assert torch.equal(vector, before[name])
    found = logits(kind, model)
    assert found.dtype == dtype
    assert relative(found, logits(kind, adapted(kind))) < 3e-2
    if cast != "there and back":
        assert torch.equal(found, logits(kind, adapted(kind, dtype)))
    loss_of(kind, model).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_vectors_are_float32_again_after_a_detour_through_float64():
    model = adapted("llama")
    expected = logits("llama", model)
    model.double()
    assert relative(logits("llama", model), expected) < 1e-5
    model.float()
    assert {vector.dtype for vector in vectors(model).values()} == {torch.float32}
    assert torch.equal(logits("llama", model), expected)


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


@EVERY_MODEL
@pytest.mark.parametrize("how", GENERATION)
def test_generation_is_pefts(kind, how):
    inputs = {name: value for name, value in batch(kind).items() if name != "decoder_input_ids"}
    # Padding to the right is not what a decoder expects.
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, **GENERATION[how]}

    def generated(model):
        torch.manual_seed(0)
        return model.generate(**inputs, **options)

    ours, theirs = adapted_pair(lambda dtype: build(kind, dtype), ARCHITECTURES[kind].modules)
    expected = generated(theirs)
    assert torch.equal(generated(ours), expected)
    assert torch.equal(generated(ours.get_base_model()), expected)
    with ours.disable_adapter():
        without = generated(ours)
    assert not torch.equal(without, expected)
    assert torch.equal(without, generated(build(kind)))


@EVERY_MODEL
@pytest.mark.parametrize("assign", [False, True])
def test_a_base_checkpoint_loads_strictly_under_the_adapter(kind, assign):
    other = build(kind)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    model = adapted(kind)
    before = logits(kind, model)
    model.get_base_model().load_state_dict(other.state_dict(), strict=True, assign=assign)
    found = logits(kind, model)
    assert torch.equal(found, logits(kind, pairs.adapted(other)))
    assert relative(found, before) > 1e-3


def test_a_base_checkpoint_that_lacks_a_weight_is_still_refused():
    base = build("llama")
    incomplete = base.state_dict()
    del incomplete["model.layers.0.self_attn.k_proj.weight"]
    ia3.get_peft_model(base, ia3.IA3Config())
    with pytest.raises(RuntimeError, match=r"Missing key.*self_attn\.k_proj\.weight"):
        base.load_state_dict(incomplete)


def test_state_of_the_adapted_model_loads_into_its_like():
    model = adapted("llama")
    twin = ia3.get_peft_model(build("llama"), ia3.IA3Config())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits("llama", twin), logits("llama", model))


@EVERY_MODEL
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_the_base_model_saves_a_plain_checkpoint(kind, shard, tmp_path):
    model = adapted(kind)
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    base.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    read, report = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not any("ia3_l" in key for key in read.state_dict())
    plain = build(kind).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in read.state_dict().items())
    assert torch.equal(logits(kind, read.eval()), logits(kind, build(kind)))
