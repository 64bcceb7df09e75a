"""PEFT's classes by task, and adapters that bring their base model: `AutoPeftModelFor…`."""

from __future__ import annotations

import inspect
import json
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.tfew import word_tokenizer

import ia3
from ia3 import IA3Config, IA3Error, IA3Model, PeftModel, PeftType, TaskType, get_peft_model

VOCABULARY = 48
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = hf.BertConfig(**SMALL, **NO_DROPOUT, max_position_embeddings=16, num_labels=3)
# Without a model that two task types share: AutoModelForQuestionAnswering wants two labels.
MODELS: dict[str, Any] = {
    "CAUSAL_LM": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, pad_token_id=0)),
    "SEQ_2_SEQ_LM": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
    "SEQ_CLS": lambda: hf.BertForSequenceClassification(BERT),
    "TOKEN_CLS": lambda: hf.BertForTokenClassification(BERT),
    "QUESTION_ANS": lambda: hf.BertForQuestionAnswering(
        hf.BertConfig(**{**BERT.to_dict(), "num_labels": 2})
    ),
    "FEATURE_EXTRACTION": lambda: hf.BertModel(BERT),
}
CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}
EVERY_TASK = pytest.mark.parametrize("task", CLASSES)


def inputs(task):
    ids = torch.randint(1, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if task == "SEQ_2_SEQ_LM" else {})


def outputs(model, task):
    with torch.no_grad():
        return model(**inputs(task))[0]


@pytest.fixture
def saved_base(tmp_path):
    """`saved_base(task)` -> a base model, loaded from a folder, which its config names."""

    def make(task):
        folder = tmp_path / "base"
        torch.manual_seed(0)
        MODELS[task]().save_pretrained(folder)
        return type(MODELS[task]()).from_pretrained(folder)

    return make


@pytest.fixture
def saved_adapter(saved_base, tmp_path):
    """`saved_adapter(task)` -> an adapter's folder, beside that of its base model."""

    def make(task="CAUSAL_LM"):
        model = get_peft_model(saved_base("CAUSAL_LM"), IA3Config(task_type=task))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def disturb(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.3 * noise).add_(0.1 * noise)


# -- classes ---------------------------------------------------------------------------------------


@EVERY_TASK
def test_the_class_is_the_tasks(task, tmp_path):
    name = f"PeftModel{CLASSES[task]}"
    model = get_peft_model(MODELS[task](), IA3Config(task_type=task))
    theirs = peft.get_peft_model(MODELS[task](), peft.IA3Config(task_type=task))
    assert type(model) is getattr(ia3, name)
    assert type(model).__name__ == type(theirs).__name__ == name
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path)
    assert type(PeftModel.from_pretrained(MODELS[task](), tmp_path)) is type(model)
    given = getattr(ia3, name).from_pretrained(MODELS[task](), tmp_path)
    assert type(given) is type(model)


def test_the_classes_are_siblings():
    """As in PEFT, one task's class is not another's."""
    assert type(get_peft_model(MODELS["CAUSAL_LM"](), IA3Config())) is IA3Model
    classes = [getattr(ia3, f"PeftModel{name}") for name in CLASSES.values()]
    assert all(not issubclass(a, b) for a in classes for b in classes if a is not b)


def test_names_of_tasks_are_pefts():
    assert {task.name: task.value for task in TaskType} == {
        task.name: task.value for task in peft.TaskType
    }
    assert PeftType.IA3 == peft.PeftType.IA3
    for task in peft.TaskType:
        assert IA3Config(task_type=task).task_type == IA3Config(task_type=task.value).task_type


def test_either_order_of_model_and_config():
    for model in (
        get_peft_model(MODELS["CAUSAL_LM"](), IA3Config(task_type="CAUSAL_LM"), "mine"),
        get_peft_model(IA3Config(task_type="CAUSAL_LM"), MODELS["CAUSAL_LM"](), "mine"),
    ):
        assert model.active_adapters == ["mine"]


def test_the_revision_is_written_down(tmp_path):
    model = get_peft_model(MODELS["CAUSAL_LM"](), IA3Config(), revision="v2")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v2"


