"""Folders that PEFT wrote: without a head, with vectors of no effect, from before a renaming."""

import json

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.snapshots import assert_unchanged, snapshot

from ia3 import AdapterBank, IA3Config, IA3Error, PeftConfig, PeftModel, get_peft_model

LABELS = 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24}
BART = {"vocab_size": 48, "num_labels": LABELS, "d_model": 16, "pad_token_id": 0}
BART |= {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
XLNET = {"vocab_size": 48, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
BERT = {**SMALL, "vocab_size": 48, "num_labels": LABELS, "max_position_embeddings": 16}
VISION = {**SMALL, "image_size": 8, "patch_size": 4}
TEXT = {**SMALL, "vocab_size": 64, "num_key_value_heads": 2}

IDS = {"input_ids": torch.tensor([[3, 5, 7, 2], [4, 4, 6, 2]])}
PICTURE = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
K_V_FC2 = {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}
LAYERS = {"target_modules": ["layer_1", "layer_2"], "feedforward_modules": ["layer_2"]}
KEY = {"target_modules": ["key"], "feedforward_modules": []}
ALL = {"target_modules": "all-linear", "feedforward_modules": []}
TASK = {"task_type": "SEQ_CLS"}


def bart():
    return hf.BartForSequenceClassification(hf.BartConfig(**BART))


def xlnet():
    return hf.XLNetForSequenceClassification(hf.XLNetConfig(**XLNET, num_labels=LABELS))


def siglip():
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION))


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**BERT))


# A folder's name -> its model, PEFT's config, and inputs.
FOLDERS = {
    "BART": (bart, {**K_V_FC2, **TASK}, IDS),
    "XLNet": (xlnet, {**LAYERS, **TASK}, IDS),
    "SigLIP": (siglip, ALL, PICTURE),
    "BERT": (bert, {**KEY, **TASK}, IDS),
}


