"""`modules_to_save`: whole modules that train and are saved with an adapter."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import load_file, save_file
from support.snapshots import assert_unchanged, snapshot
from torch import nn

import ia3
from ia3 import IA3Config, IA3Error, IA3Model, PeftModel, get_peft_model
from ia3.core.saved_modules import SavedModule

VOCABULARY = 48
LABELS = 3
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "num_labels": LABELS,
}
BERT = {**LLAMA, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPANS = {**BERT, "num_labels": 2}

# Task type -> (the class of a model, its config, the name of its head).
TASKS = {
    "SEQ_CLS": (hf.BertForSequenceClassification, hf.BertConfig(**BERT), "classifier"),
    "SEQ_CLS of a decoder": (hf.LlamaForSequenceClassification, hf.LlamaConfig(**LLAMA), "score"),
    "TOKEN_CLS": (hf.BertForTokenClassification, hf.BertConfig(**BERT), "classifier"),
    "QUESTION_ANS": (hf.BertForQuestionAnswering, hf.BertConfig(**SPANS), "qa_outputs"),
}
EVERY_TASK = pytest.mark.parametrize("task", TASKS)


def make(task="SEQ_CLS"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind, config, _ = TASKS[task]
        return kind(copy.deepcopy(config)).eval()


def inputs(task):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (4, 7), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "QUESTION_ANS":
        return {**batch, "start_positions": ids[:, 0] % 7, "end_positions": ids[:, 1] % 7}
    return {**batch, "labels": ids % LABELS if task == "TOKEN_CLS" else ids[:, 0] % LABELS}


def config_of(library, task):
    return library.IA3Config(task_type=task.split()[0])


def adapted(task="SEQ_CLS", seed=0):
    model = get_peft_model(make(task), config_of(ia3, task))
    disturb(model, seed)
    return model


def disturb(model, seed):
    """New values for all that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.3 * noise).add_(0.1 * noise)


def result(model, task="SEQ_CLS"):
    with torch.no_grad():
        out = model(**inputs(task))
    return out.start_logits if task == "QUESTION_ANS" else out.logits


def tensors_in(folder):
    return load_file(folder / "adapter_model.safetensors")


# -- equal to PEFT ---------------------------------------------------------------------------------


