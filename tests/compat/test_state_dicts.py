"""PEFT's low-level functions: adapters without a wrapper, and their tensors by key."""

import copy
import pickle
import threading

import peft
import pytest
import torch
from support.pairs import logits, randomize
from transformers import LlamaConfig, LlamaForSequenceClassification

import ia3
from ia3 import IA3Config, IA3Error
from ia3.core.route import LOCK
from ia3.errors import InvalidTypeError

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

KINDS = ["llama", "gpt2", "t5"]
EVERY_MODEL = pytest.mark.parametrize("kind", KINDS)
LIBRARIES = pytest.mark.parametrize(("one", "other"), [(ia3, peft), (peft, ia3)])


def put_on(library, model, wrapped, **config):
    chosen = library.IA3Config(**config)
    if wrapped:
        return library.get_peft_model(model, chosen)
    return library.inject_adapter_in_model(chosen, model)


def change(library, model, adapter_name="default"):
    """Give an adapter's tensors other values, and return these."""
    tensors = library.get_peft_model_state_dict(model, adapter_name=adapter_name)
    values = {key: torch.ones(tensor.shape) for key, tensor in tensors.items()}
    randomize(values)
    assert not library.set_peft_model_state_dict(model, values, adapter_name).unexpected_keys
    return values


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@EVERY_MODEL
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "injected"])
@LIBRARIES
def test_tensors_interchange(make_model, make_inputs, kind, wrapped, one, other):
    inputs = make_inputs(kind)
    first = put_on(one, make_model(kind), wrapped)
    second = put_on(other, make_model(kind), wrapped)
    tensors = change(one, first)
    assert tensors.keys() == other.get_peft_model_state_dict(second).keys()
    assert all(key.startswith("base_model.model.") == wrapped for key in tensors)
    assert not other.set_peft_model_state_dict(second, tensors).unexpected_keys
    assert_same(other.get_peft_model_state_dict(second), tensors)
    changed = logits(first, **inputs)
    assert not torch.allclose(changed, logits(make_model(kind), **inputs))
    torch.testing.assert_close(changed, logits(second, **inputs), rtol=1e-5, atol=1e-5)


def test_heads_interchange():
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_labels": 3}
    small = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(small).eval()
    models = [put_on(lib, copy.deepcopy(base), True, task_type="SEQ_CLS") for lib in (ia3, peft)]
    tensors = change(ia3, models[0])
    assert "base_model.model.score.weight" in tensors
    assert tensors.keys() == peft.get_peft_model_state_dict(models[1]).keys()
    peft.set_peft_model_state_dict(models[1], tensors)
    ids = {"input_ids": torch.arange(3, 9)[None]}
    ours, theirs = (logits(model.eval(), **ids) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # The base model's own head is left as it was.
    assert torch.equal(models[0].get_base_model().score.weight, base.score.weight)


@LIBRARIES
def test_several_adapters(make_model, one, other):
    chosen = {"target_modules": ["k_proj", "q_proj"], "feedforward_modules": []}
    models = []
    for library in (one, other):
        model = put_on(library, make_model("llama"), True)
        model.add_adapter("other", library.IA3Config(**chosen))
        models.append(model)
    tensors = change(one, models[0], "other")
    before = copy.deepcopy(other.get_peft_model_state_dict(models[1]))
    other.set_peft_model_state_dict(models[1], tensors, adapter_name="other")
    assert_same(other.get_peft_model_state_dict(models[1], adapter_name="other"), tensors)
    assert_same(other.get_peft_model_state_dict(models[1]), before)


def test_injecting_twice_makes_the_second_active(make_model, make_inputs):
    inputs, results = make_inputs("llama"), []
    for library in (ia3, peft):
        model = put_on(library, make_model("llama"), False)
        change(library, model)
        second = library.IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=[])
        assert library.inject_adapter_in_model(second, model, "second") is model
        change(library, model, "second")
        results.append(logits(model, **inputs))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@EVERY_MODEL
