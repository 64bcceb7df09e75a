"""Adapters on models that are spread over processes: FSDP 1 and 2, tensor parallelism."""

import copy
import warnings
from functools import partial

import peft
import pytest
import torch
import transformers as hf
from support.processes import in_processes, results_of
from support.versions import since
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import ia3
import ia3.compat.peft
from ia3 import IA3Config, IA3Error, IA3Model, get_peft_model

LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
# Its queries are part of a projection whose other values are rescaled, and stay one.
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 64}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BLOCKS = (LlamaDecoderLayer, GPT2Block)
CONFIGS = {
    "llama": {"modules_to_save": ["layers.1.mlp.up_proj"]},
    "gpt2": {"paper_sites": True},
}
# A row for each process.
IDS = torch.arange(3, 19).reshape(2, 8)


def base(kind, dtype=torch.float32):
    """The same bits every time, on every process."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "bias" not in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


def adapted(kind, **options):
    return get_peft_model(base(kind), IA3Config(**CONFIGS[kind]), **options)


def own_row():
    rank = distributed.get_rank()
    return IDS[rank : rank + 1]


def train(model, ids):
    """Two steps, with a weight decay that would move what is to stay one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, weight_decay=0.1)
    model.train()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_saved(folder, expected):
    """A folder holds an adapter that a plain model of one process computes the same with."""
    kind = expected.config.model_type
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its base model is known
        again = IA3Model.from_pretrained(base(kind), folder)
    adapter, wanted = again.adapter("default"), expected.adapter("default")
    close(adapter.vectors, wanted.vectors)
    close(adapter.copies, wanted.copies)
    assert adapter.frozen == wanted.frozen
    close(logits(again), logits(expected))


def refused(change, words):
    with pytest.raises(IA3Error, match=words):
        change()


# -- FSDP 2 ----------------------------------------------------------------------------------------


def shard(model, kinds=BLOCKS):
    for module in list(model.modules()):
        if isinstance(module, kinds):
            fully_shard(module)
    return fully_shard(model)


def fsdp2(folder):
    main = distributed.get_rank() == 0
    for kind in CONFIGS:
        plain = adapted(kind)
        train(plain, IDS)
        model = adapted(kind)
        if kind == "llama":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train(shard(model), own_row())
        # All processes at once, into one folder.
        model.save_pretrained(folder / kind)
        check_saved(folder / kind, plain)
        # As one of them is told to write.
        model.save_pretrained(folder / f"{kind} once", is_main_process=main)
        distributed.barrier()
        check_saved(folder / f"{kind} once", plain)
        # One process alone, of what was gathered before.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if main:
            model.save_pretrained(folder / f"{kind} gathered", state_dict=state)
            check_saved(folder / f"{kind} gathered", plain)
            again = IA3Model.from_pretrained(base(kind), folder / f"{kind} gathered")
            assert again.adapter("default").base == plain.adapter("default").base
        else:
            model.save_pretrained(folder / "none", is_main_process=False, state_dict=state)
            without = partial(model.save_pretrained, folder / "none", state_dict=state)
            refused(without, r"the state_dict has no '(model|transformer)\.")
            assert not (folder / "none").exists()
        # PEFT's functions, and a checkpoint into an adapter that is there.
        values = {k: torch.ones_like(v) for k, v in ia3.get_peft_model_state_dict(plain).items()}
        ia3.set_peft_model_state_dict(model, values)
        assert all(bool((v == 1).all()) for v in model.adapter("default").vectors.values())
        model.load_adapter(folder / kind, "default", is_trainable=True)
        close(model.adapter("default").vectors, plain.adapter("default").vectors)
        close(logits(model), logits(plain))
        if kind == "gpt2":
            model.load_adapter(folder / kind, "other")
        else:
            words = r"'model\.layers\.1\.mlp\.up_proj' is spread over processes already"
            refused(partial(model.load_adapter, folder / kind, "other"), words)
        refused(model.merge_adapter, r"cannot merge \['default'\].* spread over processes")
        refused(model.merge_and_unload, "spread over processes")
        refused(partial(model.delete_adapter, "default"), "FSDP, which would put its vectors back")
        close(logits(model), logits(plain))