@EVERY_TASK
def test_both_libraries_train_the_same(task):
    models = []
    for library in (ia3, peft):
        model = library.get_peft_model(make(task), config_of(library, task))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(4):
            model(**inputs(task)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    ours, theirs = (result(model, task) for model in models)
    assert (ours - result(make(task), task)).norm() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    merged, peft_merged = (model.merge_and_unload() for model in models)
    torch.testing.assert_close(
        result(merged, task), result(peft_merged, task), rtol=1e-5, atol=1e-6
    )


@EVERY_TASK
def test_peft_reads_our_files_and_we_read_pefts(task, tmp_path):
    model = adapted(task)
    expected = result(model, task)
    model.save_pretrained(tmp_path / "ours")
    peft_model = peft.PeftModel.from_pretrained(make(task), tmp_path / "ours").eval()
    torch.testing.assert_close(result(peft_model, task), expected, rtol=1e-5, atol=1e-6)
    peft_model.save_pretrained(tmp_path / "theirs")
    ours, theirs = map(tensors_in, (tmp_path / "ours", tmp_path / "theirs"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    again = PeftModel.from_pretrained(make(task), tmp_path / "theirs")
    assert torch.equal(result(again, task), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning", "ignore:.*fan_in_fan_out:UserWarning")
def test_a_copied_output_layer_shares_no_weights(tiny_gpt2):
    base = copy.deepcopy(tiny_gpt2)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    outs = []
    modules = {"target_modules": ["c_attn"], "feedforward_modules": []}
    for library in (ia3, peft):
        config = library.IA3Config(**modules, modules_to_save=["lm_head"])
        model = library.get_peft_model(copy.deepcopy(base), config)
        disturb(model, 0)
        embedding = model.get_base_model().get_input_embeddings().weight
        assert torch.equal(embedding, base.get_input_embeddings().weight)
        outs.append(model(input_ids=ids).logits.detach())
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)


# -- several adapters ------------------------------------------------------------------------------


@EVERY_TASK
def test_each_adapter_has_its_head(task):
    plain = result(make(task), task)
    first, second = adapted(task, seed=1), adapted(task, seed=2)
    expected = {"default": result(first, task), "other": result(second, task)}
    first.add_adapter("other", config_of(ia3, task))
    assert torch.equal(result(first, task), expected["default"])
    first.set_adapter("other")
    fresh = result(first, task)
    # A new head starts as the base model's, as a new vector starts from one.
    assert torch.equal(fresh, plain)
    disturb(first, seed=2)
    for name in ("default", "other", "default"):
        first.set_adapter(name)
        assert torch.equal(result(first, task), expected[name])
        trained = [n for n, p in first.named_parameters() if p.requires_grad]
        assert all(f".ia3_l.{name}" in n for n in trained)
        head = TASKS[task][2]
        assert any(f"{head}.ia3_l.{name}." in n for n in trained)
    with first.disable_adapter():
        assert torch.equal(result(first, task), plain)
    assert torch.equal(result(first, task), expected["default"])


@pytest.mark.parametrize("merged", [False, True])
def test_only_one_of_two_heads_can_be_active(merged):
    model = adapted(seed=1)
    model.add_adapter("other", IA3Config(task_type="SEQ_CLS"))
    if merged:
        model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(IA3Error, match=r"\['default', 'other'\].*'classifier'.*only one"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    assert_unchanged(model, before)


def test_a_head_and_an_adapter_without_one_are_active_together():
    model = adapted(seed=1)
    without = IA3Config(target_modules=["query"], feedforward_modules=[])
    model.add_adapter("without", without)
    model.set_adapter(["default", "without"])
    assert torch.equal(result(model), result(adapted(seed=1)))
    model.set_adapter("without")
    # The base model's head.
    assert torch.equal(result(model), result(make()))


def test_a_merged_adapter_has_its_own_head():
    model = adapted(seed=1)
    model.add_adapter("other", IA3Config(task_type="SEQ_CLS"))
    model.set_adapter("other")
    disturb(model, 2)
    expected = result(model)
    model.set_adapter("default")
    before = result(model)
    model.merge_adapter("other")
    assert torch.allclose(result(model), expected, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(result(model), before)
    model.merge_adapter("other")
    assert torch.allclose(result(model.merge_and_unload()), expected, atol=1e-6)


def test_deleting_an_adapter_deletes_its_head():
    base = make()
    before = snapshot(base)
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    model.add_adapter("other", IA3Config(task_type="SEQ_CLS"))
    model.set_adapter("other")
    disturb(model, 2)
    expected = result(model)
    model.delete_adapter("default")
    assert torch.equal(result(model), expected)
    assert not any(".default" in name for name in model.state_dict())
    model.delete_adapter("other")
    model.unload()
    assert_unchanged(base, before)


# -- merging, unloading, copying -------------------------------------------------------------------


@EVERY_TASK
def test_unloading_restores_everything_and_merging_changes_the_very_module(task):
    base = make(task)
    head = base.get_submodule(TASKS[task][2])
    parameters, before = {id(p) for p in base.parameters()}, snapshot(base)
    model = get_peft_model(base, config_of(ia3, task))
    disturb(model, 3)
    model.merge_adapter()
    assert model.unload() is base
    assert_unchanged(base, before)
    model = get_peft_model(base, config_of(ia3, task))
    disturb(model, 3)
    expected = result(model, task)
    merged = model.merge_and_unload()
    assert merged is base
    assert base.get_submodule(TASKS[task][2]) is head
    assert {id(p) for p in base.parameters()} == parameters
    torch.testing.assert_close(result(base, task), expected, rtol=1e-5, atol=1e-6)
    assert not any("ia3_l" in name for name, _ in base.named_modules())
    assert all("forward" not in part.__dict__ for part in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_base_checkpoints_stay_plain(tmp_path):
    base = make()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    disturb(model, 3)
    base.load_state_dict(plain, strict=True)
    base.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == plain.keys()
    again, info = hf.BertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(result(again), result(make()))


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent(twin):
    model = adapted()
    expected = result(model)
    other = twin(model)
    assert torch.equal(result(other), expected)
    disturb(other, 5)
    assert not torch.equal(result(other), expected)
    assert torch.equal(result(model), expected)
    with other.disable_adapter():
        assert torch.equal(result(other), result(make()))
    assert all("forward" not in part.__dict__ for part in other.unload().modules())
    assert torch.equal(result(model), expected)


def test_compiles_to_one_graph():
    model = adapted()
    expected = result(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(result(compiled), expected, rtol=1e-5, atol=1e-6)


# -- modules of every kind -------------------------------------------------------------------------


class Net(nn.Module):
    """A trunk, and a head of several layers with a state of its own."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.ModuleDict(
            {"norm": nn.BatchNorm1d(8), "out": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))}
        )

    def forward(self, x):
        return self.head["out"](self.head["norm"](self.trunk(x)))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
TRUNK = {"target_modules": ["trunk.0", "trunk.2"], "feedforward_modules": ["trunk.2"]}


def make_net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def train_net(model):
    generator = torch.Generator().manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_buffers_of_a_copy_are_its_own(tmp_path):
    base = make_net()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    saved = ["head.norm", "out"]
    model = get_peft_model(base, IA3Config(**TRUNK, modules_to_save=saved))
    peft_model = peft.get_peft_model(make_net(), peft.IA3Config(**TRUNK, modules_to_save=saved))
    train_net(model)
    train_net(peft_model)
    expected = model(X)
    torch.testing.assert_close(expected, peft_model(X), rtol=1e-5, atol=1e-6)
    own = {name: t for name, t in base.state_dict().items() if "ia3_l" not in name}
    torch.testing.assert_close(own, before, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "ours")
    peft_model.save_pretrained(tmp_path / "theirs")
    ours, theirs = map(tensors_in, (tmp_path / "ours", tmp_path / "theirs"))
    assert "base_model.model.head.norm.running_mean" in ours
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for folder in ("ours", "theirs"):
        again = PeftModel.from_pretrained(make_net().eval(), tmp_path / folder)
        torch.testing.assert_close(again(X), expected, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    assert merged is base
    torch.testing.assert_close(merged.eval()(X), expected, rtol=1e-5, atol=1e-6)
    assert base.head["norm"].num_batches_tracked == 3


def test_targets_inside_a_saved_module_need_no_vector():
    targets = ["trunk.0", "out.0"]
    config = IA3Config(target_modules=targets, feedforward_modules=[], modules_to_save=["head.out"])
    assert get_peft_model(make_net(), config).vectors("default").keys() == {"trunk.0"}


# -- under accelerate's hooks ----------------------------------------------------------------------


class Shift(AlignDevicesHook):
    """A hook whose work can be seen."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = super().pre_forward(module, *args, **kwargs)
        return (args[0] + 1, *args[1:]), kwargs


def with_copy(hooked=None):
    """A net with a copy of its last layer, which is hooked before, after or never."""
    base = make_net().eval()
    layer = base.head["out"][1]
    if hooked == "before":
        add_hook_to_module(layer, Shift(execution_device="cpu"))
    model = get_peft_model(base, IA3Config(**TRUNK, modules_to_save=["out.1"]))
    disturb(model, 1)
    if hooked == "after":
        add_hook_to_module(layer, Shift(execution_device="cpu"))
    return model, layer


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("removed", [False, True])
def test_a_hook_works_on_the_module_and_on_its_copy(hooked, removed):
    model, layer = with_copy(hooked)
    if removed:
        remove_hook_from_module(layer)
    plain, _ = with_copy()
    last = plain.model.head["out"][1]
    if not removed:
        last.register_forward_pre_hook(lambda module, args: args[0] + 1)
    assert torch.equal(model(X), plain(X))
    assert torch.equal(model.unload()(X), plain.unload()(X))


def test_offloaded_weights_are_copied_from_where_they_are():
    """accelerate keeps them aside and leaves the module on the meta device between two calls."""
    base = make_net().eval()
    layer = base.head["out"][1]
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    add_hook_to_module(
        layer, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    )
    assert layer.weight.device.type == "meta"
    model = get_peft_model(base, IA3Config(**TRUNK, modules_to_save=["out.1"]))
    plain = make_net().eval()
    assert torch.equal(model(X), plain(X))
    disturb(model, 1)
    assert torch.equal(model(X), with_copy()[0](X))
    with model.disable_adapter():
        assert torch.equal(model(X), plain(X))
    assert layer.weight.device.type == "meta"


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (["head.uot"], r"'head.uot' matches nothing in Net.*did you mean 'head.out'"),
        (["head.out", "head.out.1"], r"'head.out.1' is part of 'head.out', which is saved whole"),
        (["trunk.1"], r"'trunk.1' has no parameters"),
        (["head"], r"'head' is a ModuleDict, which is never called"),
    ],
)
def test_what_cannot_be_saved_is_named(saved, message):
    base = make_net()
    before = snapshot(base)
    with pytest.raises(IA3Error, match=message):
        get_peft_model(base, IA3Config(**TRUNK, modules_to_save=saved))
    assert_unchanged(base, before)


@pytest.mark.parametrize("saved_first", [True, False])
@pytest.mark.parametrize(("rescaled", "saved"), [("trunk.0", "trunk.0"), ("out.0", "head.out")])
def test_what_one_adapter_rescales_another_cannot_save(rescaled, saved, saved_first):
    base = make_net()
    configs = [
        IA3Config(target_modules=["trunk.2"], feedforward_modules=[], modules_to_save=[saved]),
        IA3Config(target_modules=[rescaled], feedforward_modules=[]),
    ]
    first, second = configs if saved_first else reversed(configs)
    model = get_peft_model(base, first)
    before = snapshot(base)
    with pytest.raises(IA3Error, match="another adapter"):
        model.add_adapter("second", second)
    assert_unchanged(base, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classifier.weight", None, r"lacks 'classifier.weight'"),
        ("pooler.weight", torch.ones(2), r"holds 'pooler.weight'"),
        (
            "classifier.weight",
            torch.ones(LABELS + 2, 16),
            r"'classifier.weight' is \[5, 16\], expected \[3, 16\]",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_head_that_does_not_fit_leaves_the_model_unchanged(tmp_path, key, value, message):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {**load_file(file), f"base_model.model.{key}": value}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    base = make()
    before = snapshot(base)
    with pytest.raises(IA3Error, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    before = snapshot(base)
    with pytest.raises(IA3Error, match=message):
        model.load_adapter(tmp_path, "other")
    assert_unchanged(base, before)


def test_an_adapter_that_memory_does_not_suffice_for_leaves_the_model_unchanged(monkeypatch):
    def fails(*args):
        raise RuntimeError("not enough memory")

    model = adapted()
    before = snapshot(model)
    # It rescales one module more, whose site goes again.
    config = IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[])
    with monkeypatch.context() as patched:
        patched.setattr(SavedModule, "add", fails)
        with pytest.raises(RuntimeError, match="not enough memory"):
            model.add_adapter("second", config)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", config)


def test_a_tied_head_of_its_own_leaves_the_embeddings_alone(tiny_gpt2):
    """GPT-2 ties its output layer to its embeddings; the adapter trained the output layer alone."""
    config = IA3Config(target_modules=["c_attn"], modules_to_save=["lm_head"])
    model = IA3Model(tiny_gpt2, config).eval()
    disturb(model, 1)
    ids = torch.arange(3, 9)[None]
    expected = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert merged.config.tie_word_embeddings is False


def test_hooks_on_a_saved_module_run_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    calls = []
    net[1].register_forward_hook(lambda module, args, output: calls.append(module))
    model = IA3Model(net, IA3Config(target_modules=["0"], modules_to_save=["1"]))
    model(torch.ones(1, 3))
    assert calls == [net[1]]
