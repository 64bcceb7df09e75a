"""What PEFT's functions take beside what (IA)³ needs: done, or passed over knowingly."""

import copy
import inspect
import warnings

import peft
import pytest
import torch
from accelerate import dispatch_model
from huggingface_hub import hf_hub_download
from support.pairs import logits, randomize, vectors
from transformers import LlamaConfig, LlamaForSequenceClassification

import ia3
from ia3 import IA3Config, IA3Error, PeftModel, get_peft_model
from ia3.files.hub import CONFIG_NAME, HubOptions, adapter_folder, hub_options

IDS = {"input_ids": torch.arange(3, 11)[None]}
# All that PEFT 0.21's functions, and those of transformers that call them, pass on.
PLACING = {
    "device_map": "auto",
    "max_memory": {"cpu": "1GiB"},
    "offload_folder": "offload",
    "offload_index": None,
    "torch_dtype": torch.bfloat16,
    "dtype": torch.bfloat16,
    "use_safetensors": True,
    "torch_device": "cpu",
    "trust_remote_code": False,
}


@pytest.fixture
def folder(make_model, tmp_path):
    """An adapter in a folder."""
    model = get_peft_model(make_model("llama"), IA3Config(task_type="CAUSAL_LM"))
    randomize(vectors(model))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def expected(make_model, folder):
    return logits(peft.PeftModel.from_pretrained(make_model("llama"), folder), **IDS)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_places_a_base_model_is_passed_over_in_silence(make_model, folder, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(make_model("llama"), folder, **PLACING)
        close(logits(model, **IDS), expected)
        report = model.load_adapter(folder, "second", **PLACING)
    assert report == ([], [])
    assert {vector.dtype for vector in model.vectors("second").values()} == {torch.float32}
    assert model.get_base_model().dtype == torch.float32


def test_arguments_are_taken_by_place_as_peft_takes_them(make_model, folder, expected):
    for library in (ia3, peft):
        base = make_model("llama")
        model = library.PeftModel.from_pretrained(
            base, folder, "default", True, None, True, False, False, None
        )
        report = model.load_adapter(folder, "second", False, None, True, False, False, None)
        model.add_adapter("third", library.IA3Config(), False, True)
        assert not report.unexpected_keys
        assert not [key for key in report.missing_keys if "ia3_" in key]
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(key.endswith(".default") for key in trained)
        close(logits(model.eval(), **IDS), expected)
        saved = folder / library.__name__
        model.save_pretrained(saved, True, ["second"], False, True, None, max_shard_size="1GB")
        assert (saved / "second" / "adapter_model.safetensors").is_file()
        model.set_adapter("second", True)
        merged = model.merge_and_unload(False, True, ["second"])
        close(logits(merged, **IDS), expected)
        again = library.PeftModel(make_model("llama"), library.IA3Config(), "a", True, False)
        assert again.active_adapter == "a"
        assert (
            library.get_peft_model(
                make_model("llama"), library.IA3Config(), "a", False, True, "v1", False
            )
            .peft_config["a"]
            .revision
            == "v1"
        )


def test_an_argument_that_means_nothing_is_named_once(make_model, folder, expected):
    with pytest.warns(UserWarning, match="'load_in_8bit' means nothing for an adapter") as seen:
        model = PeftModel.from_pretrained(make_model("llama"), folder, load_in_8bit=True)
    assert [warning.filename for warning in seen] == [__file__]
    close(logits(model, **IDS), expected)
    with pytest.warns(UserWarning, match="'revison' .* did you mean 'revision'") as seen:
        model.load_adapter(folder, "second", revison="v2")
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(UserWarning, match="'task_type' means nothing") as seen:
        assert ia3.PeftConfig.from_pretrained(folder, task_type="SEQ_CLS").task_type == "CAUSAL_LM"
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(UserWarning, match="'push_to_hub' means nothing") as seen:
        model.save_pretrained(folder / "new", push_to_hub=True)
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(UserWarning, match="'task' means nothing") as seen:
        ia3.load_peft_weights(folder, task="SEQ_CLS")
    assert [warning.filename for warning in seen] == [__file__]


def test_a_dispatched_base_model_stays_dispatched(make_model, folder, expected, tmp_path):
    base = make_model("llama")
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    dispatch_model(base, {**layers, **rest}, main_device="cpu", offload_dir=tmp_path / "off")
    placing = PLACING | {"offload_folder": str(tmp_path / "other")}
    model = PeftModel.from_pretrained(base, folder, **placing)
    close(logits(model, **IDS), expected)
    assert not model.load_adapter(folder, "second", **placing).missing_keys
    model.set_adapter("second")
    close(logits(model, **IDS), expected)
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    assert not (tmp_path / "other").exists()


def test_what_says_where_an_adapter_is_on_the_hub_is_huggingface_hubs(folder):
    known = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "dry_run"}
    assert known <= {*HubOptions.__annotations__, *inspect.signature(adapter_folder).parameters}
    assert hub_options({"use_auth_token": "hf_old"}) == {"token": "hf_old"}
    assert hub_options({"use_auth_token": "hf_old", "token": "hf_new"}) == {"token": "hf_new"}
    inside = {"subfolder": folder.name, "revision": "main", "force_download": False}
    assert ia3.PeftConfig.from_pretrained(folder.parent, **inside).task_type == "CAUSAL_LM"
    assert ia3.PeftConfig.from_pretrained(folder.parent, folder.name).task_type == "CAUSAL_LM"