def two_adapters(model=None):
    model = get_peft_model(base("llama") if model is None else model, IA3Config(), "one")
    model.add_adapter("two", IA3Config(target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("one", "two"):
            for vector in model.vectors(name).values():
                vector.copy_(torch.rand(vector.shape, generator=generator) + 0.5)
    return model


def check_routed(model, plain):
    """With rows of other adapters on each process; vectors that train, and others."""
    names = [["one", "two"], ["__base__", "one"]][distributed.get_rank()]
    for trained in (["one"], ["two"], []):
        for each in (model, plain):
            each.set_adapter(trained or "one", inference_mode=not trained)
        close(logits(model, adapter_names=names), logits(plain, adapter_names=names))


def fsdp2_in_other_ways(folder):
    plain = two_adapters()
    check_routed(shard(two_adapters()), plain)
    # As one unit, which is left whole after a call without gradients.
    model, trained = shard(adapted("llama"), ()), adapted("llama")
    close(logits(model), logits(trained))
    model.save_pretrained(folder / "whole")
    check_saved(folder / "whole", trained)
    train(model, own_row())
    logits(model)
    refused(model.merge_adapter, "spread over processes")
    model.add_adapter("other", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    refused(partial(model.delete_adapter, "default"), "FSDP, which would put its vectors back")
    model.load_adapter(folder / "whole", "default")
    model.reshard()
    close(logits(model), logits(trained))
    # Every linear layer for itself.
    expected = logits(plain)
    close(logits(shard(copy.deepcopy(plain), nn.Linear)), expected)
    # Sharded before: what is put on it is not the sharded model's to train.
    plain.save_pretrained(folder / "plain")
    sharded = shard(base("llama"))
    with pytest.warns(UserWarning, match="gradients of its vectors are not averaged"):
        model = IA3Model.from_pretrained(sharded, folder / "plain" / "one", is_trainable=True)
    close(logits(model), expected)
    model.save_pretrained(folder / "sharded before")
    close(model.adapter("default").vectors, plain.adapter("one").vectors)
    assert model.adapter("default").base == plain.adapter("one").base


@pytest.mark.slow
def test_fsdp2(tmp_path):
    in_processes(fsdp2, tmp_path)


@pytest.mark.slow
def test_fsdp2_routed_and_sharded_in_other_ways(tmp_path):
    in_processes(fsdp2_in_other_ways, tmp_path)


# -- FSDP 1 ----------------------------------------------------------------------------------------


def wrap(model, policy=None, **options):
    policy = policy or ModuleWrapPolicy(BLOCKS)
    options = {"use_orig_params": True, **options}
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device, **options)


def fsdp1(folder):
    main = distributed.get_rank() == 0
    summoned = FullyShardedDataParallel.summon_full_params
    for kind in CONFIGS:
        plain, model = adapted(kind), adapted(kind)
        train(plain, IDS)
        model = wrap(model)
        if kind == "llama":
            # What is recomputed has the vectors too.
            apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, BLOCKS))
        train(model, own_row())
        with FullyShardedDataParallel.state_dict_type(
            model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)
        ):
            state = model.state_dict()
        if main:
            model.save_pretrained(folder / f"{kind} gathered", state_dict=state)
            check_saved(folder / f"{kind} gathered", plain)
            again = IA3Model.from_pretrained(base(kind), folder / f"{kind} gathered")
            assert again.adapter("default").base == plain.adapter("default").base
        with summoned(model, writeback=False):
            model.save_pretrained(folder / kind)
        check_saved(folder / kind, plain)
        # What FSDP holds in pieces, it alone puts together.
        words = "in pieces, one a process"
        refused(partial(model.save_pretrained, folder / "pieces"), words)
        assert not (folder / "pieces").exists()
        refused(partial(model.load_adapter, folder / kind, "default"), words)
        refused(model.merge_adapter, "spread over processes")
        refused(partial(model.delete_adapter, "default"), "FSDP, which would put its vectors back")
        with summoned(model):
            refused(model.merge_adapter, "spread over processes")
            for vector in model.vectors("default").values():
                nn.init.ones_(vector)
            model.load_adapter(folder / kind, "default")
        close(logits(model), logits(plain))