def make(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FOLDERS[kind][0]().eval()


def result(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def disturb(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=FOLDERS)
def written(request, tmp_path):
    """(its kind, PEFT's folder, what PEFT computes with it)."""
    _, modules, inputs = FOLDERS[request.param]
    model = peft.get_peft_model(make(request.param), peft.IA3Config(**modules)).eval()
    disturb(model)
    model.save_pretrained(tmp_path / "theirs")
    return request.param, tmp_path / "theirs", result(model, inputs)


def test_they_load_and_go_back(written, tmp_path):
    kind, folder, expected = written
    inputs, base = FOLDERS[kind][2], make(kind)
    model = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(result(model, inputs), expected, rtol=1e-5, atol=1e-6)
    model.load_adapter(folder, "default")
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    torch.testing.assert_close(result(model, inputs), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "ours", adapter_name="second")
    theirs = peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours")
    torch.testing.assert_close(result(theirs, inputs), expected, rtol=1e-5, atol=1e-6)
    again = PeftModel.from_pretrained(make(kind), tmp_path / "ours")
    assert torch.equal(result(again, inputs), result(model, inputs))
    # What has no vector is not named either.
    named = PeftConfig.from_pretrained(tmp_path / "ours").target_modules
    assert "head.attention.out_proj" not in named
    merged = model.merge_and_unload()
    torch.testing.assert_close(result(merged, inputs), expected, rtol=1e-5, atol=1e-5)


def test_their_configs_make_new_adapters(written):
    kind, folder, _ = written
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model = get_peft_model(make(kind), config)
    theirs = load_file(folder / "adapter_model.safetensors")
    vectors = {n.split(".", 2)[2].removesuffix(".ia3_l") for n in theirs if n.endswith(".ia3_l")}
    # Of SigLIP, the module whose weight torch reads without calling it.
    assert vectors - model.vectors("default").keys() <= {"head.attention.out_proj"}
    out = model(**FOLDERS[kind][2])
    (out.pooler_output if kind == "SigLIP" else out[0]).square().sum().backward()
    assert all(v.grad is not None for v in model.vectors("default").values())


def test_without_a_head_they_go_into_a_bank(tmp_path):
    _, modules, inputs = FOLDERS["BART"]
    theirs = peft.get_peft_model(make("BART"), peft.IA3Config(**modules)).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = get_peft_model(make("BART"), IA3Config(**K_V_FC2), "own")
    AdapterBank(model, 2).add("theirs", tmp_path)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["theirs", "__base__"])[0]
    torch.testing.assert_close(mixed[0], result(theirs, inputs)[0], rtol=1e-4, atol=1e-5)


def test_heads_that_early_versions_left_out_of_the_config(tmp_path):
    """PEFT 0.4 trained and saved the head, and named it nowhere."""
    model = peft.get_peft_model(make("BERT"), peft.IA3Config(**KEY, **TASK)).eval()
    disturb(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": None}))
    again = PeftModel.from_pretrained(make("BERT"), tmp_path)
    torch.testing.assert_close(result(again, IDS), result(model, IDS), rtol=1e-5, atol=1e-6)


def test_what_is_no_part_of_the_model_is_named(tmp_path):
    peft.get_peft_model(make("BART"), peft.IA3Config(**K_V_FC2)).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: {**tensors, f"{PREFIX}model.other.weight": torch.ones(2)})
    base = make("BART")
    before = snapshot(base)
    with pytest.raises(IA3Error, match=r"holds 'model\.other\.weight'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


# -- modules that were renamed ---------------------------------------------------------------------

PREFIX = "base_model.model."
LLAVA = hf.LlavaConfig(
    vision_config=hf.CLIPVisionConfig(**VISION),
    text_config=hf.LlamaConfig(**TEXT),
    image_token_index=5,
)
PROMPT = {"input_ids": torch.tensor([[5, 5, 5, 5, 7, 9]]), "pixel_values": torch.ones(1, 3, 8, 8)}
QWEN2_VL = hf.Qwen2VLConfig(
    vision_config={**SMALL, "depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 1},
    text_config={
        **TEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    },
)
# A model -> it, inputs, and what its modules were called before -> what they are called now.
RENAMED = {
    "LLaVA": (
        lambda: hf.LlavaForConditionalGeneration(LLAVA),
        PROMPT,
        {
            "language_model.lm_head": "lm_head",
            "language_model.model": "model.language_model",
            "vision_tower.vision_model": "model.vision_tower",
            "multi_modal_projector": "model.multi_modal_projector",
        },
    ),
    "Qwen2-VL": (
        lambda: hf.Qwen2VLForConditionalGeneration(QWEN2_VL),
        {"input_ids": torch.tensor([[3, 4, 7, 9]])},
        {"visual": "model.visual", "model": "model.language_model"},
    ),
}
K_V_DOWN = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
K_V_DOWN |= {"feedforward_modules": ["down_proj"]}
EXPRESSION = {"target_modules": r".*language_model.*\.(k_proj|down_proj)"}
EXPRESSION |= {"feedforward_modules": r".*language_model.*\.down_proj"}
WHICH = {
    "suffixes": K_V_DOWN,
    "whole names": ALL,
    "an expression": EXPRESSION,
    "with a saved module": {**K_V_DOWN, "modules_to_save": ["lm_head"]},
}


def edit(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def before_renaming(kind, name):
    """What a module was called."""
    for old, new in RENAMED[kind][2].items():
        if f"{name}.".startswith(f"{new}."):
            return old + name.removeprefix(new)
    return name


def make_renamed(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RENAMED[kind][0]().eval()


@pytest.fixture(params=[(kind, which) for kind in RENAMED for which in WHICH], ids="-".join)
def older(request, tmp_path):
    """(a model's kind, a folder from before its modules were renamed, what PEFT computes)."""
    kind, which = request.param
    config = WHICH[which]
    if isinstance(config.get("feedforward_modules"), str):
        # PEFT takes lists alone.
        config = {**config, "feedforward_modules": ["down_proj"]}
    model = peft.get_peft_model(make_renamed(kind), peft.IA3Config(**config)).eval()
    disturb(model)
    folder = tmp_path / "older"
    model.save_pretrained(folder)

    def old(key):
        return PREFIX + before_renaming(kind, key.removeprefix(PREFIX))

    edit(folder, lambda tensors: {old(key): value for key, value in tensors.items()})
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    for field in ("target_modules", "feedforward_modules"):
        entries = values[field]
        if isinstance(entries, str) and kind == "Qwen2-VL":
            values[field] = entries.replace("language_model", "layers")
        elif isinstance(entries, list):
            values[field] = [before_renaming(kind, entry) for entry in entries]
    file.write_text(json.dumps(values))
    return kind, folder, result(model, RENAMED[kind][1])


def test_adapters_from_before_modules_were_renamed_load(older, tmp_path):
    kind, folder, expected = older
    inputs = RENAMED[kind][1]
    model = PeftModel.from_pretrained(make_renamed(kind), folder)
    torch.testing.assert_close(result(model, inputs), expected, rtol=1e-5, atol=1e-6)
    model.load_adapter(folder, "default")
    model.load_adapter(folder, "second")
    model.delete_adapter("default")
    torch.testing.assert_close(result(model, inputs), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again", adapter_name="second")
    theirs = peft.PeftModel.from_pretrained(make_renamed(kind), tmp_path / "again")
    torch.testing.assert_close(result(theirs, inputs), expected, rtol=1e-5, atol=1e-6)
    again = PeftModel.from_pretrained(make_renamed(kind), folder, ignore_mismatched_sizes=True)
    torch.testing.assert_close(result(again, inputs), expected, rtol=1e-5, atol=1e-6)


class Headed(torch.nn.Module):
    """A model of transformers with a head of another's beside it."""

    def __init__(self):
        super().__init__()
        self.body = make_renamed("LLaVA")
        self.head = torch.nn.Linear(TEXT["vocab_size"], 3)

    def forward(self, **inputs):
        return (self.head(self.body(**inputs).logits),)


def test_what_is_beside_the_renamed_model_keeps_its_name(tmp_path):
    torch.manual_seed(0)
    base = Headed().eval()
    model = get_peft_model(base, IA3Config(**K_V_DOWN, modules_to_save=["head"]))
    disturb(model)
    model.save_pretrained(tmp_path)
    expected = result(model, PROMPT)
    new, old = "body.model.language_model", "body.language_model.model"
    edit(tmp_path, lambda tensors: {k.replace(new, old): v for k, v in tensors.items()})
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(result(again, PROMPT), expected)


def test_they_go_into_a_bank(tmp_path):
    model = peft.get_peft_model(make_renamed("Qwen2-VL"), peft.IA3Config(**K_V_DOWN)).eval()
    disturb(model)
    model.save_pretrained(tmp_path)

    def old(key):
        return PREFIX + before_renaming("Qwen2-VL", key.removeprefix(PREFIX))

    edit(tmp_path, lambda tensors: {old(key): value for key, value in tensors.items()})
    inputs = RENAMED["Qwen2-VL"][1]
    ours = get_peft_model(make_renamed("Qwen2-VL"), IA3Config(**K_V_DOWN), "own")
    AdapterBank(ours, 2).add("older", tmp_path)
    with torch.no_grad():
        mixed = ours(**inputs, adapter_names=["older"]).logits
    torch.testing.assert_close(mixed, result(model, inputs), rtol=1e-4, atol=1e-5)


MAPPING = {r"^former\.": "model.", r"^model\.": "nowhere."}


@pytest.mark.parametrize("way", ["first", "further"])
@pytest.mark.parametrize("modules", [K_V_FC2, ALL], ids=["suffixes", "whole names"])
def test_the_users_own_mapping_is_pefts(way, modules, tmp_path):
    theirs = peft.get_peft_model(make("BART"), peft.IA3Config(**modules)).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    old, new = f"{PREFIX}model.", f"{PREFIX}former."
    edit(tmp_path, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})
    with pytest.raises(IA3Error, match="does not fit"):
        PeftModel.from_pretrained(make("BART"), tmp_path)
    if way == "first":
        model = PeftModel.from_pretrained(make("BART"), tmp_path, key_mapping=MAPPING)
    else:
        model = get_peft_model(make("BART"), IA3Config(target_modules=["q_proj"]), "own")
        model.load_adapter(tmp_path, "default", key_mapping=MAPPING)
        model.set_adapter("default")
    torch.testing.assert_close(result(model, IDS), result(theirs, IDS), rtol=1e-5, atol=1e-6)
    again = peft.PeftModel.from_pretrained(make("BART"), tmp_path, key_mapping=MAPPING)
    torch.testing.assert_close(result(again, IDS), result(theirs, IDS), rtol=1e-5, atol=1e-6)
    with pytest.raises(IA3Error, match=r"key_mapping \{'\('.*malformed"):
        PeftModel.from_pretrained(make("BART"), tmp_path, key_mapping={"(": ""})