def test_a_config_keeps_the_version_of_the_peft_that_wrote_it(tmp_path):
    peft.IA3Config(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = ia3.PeftConfig.from_pretrained(tmp_path)
    assert config.peft_version == peft.__version__
    assert IA3Config().peft_version is None
    assert config == IA3Config.from_peft_type(**IA3Config.from_json_file(tmp_path / CONFIG_NAME))
    config.save_pretrained(tmp_path / "again", auto_mapping_dict={"parent_library": "mine"})
    again = peft.PeftConfig.from_pretrained(tmp_path / "again")
    assert again.peft_version == peft.__version__
    assert again.auto_mapping == {"parent_library": "mine"}
    assert config.auto_mapping is None
    IA3Config().save_pretrained(tmp_path / "own")
    assert "peft_version" not in IA3Config.from_json_file(tmp_path / "own" / CONFIG_NAME)
    assert peft.PeftConfig.from_pretrained(tmp_path / "own") == peft.IA3Config()


def test_an_adapter_loaded_to_be_trained_trains_though_not_active(make_model, folder):
    for library in (ia3, peft):
        model = library.PeftModel.from_pretrained(make_model("llama"), folder)
        model.load_adapter(folder, "second", is_trainable=True)
        assert model.active_adapter == "default"
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trained == {key for key in trained if key.endswith(".second")} != set()


def test_weights_are_read_as_peft_reads_them(folder, make_model):
    ours, theirs = ia3.load_peft_weights(folder), peft.load_peft_weights(str(folder))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    mapping = {r"^model\.layers\.(\d+)\.mlp": r"body.\1.mlp", "never": "used"}
    ours = ia3.load_peft_weights(folder, "cpu", mapping)
    theirs = peft.load_peft_weights(str(folder), "cpu", key_mapping=mapping)
    assert ours.keys() == theirs.keys()
    assert any(".body.0.mlp" in key for key in ours)
    inside = ia3.load_peft_weights(folder.parent, subfolder="adapter")
    assert inside.keys() == ia3.load_peft_weights(folder).keys()
    old = peft.get_peft_model(make_model("llama"), peft.IA3Config())
    old.save_pretrained(folder / "old", safe_serialization=False)
    assert ia3.load_peft_weights(folder / "old").keys() == inside.keys()
    with pytest.raises(FileNotFoundError, match="no adapter"):
        ia3.load_peft_weights(folder.parent)


# -- another size ----------------------------------------------------------------------------------


def classifier(labels, width=24):
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": width, "num_labels": labels}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    torch.manual_seed(labels)
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture
def classified(tmp_path):
    """A classifier of three labels in a folder."""
    model = get_peft_model(classifier(3), IA3Config(task_type="SEQ_CLS"))
    randomize(vectors(model))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_what_is_of_another_size_is_left_as_it_begins(classified):
    loaded = []
    for library in (peft, ia3):
        base = classifier(5)
        with pytest.warns(UserWarning, match="score"):
            model = library.PeftModel.from_pretrained(
                copy.deepcopy(base), classified, ignore_mismatched_sizes=True
            )
        with pytest.warns(UserWarning, match="score"):
            model.load_adapter(classified, "more", ignore_mismatched_sizes=True)
        model.set_adapter("more")
        loaded.append(logits(model.eval(), **IDS))
    close(loaded[1], loaded[0])
    with pytest.raises(IA3Error, match=r"'score.weight' is \[3, 16\], expected \[5, 16\]"):
        PeftModel.from_pretrained(classifier(5), classified)
    base = classifier(5)
    base.score = torch.compile(base.score, backend="eager")
    with pytest.warns(UserWarning, match="score"):
        model = PeftModel.from_pretrained(base, classified, ignore_mismatched_sizes=True)
    close(logits(model, **IDS), loaded[1])


def test_vectors_of_another_size_are_left_and_reported(classified):
    reports = []
    for library in (peft, ia3):
        config = library.IA3Config(task_type="SEQ_CLS")
        model = library.get_peft_model(classifier(3, width=20), config, "first")
        for name in ("second", "first"):  # a new one, and into one that is there
            with pytest.warns(UserWarning, match="down_proj"):
                report = model.load_adapter(classified, name, ignore_mismatched_sizes=True)
            reports.append(report)
        assert (vectors(model, "second")["model.layers.0.mlp.down_proj"] == 1).all()
        assert not (vectors(model, "second")["model.layers.0.self_attn.k_proj"] == 1).any()
    assert reports[:2] == reports[2:]
    assert reports[0].missing_keys == ["base_model.model.model.layers.0.mlp.down_proj.ia3_l.second"]


# -- low-level functions ---------------------------------------------------------------------------


def test_a_merged_adapter_does_not_take_other_values(make_model):
    for wrapped in (True, False):
        base = make_model("llama")
        model = (
            get_peft_model(base, IA3Config())
            if wrapped
            else ia3.inject_adapter_in_model(IA3Config(), base)
        )
        face = model if wrapped else model._ia3_model
        tensors = {key: value + 1 for key, value in ia3.get_peft_model_state_dict(model).items()}
        face.merge_adapter()
        with pytest.raises(IA3Error, match=r"'default' is merged: unmerge_adapter\(\) first"):
            ia3.set_peft_model_state_dict(model, tensors)
        face.unmerge_adapter()
        assert (ia3.get_peft_model_state_dict(model)[min(tensors)] == 1).all()
        ia3.set_peft_model_state_dict(model, tensors)
        assert (ia3.get_peft_model_state_dict(model)[min(tensors)] == 2).all()


def test_a_model_unloaded_by_hand_takes_an_adapter_again(make_model):
    base = make_model("llama")
    expected = logits(base, **IDS)
    for times in range(3):
        model = ia3.inject_adapter_in_model(IA3Config(init_ia3_weights=False), base)
        assert model is base
        assert not torch.equal(logits(model, **IDS), expected), times
        model._ia3_model.unload()
        assert torch.equal(logits(model, **IDS), expected)
    model = ia3.inject_adapter_in_model(IA3Config(), base)
    model._ia3_model.delete_adapter("default")
    ia3.inject_adapter_in_model(IA3Config(), base, "other")
    assert ia3.get_model_status(base).available_adapters == ["other"]


def test_a_mapping_without_the_adapters_name_is_refused():
    with pytest.raises(IA3Error, match=r"peft_config has \['a'\], expected 'default' in it"):
        ia3.IA3Model(classifier(3), {"a": IA3Config()})