def fsdp1_in_other_ways(folder):
    # A base model in half precision: all that is flattened together has one dtype.
    model, plain = (
        get_peft_model(base("llama", torch.bfloat16), IA3Config(), autocast_adapter_dtype=False)
        for _ in range(2)
    )
    plain.save_pretrained(folder / "plain")
    expected = logits(plain)
    model = wrap(model)
    model(input_ids=own_row(), labels=own_row()).loss.backward()
    close(logits(model), expected)
    check_routed(wrap(two_adapters()), two_adapters())
    # Every linear layer for itself.
    policy = partial(size_based_auto_wrap_policy, min_num_params=100)
    model = IA3Model.from_pretrained(base("llama"), folder / "plain")
    expected = logits(model)
    close(logits(wrap(model, policy)), expected)
    # Wrapped before.
    for use_orig_params in (True, False):
        wrapped = wrap(base("llama"), use_orig_params=use_orig_params)
        with pytest.warns(UserWarning, match="gradients of its vectors are not averaged"):
            model = IA3Model.from_pretrained(wrapped, folder / "plain", is_trainable=True)
        close(logits(model), expected)
        refused(model.merge_adapter, "spread over processes")
        model.save_pretrained(folder / "wrapped before")
        again = IA3Model.from_pretrained(base("llama"), folder / "wrapped before")
        close(logits(again), expected)
        # A layer's sizes are not those of its weight, which is a piece.
        wrapped = wrap(base("gpt2"), use_orig_params=use_orig_params)
        model = get_peft_model(wrapped, IA3Config(paper_sites=True, inference_mode=True))
        close(logits(model), logits(base("gpt2")))


@pytest.mark.slow
def test_fsdp1(tmp_path):
    in_processes(fsdp1, tmp_path)


@pytest.mark.slow
def test_fsdp1_routed_and_wrapped_in_other_ways(tmp_path):
    in_processes(fsdp1_in_other_ways, tmp_path)


# -- tensor parallelism ----------------------------------------------------------------------------

QWEN2 = {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True}


def planned(folder):
    """A base model of `folder` whose layers each process computes a part of."""
    config = hf.distributed.DistributedConfig(tp_plan="auto")
    return hf.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def whole(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder)


def gradients(model, **options):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, **options).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def tensor_parallel(folder):
    main = distributed.get_rank() == 0
    for targets in (None, "all-linear"):
        # A module that is not split may be saved whole.
        config = IA3Config(target_modules=targets, modules_to_save=["norm"])
        models = [get_peft_model(make(folder / "base"), config) for make in (whole, planned)]
        plain, model = models
        for name, vector in plain.vectors("default").items():
            with torch.no_grad():
                vector.copy_(torch.linspace(0.5, 2, vector.numel()).reshape(vector.shape))
                model.vectors("default")[name].copy_(vector)
        for each in models:
            train(each, IDS)
        close(model.adapter("default").vectors, plain.adapter("default").vectors)
        close(model.adapter("default").copies, plain.adapter("default").copies)
        close(logits(model), logits(plain))
        close(gradients(model), gradients(plain))
        model.save_pretrained(folder / str(targets), is_main_process=main)
        distributed.barrier()
        again = IA3Model.from_pretrained(whole(folder / "base"), folder / str(targets))
        close(logits(again), logits(plain))
        # Read by all, into a model that is split.
        again = IA3Model.from_pretrained(planned(folder / "base"), folder / str(targets))
        close(logits(again), logits(plain))