def test_the_model_stays_the_same_and_trains_the_vectors_alone(make_model, make_inputs, kind):
    base, inputs = make_model(kind), make_inputs(kind)
    expected, keys = logits(base, **inputs), set(base.state_dict())
    model = ia3.inject_adapter_in_model(IA3Config(), base)
    assert model is base
    assert torch.equal(logits(model, **inputs), expected)
    assert {n for n in model.state_dict() if "ia3_l" not in n} == keys
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith(".ia3_l.default") for name in trained)
    model(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_an_injected_model_are_independent(twin, make_model, make_inputs):
    inputs = make_inputs("llama")
    model = ia3.inject_adapter_in_model(IA3Config(), make_model("llama"))
    expected = logits(model, **inputs)
    other = twin(model)
    change(ia3, other)
    ia3.inject_adapter_in_model(IA3Config(), other, "second")
    assert torch.equal(logits(model, **inputs), expected)
    with pytest.raises(IA3Error, match="'second'"):
        ia3.get_peft_model_state_dict(model, adapter_name="second")


def test_sites_from_a_state_dict(make_model):
    """As PEFT does: its keys say what is rescaled, its values are not loaded."""
    tensors = {
        "model.layers.1.self_attn.o_proj.ia3_l": torch.full((32, 1), 2.0),
        "model.layers.0.mlp.down_proj.ia3_l": torch.full((1, 48), 2.0),
    }
    modules = {"target_modules": ["o_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ones = {key: torch.ones_like(value) for key, value in tensors.items()}
    for library in (ia3, peft):
        config = library.IA3Config(**modules)
        model = library.inject_adapter_in_model(config, make_model("llama"), state_dict=tensors)
        assert_same(library.get_peft_model_state_dict(model), ones)
    # Without a config's modules, the shapes tell the sides.
    model = ia3.inject_adapter_in_model(IA3Config(), make_model("llama"), state_dict=tensors)
    assert ia3.get_peft_model_state_dict(model).keys() == tensors.keys()
    base, none = make_model("llama"), {"lm_head.weight": torch.ones(2)}
    with pytest.raises(IA3Error, match="holds no vector"):
        ia3.inject_adapter_in_model(IA3Config(), base, state_dict=none)


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "injected"])
def test_compiled_models_and_state_dicts_that_were_gathered(make_model, wrapped):
    model = put_on(ia3, make_model("llama"), wrapped)
    compiled = torch.compile(model)
    tensors = change(ia3, compiled)
    assert_same(ia3.get_peft_model_state_dict(compiled), tensors)
    for each in (compiled, model):
        gathered = {name: value + 1 for name, value in each.state_dict().items()}
        found = ia3.get_peft_model_state_dict(each, gathered)
        assert_same(found, {name: value + 1 for name, value in tensors.items()})


def test_the_prefix_may_be_absent_or_present(make_model):
    wrapped, injected, again = (put_on(ia3, make_model("llama"), w) for w in (True, False, True))
    tensors = change(ia3, wrapped)
    ia3.set_peft_model_state_dict(injected, tensors)
    ia3.set_peft_model_state_dict(again, ia3.get_peft_model_state_dict(injected))
    assert_same(ia3.get_peft_model_state_dict(again), tensors)


def test_values_that_stay_one_are_one_for_peft_too(make_model, make_inputs):
    """The query part of GPT-2's fused projection, even after something has moved it."""
    inputs = make_inputs("gpt2")
    model = ia3.get_peft_model(make_model("gpt2"), IA3Config(paper_sites=True))
    for vector in model.vectors("default").values():
        vector.data.fill_(0.7)
    tensors = ia3.get_peft_model_state_dict(model)
    config = model.peft_config["default"].to_dict()
    modules = {name: config[name] for name in ("target_modules", "feedforward_modules")}
    theirs = put_on(peft, make_model("gpt2"), True, **modules)
    peft.set_peft_model_state_dict(theirs, tensors)
    ours, theirs = logits(model, **inputs), logits(theirs, **inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "injected"])
def test_keys_that_do_not_fit_are_reported_in_pefts_words(make_model, wrapped):
    reports = []
    for library in (ia3, peft):
        model = put_on(library, make_model("llama"), wrapped)
        before = change(library, model)
        tensors = {key: value + 1 for key, value in before.items()}
        gone, before_name = min(tensors), "base_model.model." * wrapped
        was = before[gone].clone()
        del tensors[gone]
        given = tensors | {f"{before_name}nowhere.ia3_l": torch.ones(3)}
        report = library.set_peft_model_state_dict(model, given)
        # PEFT misses the base model's own keys too.
        missing = [key for key in report.missing_keys if "ia3_" in key]
        reports.append((missing, report.unexpected_keys))
        assert_same(library.get_peft_model_state_dict(model), tensors | {gone: was})
    assert reports[0] == reports[1]
    assert all(map(len, reports[0]))