@EVERY_TASK
def test_pipelines_take_the_model(task):
    """transformers looks the class up by its name."""
    name = f"PeftModel{CLASSES[task]}"
    from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

    assert any(name in names for names in SUPPORTED_PEFT_TASKS.values())
    if task == "SEQ_CLS":
        model = get_peft_model(MODELS[task]().eval(), IA3Config(task_type=task))
        disturb(model)
        pipe = hf.pipeline("text-classification", model=model, tokenizer=tokenizer(VOCABULARY))
        scored = pipe("w3 w4", top_k=None)
        expected = model(torch.tensor([[3, 4]])).logits.softmax(-1)[0]
        assert {entry["label"]: entry["score"] for entry in scored} == pytest.approx(
            {f"LABEL_{i}": float(p) for i, p in enumerate(expected)}
        )


@pytest.mark.parametrize("trainable", [True, False])
def test_dropout_is_off_unless_the_adapter_is_to_be_trained(tmp_path, trainable):
    """As in PEFT: a base model that was being trained is not used that way by surprise."""
    get_peft_model(MODELS["CAUSAL_LM"](), IA3Config()).save_pretrained(tmp_path)
    modes = []
    for library in (ia3, peft):
        base = MODELS["CAUSAL_LM"]().train()
        model = library.PeftModel.from_pretrained(base, tmp_path, is_trainable=trainable)
        first = [part.training for part in base.modules() if "ia3_l" not in part._modules]
        model.train()
        model.load_adapter(tmp_path, "other", is_trainable=trainable)
        second = [part.training for part in base.modules() if "ia3_l" not in part._modules]
        assert len({*first, *second}) == 1
        modes.append((first[0], second[0]))
    assert modes[0] == modes[1] == (trainable, trainable)


# -- with the base model ---------------------------------------------------------------------------


def auto(library, task):
    return getattr(library, f"AutoPeftModel{CLASSES[task]}" if task else "AutoPeftModel")