def tensor_parallel_in_other_ways(folder):
    main = distributed.get_rank() == 0
    plain, model = (two_adapters(make(folder / "base")) for make in (whole, planned))
    plain.save_pretrained(folder / "two", is_main_process=main)
    distributed.barrier()
    for change in (
        lambda each: each.set_adapter(["one", "two"]),
        lambda each: each.gradient_checkpointing_enable({"use_reentrant": False}),
        lambda each: each.use_plain_product(),
        lambda each: each.set_adapter("two"),
        lambda each: each.set_adapter("one"),
        lambda each: each.use_plain_product(False),
        lambda each: each.fuse_mlp(),
        lambda each: each.unfuse_mlp(),
    ):
        change(plain)
        change(model)
        close(gradients(model.train()), gradients(plain.train()))
        close(logits(model.eval()), logits(plain.eval()))
    # A batch of several adapters: with gradients, without, and from a bank.
    names = ["two", "one"]
    for required in (True, False):
        for each in (plain, model):
            each.requires_grad_(False)
            each.set_requires_grad("two", required)
        close(logits(model, adapter_names=names), logits(plain, adapter_names=names))
        if required:
            close(*(gradients(each, adapter_names=names) for each in (model, plain)))
    options = {"max_new_tokens": 5, "do_sample": False, "adapter_names": names}
    assert torch.equal(*(each.generate(IDS, **options) for each in (model, plain)))
    banks = [ia3.AdapterBank(each, capacity=2) for each in (plain, model)]
    for bank in banks:
        bank.add("stored", folder / "two" / "two")
    names = ["stored", "__base__"]
    close(*(logits(bank.model, adapter_names=names) for bank in banks))
    for bank in banks:
        bank.close()
    # What would need the weights whole.
    refused(model.merge_adapter, "cannot merge")
    copied = IA3Config(modules_to_save=["lm_head"])
    words = "weights of its own for it: load the base model without tensor parallelism"
    refused(partial(model.add_adapter, "three", copied), words)
    ia3.compat.peft.install()
    inside = peft.IA3Config(task_type="CAUSAL_LM")
    words = "PEFT's layers do not know: ia3.get_peft_model does"
    refused(partial(peft.get_peft_model, planned(folder / "base"), inside), words)
    # As it was before.
    model.delete_adapter("two")
    bare = logits(planned(folder / "base"))
    assert torch.equal(logits(model.unload()), bare)
    assert torch.equal(logits(model.model), bare)


def tensor_parallel_refused(folder):
    by_hand = base("llama")
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    plan = {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan["mlp.down_proj"] = RowwiseParallel()
    for layer in by_hand.model.layers:
        parallelize_module(layer, mesh, plan)
    experts = planned(folder / "experts")
    for model, words in (
        (by_hand, r"'model\.layers\.0\..* is spread over processes by a plan of torch's"),
        (experts, r"\.experts' is spread .* style 'moe_tp_experts'.* its inner activation"),
    ):
        before = logits(model)
        refused(partial(get_peft_model, model, IA3Config()), words)
        assert torch.equal(logits(model), before)
        assert not [name for name, _ in model.named_modules() if "ia3_l" in name]
    model = get_peft_model(experts, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    assert torch.equal(logits(model), before)


needs_plans = since("transformers", "5.23", "the test's way to ask for it")


def save_base(kind, folder, **sizes):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **sizes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)


@needs_plans
def test_tensor_parallelism_trains_and_saves_the_vectors_of_one_process(tmp_path):
    save_base("llama", tmp_path / "base", **LLAMA)
    results_of(partial(tensor_parallel, tmp_path), tmp_path)


@needs_plans
@pytest.mark.slow
def test_tensor_parallelism_in_four_processes_with_biases_and_tied_embeddings(tmp_path):
    save_base("qwen2", tmp_path / "base", **QWEN2)
    results_of(partial(tensor_parallel, tmp_path), tmp_path, 4)


@needs_plans
@pytest.mark.slow
def test_tensor_parallelism_with_several_adapters_and_all_that_changes_them(tmp_path):
    save_base("qwen2", tmp_path / "base", **QWEN2)
    results_of(partial(tensor_parallel_in_other_ways, tmp_path), tmp_path)


def test_parts_of_which_the_weights_say_nothing_are_refused():
    """As other versions of transformers hold them: plain tensors on each process."""
    model = base("llama")
    model.model.layers[1].mlp.down_proj._is_hooked = True
    words = r"'model\.layers\.1\.mlp\.down_proj' is .* does not say how its input is"
    refused(partial(get_peft_model, model, IA3Config()), words)
    # Of its output each process has all.
    get_peft_model(model, IA3Config(target_modules=["down_proj"], feedforward_modules=[]))


@needs_plans
@pytest.mark.slow
def test_parallelism_whose_parts_are_not_known_is_refused(tmp_path):
    save_base("mixtral", tmp_path / "experts", **LLAMA, num_local_experts=2)
    results_of(partial(tensor_parallel_refused, tmp_path), tmp_path)