def test_another_shape_is_an_error_that_changes_nothing(make_model):
    model = put_on(ia3, make_model("llama"), True)
    before = change(ia3, model)
    spoiled = max(before)
    tensors = {key: value + 1 for key, value in before.items()} | {spoiled: torch.ones(5, 1)}
    with pytest.raises(IA3Error, match=rf"{spoiled} is \[5, 1\], expected \[16, 1\]"):
        ia3.set_peft_model_state_dict(model, tensors)
    assert_same(ia3.get_peft_model_state_dict(model), before)
    result = ia3.set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert result.missing_keys == [f"{spoiled}.default"]
    assert_same(ia3.get_peft_model_state_dict(model), tensors | {spoiled: before[spoiled]})


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "injected"])
def test_an_adapter_that_is_not_there(make_model, wrapped):
    model = put_on(ia3, make_model("llama"), wrapped)
    with pytest.raises(IA3Error, match="'other'"):
        ia3.get_peft_model_state_dict(model, adapter_name="other")
    with pytest.raises(IA3Error, match="'other'"):
        ia3.set_peft_model_state_dict(model, {}, adapter_name="other")
    with pytest.raises(IA3Error, match="'default'"):
        ia3.get_peft_model_state_dict(make_model("llama"))


CHANGES = {
    "set": lambda model: ia3.set_peft_model_state_dict(model, {}),
    "inject": lambda model: ia3.inject_adapter_in_model(IA3Config(), model, "second"),
    "cast": lambda model: ia3.cast_mixed_precision_params(model, torch.bfloat16),
    "train": lambda model: model._ia3_model.set_requires_grad("default"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_adapters_waits_for_the_change_before(make_model, change):
    model = ia3.inject_adapter_in_model(IA3Config(), make_model("llama"))
    thread = threading.Thread(target=change, args=[model])
    with LOCK:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()


def test_two_threads_inject_into_one_model(make_model):
    for _ in range(5):
        model, ready, errors = make_model("llama"), threading.Barrier(2), []

        def inject(name, model=model, ready=ready, errors=errors):
            ready.wait()
            try:
                ia3.inject_adapter_in_model(IA3Config(), model, name)
            except IA3Error as error:
                errors.append(error)

        threads = [threading.Thread(target=inject, args=[name]) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert ia3.get_model_status(model).available_adapters == ["one", "two"]


SPOILED = {
    "sparse": lambda value: value.to_sparse(),
    "complex64": lambda value: value.to(torch.complex64),
    "meta device": lambda value: value.to("meta"),
    "qint8": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "float8_e8m0fnu": lambda value: value.to(torch.float8_e8m0fnu),
}


@pytest.mark.parametrize("problem", SPOILED)
def test_tensors_of_another_kind_are_named_and_nothing_is_loaded(make_model, problem):
    model = ia3.inject_adapter_in_model(IA3Config(), make_model("llama"))
    before = ia3.get_peft_model_state_dict(model)
    before = {key: tensor.clone() for key, tensor in before.items()}
    *_, last = sorted(before)
    given = {key: torch.full_like(tensor, 2) for key, tensor in before.items()}
    given[last] = SPOILED[problem](given[last])
    with pytest.raises(InvalidTypeError, match=f"'{last}' is .*{problem}"):
        ia3.set_peft_model_state_dict(model, given)
    with pytest.raises(InvalidTypeError, match=f"'{last}' is .*{problem}"):
        ia3.inject_adapter_in_model(IA3Config(), make_model("llama"), state_dict=given)
    assert_same(ia3.get_peft_model_state_dict(model), before)


def test_state_dicts_that_are_none(make_model):
    model = ia3.inject_adapter_in_model(IA3Config(), make_model("llama"))
    for given in ([1], None, "a", {1: torch.ones(1)}, {b"a": torch.ones(1)}):
        with pytest.raises(InvalidTypeError, match="expected a mapping from names to tensors"):
            ia3.set_peft_model_state_dict(model, given)
    with pytest.raises(InvalidTypeError, match="expected a mapping"):
        ia3.inject_adapter_in_model(IA3Config(), make_model("llama"), state_dict={1: 2})
    with pytest.raises(InvalidTypeError, match="expected a mapping"):
        ia3.get_peft_model_state_dict(model, {1: 2})
    with pytest.raises(IA3Error, match="state_dict has no 'model"):
        ia3.get_peft_model_state_dict(model, {})


class WithMore(torch.nn.Linear):
    def get_extra_state(self):
        return {"more": 1}

    def set_extra_state(self, state):
        self.more = state


def test_state_dicts_may_hold_what_is_no_tensor(make_model, tmp_path):
    base = make_model("llama")
    base.more = WithMore(2, 2)
    model = ia3.get_peft_model(base, IA3Config())
    state = model.state_dict()
    assert state["model.more._extra_state"] == {"more": 1}
    # As the Trainer does it.
    model.save_pretrained(tmp_path, state_dict=state)
    given = ia3.get_peft_model_state_dict(model, state)
    assert ia3.load_peft_weights(tmp_path, device="cpu").keys() == given.keys()
    ia3.set_peft_model_state_dict(model, {**given, "more._extra_state": {}})
    ia3.set_base_model_state_dict(model, base.state_dict() | {"more._extra_state": 7})
    assert base.more.more == 7