@EVERY_TASK
def test_an_adapter_brings_its_base_model(task, saved_base, tmp_path):
    base = saved_base(task)
    model = get_peft_model(base, IA3Config(task_type=task))
    disturb(model)
    expected = outputs(model, task)
    model.save_pretrained(tmp_path / "ours")
    config = ia3.PeftConfig.from_pretrained(tmp_path / "ours")
    assert config.base_model_name_or_path == str(tmp_path / "base")
    again = auto(ia3, task).from_pretrained(tmp_path / "ours")
    assert type(again) is getattr(ia3, f"PeftModel{CLASSES[task]}")
    assert torch.equal(outputs(again, task), expected)
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(outputs(auto(ia3, None).from_pretrained(tmp_path / "ours"), task), expected)
    trainable = auto(ia3, task).from_pretrained(tmp_path / "ours", "mine", is_trainable=True)
    assert trainable.active_adapters == ["mine"]
    assert any(p.requires_grad for p in trainable.parameters())
    theirs = auto(peft, task).from_pretrained(str(tmp_path / "ours"))
    torch.testing.assert_close(outputs(theirs, task), expected, rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = auto(ia3, task).from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(outputs(again, task), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("writer", [ia3, peft], ids=["ours", "peft's"])
def test_without_a_task_the_recorded_class_is_made(writer, saved_base, tmp_path):
    task = "SEQ_2_SEQ_LM"
    model = writer.get_peft_model(saved_base(task), writer.IA3Config())
    disturb(model)
    expected = outputs(model.eval(), task)
    model.save_pretrained(tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["auto_mapping"]
    assert recorded == {
        "base_model_class": "T5ForConditionalGeneration",
        "parent_library": "transformers.models.t5.modeling_t5",
    }
    for reader in (ia3, peft):
        again = reader.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
        assert type(again.get_base_model()) is hf.T5ForConditionalGeneration
        torch.testing.assert_close(outputs(again, task), expected, rtol=1e-5, atol=1e-6)


def test_options_reach_the_base_model(saved_adapter):
    again = ia3.AutoPeftModelForCausalLM.from_pretrained(saved_adapter(), dtype=torch.bfloat16)
    assert again.get_base_model().dtype == torch.bfloat16
    assert {v.dtype for v in again.vectors("default").values()} == {torch.float32}


def test_a_config_in_place_of_the_adapters_own(saved_adapter, tmp_path):
    folder = saved_adapter()
    (tmp_path / "base").rename(tmp_path / "moved")
    config = ia3.PeftConfig.from_pretrained(folder)
    config.base_model_name_or_path = str(tmp_path / "moved")
    again = ia3.AutoPeftModelForCausalLM.from_pretrained(folder, config=config)
    assert isinstance(again, ia3.PeftModelForCausalLM)


UNTRUSTED = ["os", "subprocess", "transformers_evil.models", "ia3.model.ia3_model", None, 3]
NO_MODELS = ["pipeline", "LlamaConfig", "nothing", None]


def write_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("library", "name", "message"),
    [
        *((library, "system", "names no class of transformers") for library in UNTRUSTED),
        *(("transformers", name, "transformers has no model class") for name in NO_MODELS),
    ],
)
def test_a_config_may_choose_models_of_transformers_only(library, name, message, saved_adapter):
    folder = saved_adapter(None)
    mapping = {"parent_library": library, "base_model_class": name}
    write_config(folder, auto_mapping=mapping)
    with pytest.raises(IA3Error, match=message):
        ia3.AutoPeftModel.from_pretrained(folder)


class OwnModel(hf.LlamaForCausalLM):
    """A user's class, in a module of the user's."""


def test_the_user_may_trust_a_library(saved_base, tmp_path):
    saved_base("CAUSAL_LM")
    base = OwnModel.from_pretrained(tmp_path / "base")
    get_peft_model(base, IA3Config()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(IA3Error, match="import_allowlist"):
        ia3.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    for library in (ia3, peft):
        again = library.AutoPeftModel.from_pretrained(
            str(tmp_path / "adapter"), import_allowlist=[OwnModel.__module__]
        )
        assert type(again.get_base_model()) is OwnModel


@pytest.mark.parametrize(
    ("changed", "name", "error", "message"),
    [
        ({}, "SequenceClassification", IA3Error, "CAUSAL_LM, expected SEQ_CLS: use AutoPeftModel"),
        ({"base_model_name_or_path": None}, "CausalLM", IA3Error, "names no base model: load it"),
        (None, "CausalLM", FileNotFoundError, "no adapter"),
    ],
)
def test_what_is_not_there_or_of_another_task(
    changed, name, error, message, saved_adapter, tmp_path
):
    folder = tmp_path
    if changed is not None:
        folder = saved_adapter()
        write_config(folder, **changed)
    kind = getattr(ia3, f"AutoPeftModelFor{name}")
    with pytest.raises(error, match=message):
        kind.from_pretrained(folder)
    with pytest.raises(IA3Error, match=rf"{kind.__name__}\.from_pretrained"):
        kind()


# -- new tokens ------------------------------------------------------------------------------------


def tokenizer(words):
    return word_tokenizer([f"w{i}" for i in range(3, words)])


@pytest.mark.parametrize("library", [ia3, peft])
def test_a_tokenizer_with_more_tokens_makes_room_for_them(library, saved_adapter):
    folder, extended = saved_adapter(), tokenizer(VOCABULARY)
    extended.add_tokens(["new", "newer"])
    extended.save_pretrained(folder)
    again = library.AutoPeftModelForCausalLM.from_pretrained(str(folder))
    assert again.get_input_embeddings().weight.shape[0] == VOCABULARY + 2
    ids = extended("w3 newer", return_tensors="pt").input_ids
    assert ids.tolist() == [[3, VOCABULARY + 1]]
    assert again(input_ids=ids).logits.shape[-1] == VOCABULARY + 2


def test_a_smaller_tokenizer_changes_nothing(saved_adapter):
    folder = saved_adapter()
    tokenizer(VOCABULARY - 10).save_pretrained(folder)
    again = ia3.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert again.get_input_embeddings().weight.shape[0] == VOCABULARY


# -- arguments -------------------------------------------------------------------------------------


def test_the_signatures_take_pefts_arguments():
    """What a script may pass to PEFT's functions, it may pass here."""
    for name in (
        "get_peft_model",
        "inject_adapter_in_model",
        "get_peft_model_state_dict",
        "set_peft_model_state_dict",
        "prepare_model_for_kbit_training",
    ):
        theirs = inspect.signature(getattr(peft, name)).parameters
        ours = inspect.signature(getattr(ia3, name)).parameters
        missing = [argument for argument in theirs if argument not in ours]
        assert missing == [], name
