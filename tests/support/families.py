"""Tiny models of many families, and what public code rescales in them.

A family has its users' own choices of modules, and the sites of the paper, written from its
modeling file. Models are built from their configs: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from support import other_libraries

HIDDEN, INNER, VOCABULARY = 16, 24, 40

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Arguments of an `IA3Config`; the names in a string, with a space between two."""

    targets: str
    feedforward: str = ""
    saved: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    # A part of the error, where it is refused.
    refused: str = ""
    # Ends of the names of modules that no call reaches, or whose output is not used.
    idle: tuple[str, ...] = ()
    # Whether PEFT has layers for all of these modules.
    peft: bool = True

    def config(self) -> dict[str, Any]:
        saved = {"modules_to_save": self.saved.split()} if self.saved else {}
        targets, feedforward = self.targets.split(), self.feedforward.split()
        return {"target_modules": targets, "feedforward_modules": feedforward, **saved, **self.more}


@dataclass(frozen=True)
class Family:
    """How to build a model, what its forward takes, and what is rescaled in it.

    `sites` has a line for each place: its name, a colon, and what is rescaled there: outputs,
    `<inputs` and `*experts`. `refused` is a part of the error where the paper's sites are.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs
    choices: tuple[Choice, ...] = ()
    sites: str = ""
    refused: str = ""
    # As of a choice.
    idle: tuple[str, ...] = ()
    peft: bool = True
    # The version of transformers that named its modules so.
    since: str = "5.16"

    def named_sites(self) -> dict[str, str]:
        """Module name -> its side, of `sites`, layers numbered `0` and `1` where it says `#`."""
        return dict(self._sites())

    def _sites(self) -> Iterator[tuple[str, str]]:
        sides = {"<": "input", "*": "inner"}
        for line in self.sites.strip().splitlines():
            place, _, names = line.strip().partition(": ")
            for layer in "01" if "#" in place else "0":
                for name in names.split():
                    prefix = place.replace("#", layer)
                    yield f"{prefix}.{name.lstrip('<*')}", sides.get(name[0], "output")


def use(targets: str, feedforward: str = "", saved: str = "", **more: Any) -> Choice:
    own = {key: more.pop(key) for key in ("refused", "idle", "peft") if key in more}
    return Choice(targets, feedforward, saved, more, **own)


def build(name: str) -> nn.Module:
    """A model in evaluation mode; the same bits every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[name].build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Models of this width with the usual deviation of 0.02 attend evenly to
                # everything, and all gradients are tiny.
                if parameter.dim() > 1 and parameter.numel():
                    parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


# -- inputs ----------------------------------------------------------------------------------------


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


IDS = torch.tensor([[7, 3, 21, 14, 9, 30], [4, 5, 36, 12, 8, 11]])
TEXT: Inputs = {"input_ids": IDS}
TEXT_TO_TEXT: Inputs = {**TEXT, "decoder_input_ids": IDS + 1}
IMAGES: Inputs = {"pixel_values": numbers(2, 3, 8, 8)}
PICTURES: Inputs = {"pixel_values": numbers(2, 3, 32, 32)}
SOUND: Inputs = {"input_values": numbers(2, 400)}
SOME_GLOBAL = {"global_attention_mask": (IDS > 20).long()}

# -- sizes -----------------------------------------------------------------------------------------

SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER = {"hidden_size": HIDDEN, "intermediate_size": INNER}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 4}
SIZES: dict[str, Any] = {**SPECIAL, **TOWER, "max_position_embeddings": 32}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
VISION: dict[str, Any] = {**TOWER, "image_size": 8, "patch_size": 4, "num_channels": 3}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_inner": INNER}
GPT |= {"n_head": 4, "n_layer": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
BART: dict[str, Any] = {**SPECIAL, "d_model": HIDDEN, "decoder_start_token_id": 2}
for _part in ("encoder", "decoder"):
    BART |= {f"{_part}_layers": 1, f"{_part}_attention_heads": 4, f"{_part}_ffn_dim": INNER}
WHISPER: dict[str, Any] = {**BART, "num_mel_bins": 8, "max_source_positions": 6}
WHISPER |= {"max_target_positions": 16, "suppress_tokens": [], "begin_suppress_tokens": []}
LED: dict[str, Any] = {**BART, "attention_window": 4, "max_encoder_position_embeddings": 64}
LED |= {"max_decoder_position_embeddings": 32}
BART |= {"max_position_embeddings": 32, "forced_eos_token_id": None}
T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 4, "d_ff": INNER}
T5 |= {"num_heads": 4, "num_layers": 1, "num_decoder_layers": 1, "decoder_start_token_id": 0}
SPEECH: dict[str, Any] = {**TOWER, "vocab_size": VOCABULARY, "mask_time_prob": 0.0}
SPEECH |= {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
SPEECH |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
SPEECH |= {"num_conv_pos_embedding_groups": 2, "num_buckets": 8, "max_bucket_distance": 16}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 4}
MAMBA2 = {**MAMBA, "head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 4}
FORECAST: dict[str, Any] = {**BART, "prediction_length": 4, "context_length": 8}
FORECAST |= {"lags_sequence": [1, 2], "num_time_features": 1, "input_size": 1}
HISTORY: Inputs = {"past_values": numbers(2, 10), "past_time_features": numbers(2, 10, 1)}
HISTORY |= {"past_observed_mask": torch.ones(2, 10), "future_values": numbers(2, 4)}
HISTORY |= {"future_time_features": numbers(2, 4, 1)}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}


def new(model: str, sizes: dict[str, Any] = SIZES, **more: Any) -> Callable[[], nn.Module]:
    """What makes a model of transformers by its class's name."""

    def make() -> nn.Module:
        kind = getattr(hf, model)
        made: nn.Module = kind(kind.config_class(**{**sizes, **more}))
        return made

    return make


def nucleotide_transformer_v2() -> nn.Module:
    """ESM with a gated feed-forward layer whose up projection is fused, as version 2 has it."""
    model = new("EsmForSequenceClassification", ESM)()
    for layer in model.base_model.encoder.layer:
        layer.intermediate = other_libraries.GatedIntermediate(HIDDEN, INNER)
    return model


def speech_to_text() -> nn.Module:
    decoder = hf.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    both = hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs
    config = both(hf.Wav2Vec2Config(**SPEECH), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    made: nn.Module = hf.SpeechEncoderDecoderModel(config=config)
    return made


# -- choices that many make ------------------------------------------------------------------------

BERT_PAPER = use("key value output.dense", "output.dense")
# The second commonest: the feed-forward layer's input, not its inner activation.
BERT_UP = use("key value intermediate.dense", "intermediate.dense")
LLAMA = use("k_proj v_proj down_proj", "down_proj", task_type="CAUSAL_LM")
LLAMA_ALL = use(
    "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", "gate_proj up_proj down_proj"
)
BART_PAPER = use("k_proj v_proj fc2", "fc2")
BART_ALL = use("q_proj k_proj v_proj out_proj fc1 fc2", "fc1 fc2")


def bert(layers: str, attention: str = "attention.self.key attention.self.value") -> str:
    return f"{layers}.#: {attention} <output.dense"


def llama(layers: str = "model.layers", inner: str = "<mlp.down_proj") -> str:
    return f"{layers}.#: self_attn.k_proj self_attn.v_proj {inner}"


def tower(layers: str, inner: str = "<mlp.fc2", attention: str = "attention") -> str:
    return f"{layers}.#: {attention}.k_proj {attention}.v_proj {inner}"


def bart(prefix: str = "model", inner: str = "<fc2") -> str:
    crossed = "encoder_attn.k_proj encoder_attn.v_proj"
    return f"""
        {prefix}.encoder.layers.0: self_attn.k_proj self_attn.v_proj {inner}
        {prefix}.decoder.layers.0: self_attn.k_proj self_attn.v_proj {crossed} {inner}
    """


T5_ENCODER = "encoder.block.0.layer: 0.SelfAttention.k 0.SelfAttention.v <1.DenseReluDense.wo"
T5_SITES = f"""
    {T5_ENCODER}
    decoder.block.0.layer.0.SelfAttention: k v
    decoder.block.0.layer.1.EncDecAttention: k v
    decoder.block.0.layer.2.DenseReluDense: <wo
"""
T5_DEFAULT = use("k v wo", "wo", task_type="SEQ_2_SEQ_LM")

ESM = {**SIZES, "position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 3}
# The language model is given what the last but one layer says of a picture.
LLAVA_IDLE = ("vision_tower.encoder.layers.1.",)
NO_ATTENTION = "no attention with query, key and value projections was found in"


def text(
    model: str, sites: str, *choices: Choice, sizes: dict[str, Any] = SIZES, **more: Any
) -> Family:
    """A model that takes token ids."""
    own = {key: more.pop(key) for key in ("idle", "refused", "peft") if key in more}
    inputs = more.pop("inputs", TEXT)
    return Family(new(model, sizes, **more), inputs, choices, sites, **own)


# fmt: off
FAMILIES: dict[str, Family] = {
    # -- genomics and proteins
    "esm": text("EsmForMaskedLM", bert("esm.encoder.layer"),
        BERT_PAPER, BERT_UP, use("key value dense", "dense"),
        use("query value intermediate.dense", "intermediate.dense",
            task_type="FEATURE_EXTRACTION"),
        sizes=ESM),
    "nucleotide transformer": text(
        "EsmForSequenceClassification", bert("esm.encoder.layer"),
        use("value key dense", "dense", "classifier"),
        use("key value dense", "dense", task_type="SEQ_CLS"),
        # The uppermost layer, and its keys and values scaled on their inputs.
        use(*2 * [" ".join(f"esm.encoder.layer.1.{name}" for name in (
            "attention.self.key", "attention.self.value", "intermediate.dense", "output.dense"))]),
        use("attention.self.key attention.self.value intermediate.dense output.dense",
            "intermediate.dense output.dense", task_type="SEQ_CLS"),
        sizes=ESM, num_labels=1, problem_type="regression"),
    "nucleotide transformer v2": Family(nucleotide_transformer_v2, TEXT, (
        use("value key intermediate.dense", "intermediate.dense", "classifier"),
        use("value key intermediate.dense output.dense", "intermediate.dense output.dense",
            "classifier"),
    ), bert("esm.encoder.layer")),
    "dna bert": text("BertModel", bert("encoder.layer"),
        use("key value output.dense", "output.dense",
            task_type="FEATURE_EXTRACTION", inference_mode=False)),
    "dnabert 2": Family(other_libraries.MosaicBert, TEXT, (
        use("Wqkv wo", "wo"),
        use("qkv ffn", "ffn", refused="matches nothing in MosaicBert; its layers are called Wqkv,"),
    ), refused="in an order that is not known"),
    "protein t5": text("T5EncoderModel", T5_ENCODER,
        use("q k v wo", "wo", task_type="FEATURE_EXTRACTION"),
        # A name of PEFT's own docstring.
        use("q k v w0", "w0", refused="module 'w0' matches nothing in T5EncoderModel"),
        sizes=T5),
    "ankh": text("T5EncoderModel", T5_ENCODER, use("k v wo", "wo"), sizes=T5,
        feed_forward_proj="gated-gelu"),
    "evoformer": Family(other_libraries.Evoformer, {"x": numbers(2, 5, 16)}, (
        use("linear_v linear_2", "linear_2"),
        use("linear_q linear_v linear_1 linear_2", "linear_1 linear_2"),
    ), "blocks.#: msa_att.linear_k msa_att.linear_v <msa_transition.linear_2"),
    # -- vision
    "vit": Family(new("ViTForImageClassification", VISION), IMAGES, (
        use("q_proj v_proj fc2", "fc2", "classifier"),
        # The names of transformers 4.
        use("query value output", "output",
            refused="its layers are called q_proj, k_proj, v_proj, o_proj, fc1, fc2"),
    ), tower("vit.layers")),
    "deit": Family(new("DeiTForImageClassification", VISION), IMAGES, (BART_PAPER,),
        tower("deit.layers")),
    "beit": Family(new("BeitModel", VISION), IMAGES, (BART_PAPER,), tower("layers")),
    "swin": Family(
        new("SwinModel", {}, image_size=32, patch_size=4, embed_dim=8, depths=[1, 1],
            num_heads=[2, 2], window_size=4), PICTURES, (BART_PAPER,),
        tower("encoder.layers.#.blocks").replace("blocks.#", "blocks.0")),
    "convnext": Family(
        new("ConvNextModel", {}, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), PICTURES,
        (use("pwconv1 pwconv2", "pwconv2"), use("dwconv")),
        refused=f"{NO_ATTENTION} ConvNextModel"),
    "resnet": Family(
        new("ResNetForImageClassification", {}, embedding_size=8, hidden_sizes=[8, 16],
            depths=[1, 1]), PICTURES,
        (use("convolution", "", "classifier normalization"),
         use("convolution", "convolution", "classifier normalization")),
        refused=f"{NO_ATTENTION} ResNetForImageClassification"),
    "resnet 18": Family(other_libraries.ResNet18, {"x": numbers(2, 3, 8, 8)},
        (use("conv fc", "conv fc"), use("fc", "fc")), refused=f"{NO_ATTENTION} ResNet18"),
    "clip": Family(
        new("CLIPModel", {}, text_config=SIZES, vision_config=VISION, projection_dim=8),
        {**TEXT, **IMAGES}, (BART_PAPER, use("k_proj v_proj q_proj out_proj fc2", "fc2")),
        "\n".join(tower(f"{part}_model.encoder.layers", attention="self_attn")
            for part in ("text", "vision"))),
    "siglip": Family(
        new("SiglipModel", {}, text_config={**SIZES, "projection_size": HIDDEN},
            vision_config=VISION), {**TEXT, **IMAGES},
        (BART_PAPER,),
        "\n".join(tower(f"{part}_model.encoder.layers", attention="self_attn")
            for part in ("text", "vision"))),
    "dinov2": Family(new("Dinov2Model", VISION), IMAGES, (BART_PAPER,), tower("encoder.layer"),
        since="5.23"),
    "dinov3": Family(new("DINOv3ViTModel", VISION), IMAGES, (use("k_proj v_proj down_proj",
        "down_proj"),), tower("model.layer", "<mlp.down_proj")),
    "timm vit": Family(other_libraries.TimmVit, {"x": numbers(2, 3, 8, 8)},
        (use("qkv fc1 fc2", "fc1 fc2"), use("attn.qkv attn.proj mlp.fc2", "mlp.fc2")),
        refused="'blocks.0.attn.qkv' gives queries, keys and values at once, in an order"),
    "detr": Family(
        new("DetrForObjectDetection", {**BART, "vocab_size": 1}, use_timm_backbone=False,
            use_pretrained_backbone=False, backbone=None, num_queries=3, num_labels=3,
            backbone_config={
                "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16],
                "depths": [1, 1], "out_features": ["stage2"]}), PICTURES,
        (use("k_proj v_proj q_proj o_proj fc1 fc2", "fc1 fc2",
             "class_labels_classifier bbox_predictor"),
         use("k_proj v_proj q_proj out_proj fc1 fc2", "fc1 fc2",
             refused="module 'out_proj' matches nothing in DetrForObjectDetection")),
        bart(inner="<mlp.fc2")),
    "segformer": Family(
        new("SegformerModel", {}, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
            hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4],
            mlp_ratios=[2, 2]), PICTURES, (use("k_proj v_proj fc2", "fc2"),),
        tower("stages.#.blocks").replace("blocks.#", "blocks.0")),
    "videomae": Family(new("VideoMAEModel", VISION, num_frames=2, tubelet_size=2),
        {"pixel_values": numbers(2, 2, 3, 8, 8)},
        (BERT_PAPER, use("query value output", "output",
            refused="is a VideoMAESelfOutput, whose")),
        bert("encoder.layer", "attention.attention.key attention.attention.value")),
    # -- speech
    "whisper": Family(new("WhisperForConditionalGeneration", WHISPER),
        {"input_features": numbers(2, 8, 12), "decoder_input_ids": IDS},
        (use("k_proj v_proj q_proj fc1 fc2", "fc1 fc2"),
         use("q_proj v_proj fc2", "fc2", task_type="SEQ_2_SEQ_LM", peft=False),
         use("q_proj v_proj", "fc1 fc2", refused="['fc1', 'fc2'] are not among")), bart()),
    "wav2vec2": Family(new("Wav2Vec2ForCTC", SPEECH), SOUND,
        (use("k_proj v_proj output_dense", "output_dense"),
         use("q_proj v_proj intermediate_dense", "intermediate_dense", "lm_head")),
        tower("wav2vec2.encoder.layers", "<feed_forward.output_dense")),
    # transformers reads the weights of its projections and calls none of them.
    "wavlm": Family(new("WavLMModel", SPEECH), SOUND,
        (use("k_proj v_proj output_dense", "output_dense", idle=("k_proj", "v_proj")),),
        tower("encoder.layers", "<feed_forward.output_dense"), idle=("k_proj", "v_proj")),
    "hubert": Family(new("HubertModel", SPEECH), SOUND,
        (use("k_proj v_proj output_dense", "output_dense"),),
        tower("encoder.layers", "<feed_forward.output_dense")),
    "sew": Family(new("SEWModel", SPEECH, squeeze_factor=2), SOUND,
        (use("k_proj v_proj output_dense", "output_dense"),),
        tower("encoder.layers", "<feed_forward.output_dense")),
    "sew-d": Family(
        new("SEWDModel", SPEECH, squeeze_factor=2, position_buckets=8), SOUND,
        (use("key_proj value_proj encoder.layer.0.output.dense encoder.layer.1.output.dense",
             "encoder.layer.0.output.dense encoder.layer.1.output.dense"),),
        bert("encoder.encoder.layer", "attention.self.key_proj attention.self.value_proj")),
    "w2v bert": Family(
        new("Wav2Vec2BertModel", TOWER, feature_projection_input_dim=8,
            conv_depthwise_kernel_size=3), {"input_features": numbers(2, 10, 8)},
        (use("linear_k linear_v output_dense", "output_dense"),),
        "encoder.layers.#: <ffn1.output_dense self_attn.linear_k self_attn.linear_v "
        "<ffn2.output_dense"),
    "audio spectrogram": Family(
        new("ASTModel", TOWER, patch_size=8, frequency_stride=8, time_stride=8, max_length=32,
            num_mel_bins=16), {"input_values": numbers(2, 32, 16)}, (BART_PAPER,), tower("layers")),
    "speech encoder-decoder": Family(
        speech_to_text, {**SOUND, "decoder_input_ids": IDS},
        (use("k_proj v_proj output_dense key value output.dense", "output_dense output.dense"),),
        tower("encoder.encoder.layers", "<feed_forward.output_dense") + "\n" + bert(
            "decoder.bert.encoder.layer", "attention.self.key attention.self.value "
            "crossattention.self.key crossattention.self.value")),
    "openai whisper": Family(other_libraries.OpenAiWhisper, {"x": numbers(2, 5, 16)},
        (use("key value mlp.2", "mlp.2"),
         use("key value mlp", "mlp", refused="is a Sequential, whose")),
        "blocks.#: attn.key attn.value cross_attn.key cross_attn.value <mlp.2"),
    # -- state space
    "mamba": text("MambaForCausalLM", "",
        use("in_proj x_proj out_proj", "x_proj"), use("in_proj out_proj", "out_proj"),
        sizes=MAMBA, time_step_rank=2, refused="in_proj, x_proj, dt_proj, out_proj"),
    "mamba 2": text("Mamba2ForCausalLM", "", use("in_proj out_proj", "out_proj"),
        sizes=MAMBA2, refused="in_proj, out_proj"),
    "mambapy": Family(other_libraries.MambaPy, TEXT,
        (use("in_proj x_proj out_proj", "x_proj"),),
        refused="in_proj, conv1d, x_proj, dt_proj, out_proj"),
    "jamba": text("JambaForCausalLM",
        """model.layers.0: <feed_forward.down_proj
           model.layers.1: self_attn.k_proj self_attn.v_proj *feed_forward.experts""",
        use("in_proj x_proj out_proj", "x_proj"), use("k_proj v_proj down_proj", "down_proj"),
        sizes=GROUPED, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1,
        expert_layer_period=2, num_experts=2, mamba_d_state=4, mamba_dt_rank=2),
    "bamba": text("BambaForCausalLM",
        """model.layers.0: <feed_forward.down_proj
           model.layers.1: self_attn.k_proj self_attn.v_proj <feed_forward.down_proj""",
        use("in_proj k_proj v_proj down_proj", "down_proj"),
        sizes=GROUPED, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
        mamba_d_state=4, mamba_chunk_size=4),
    "rwkv": text("RwkvForCausalLM", "", use("key value feed_forward.value", "feed_forward.value"),
        sizes=TOWER, vocab_size=VOCABULARY, attention_hidden_size=HIDDEN, context_length=16,
        inputs={**TEXT, "use_cache": False}, refused="key, value, receptance, output"),
    # -- diffusion
    "stable diffusion": Family(other_libraries.DiffusersUnet, {"x": numbers(2, 5, 16)},
        (use("to_k to_v net.2", "net.2"),
         use("to_q to_k to_v to_out.0", "to_q to_k to_v to_out.0")),
        "down_blocks.0.attentions.0.transformer_blocks.0: attn1.to_k attn1.to_v <ff.net.2 "
        "attn2.to_k attn2.to_v"),
    "dit": Family(other_libraries.DiffusersDit, {"x": numbers(2, 5, 16)},
        (use("to_q to_k to_v ff.net.0.proj ff.net.2", "ff.net.0.proj ff.net.2"),),
        "transformer_blocks.#: attn1.to_k attn1.to_v <ff.net.2"),
    "flux 2": Family(other_libraries.Flux2, {"x": numbers(2, 5, 16)},
        (use(*2 * ["to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out "
                   "to_qkv_mlp_proj linear_in linear_out"]),),
        refused="'single_transformer_blocks.0.attn.to_qkv_mlp_proj' gives"),
    # -- time series and tables
    "chronos": text("T5ForConditionalGeneration", T5_SITES, T5_DEFAULT,
        sizes=T5, inputs=TEXT_TO_TEXT),
    "patchtst": Family(
        new("PatchTSTForPrediction", num_input_channels=3, context_length=12, patch_length=4,
            patch_stride=4, d_model=HIDDEN, ffn_dim=INNER, prediction_length=4),
        {"past_values": numbers(2, 12, 3)}, (use("k_proj v_proj ff.3", "ff.3"),),
        tower("model.encoder.layers", "<ff.3", "self_attn")),
    "patchtsmixer": Family(
        new("PatchTSMixerForPrediction", {}, num_input_channels=3, context_length=12,
            patch_length=4, patch_stride=4, d_model=HIDDEN, num_layers=2, prediction_length=4),
        {"past_values": numbers(2, 12, 3)}, (use("fc1 fc2", "fc2"),),
        refused=f"{NO_ATTENTION} PatchTSMixer"),
    "time series transformer": Family(
        new("TimeSeriesTransformerForPrediction", FORECAST), HISTORY, (BART_PAPER,), bart()),
    "informer": Family(
        new("InformerForPrediction", FORECAST, attention_type="full"), HISTORY, (BART_PAPER,),
        bart()),
    "autoformer": Family(
        new("AutoformerForPrediction", FORECAST, label_length=4, moving_average=3), HISTORY,
        (BART_PAPER,), bart()),
    "gpt-2 as forecaster": text("GPT2Model", "h.#: attn.c_attn <mlp.c_proj",
        use("c_attn c_proj c_fc"), sizes=GPT),
    "ft-transformer": Family(other_libraries.FtTransformer, {"x": numbers(2, 5)},
        (use("W_k W_v linear_second", "linear_second"),
         use("W_k W_v ffn", "ffn", refused="is a Mlp, whose")),
        "blocks.#: attention.W_k attention.W_v <ffn.linear_second"),
    # -- several modes
    "flava": Family(
        new("FlavaModel", {}, image_config=VISION, text_config=SIZES, multimodal_config=TOWER,
            hidden_size=HIDDEN, projection_dim=8), {**TEXT, **IMAGES},
        (use("dense", "dense"),),
        "\n".join(bert(f"{part}_model.encoder.layer",
            "attention.attention.key attention.attention.value")
            for part in ("image", "text", "multimodal"))),
    "blip": Family(
        new("BlipForImageTextRetrieval", {}, projection_dim=8, image_text_hidden_size=8,
            text_config={**SIZES, "encoder_hidden_size": HIDDEN, "sep_token_id": 3},
            vision_config=VISION), {**TEXT, **IMAGES},
        (use("qkv key value fc2", "fc2", idle=("pooler.dense",)),),
        """vision_model.encoder.layers.#: self_attn.qkv <mlp.fc2
           text_encoder.encoder.layer.#: attention.self.key attention.self.value """
        "crossattention.self.key crossattention.self.value <output.dense"),
    "q-former": Family(
        new("Blip2QFormerModel", SIZES, encoder_hidden_size=HIDDEN),
        {"query_embeds": numbers(2, 3, HIDDEN), "encoder_hidden_states": numbers(2, 6, HIDDEN)},
        (use("key value output.dense", "output.dense", task_type="CAUSAL_LM", peft=False),),
        """encoder.layer.#: attention.attention.key attention.attention.value <output_query.dense
           encoder.layer.0: crossattention.attention.key crossattention.attention.value"""),
    "llava": Family(
        new("LlavaForConditionalGeneration", {}, text_config={"model_type": "llama", **GROUPED},
            vision_config={"model_type": "clip_vision_model", **VISION}, image_token_index=3,
            image_seq_length=4),
        {"input_ids": torch.tensor([[7, 3, 3, 3, 3, 21, 9]] * 2), **IMAGES},
        (use("k_proj v_proj down_proj", "down_proj", idle=LLAVA_IDLE),
         use("k_proj v_proj mlp.fc2 down_proj o_proj", "mlp.fc2 down_proj o_proj",
             idle=LLAVA_IDLE)),
        tower("model.vision_tower.encoder.layers", attention="self_attn")
        + "\n" + llama("model.language_model.layers"),
        idle=LLAVA_IDLE),
    "qwen2-vl": Family(
        new("Qwen2VLForConditionalGeneration", {}, text_config={**GROUPED,
            "rope_parameters": MROPE}, vision_config={
                "depth": 1, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4,
                "mlp_ratio": 2, "patch_size": 2, "spatial_merge_size": 1,
                "temporal_patch_size": 1}, image_token_id=3),
        {"input_ids": torch.tensor([[7, 3, 3, 3, 3, 21, 9]]), "pixel_values": numbers(4, 12),
         "image_grid_thw": torch.tensor([[1, 2, 2]]),
         "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0, 0]])},
        (LLAMA, use("qkv k_proj v_proj down_proj fc2", "down_proj fc2")),
        "model.visual.blocks.0: attn.qkv <mlp.fc2\n" + llama("model.language_model.layers")),
    "idefics 3": Family(
        new("Idefics3ForConditionalGeneration", {}, text_config={"model_type": "llama", **GROUPED},
            vision_config=VISION, image_token_id=3, scale_factor=1),
        {"input_ids": torch.tensor([[7, 3, 3, 3, 3, 21, 9]]),
         "pixel_values": numbers(1, 1, 3, 8, 8)},
        (LLAMA, use("k_proj v_proj mlp.fc2 down_proj", "mlp.fc2 down_proj")),
        tower("model.vision_model.encoder.layers", attention="self_attn")
        + "\n" + llama("model.text_model.layers")),
    "layoutlm": text("LayoutLMForMaskedLM", bert("layoutlm.encoder.layer"), BERT_PAPER),
    "layoutlm 3": text("LayoutLMv3Model", bert("encoder.layer"), BERT_PAPER,
        coordinate_size=2, shape_size=4, visual_embed=False, max_2d_position_embeddings=32),
    # -- text: decoders
    "llama": text("LlamaForCausalLM", llama(), LLAMA, LLAMA_ALL,
        use("k_proj v_proj up_proj down_proj", "up_proj down_proj"),
        use("down_proj gate_proj up_proj", "down_proj gate_proj up_proj"),
        use("q_proj v_proj", "mlp.up_proj mlp.down_proj",
            refused="['mlp.down_proj', 'mlp.up_proj'] are not among"),
        use("q_proj v_proj mlp", "mlp", "lm_head", refused="is a LlamaMLP, whose"),
        sizes=GROUPED),
    "mistral": text("MistralForCausalLM", llama(), LLAMA, sizes=GROUPED),
    "gemma": text("GemmaForCausalLM", llama(), LLAMA, sizes=GROUPED, head_dim=4),
    "gemma 2": text("Gemma2ForCausalLM", llama(), LLAMA, sizes=GROUPED, head_dim=4),
    "gemma 3": text("Gemma3ForCausalLM", llama(), LLAMA, sizes=GROUPED, head_dim=4),
    "qwen 2": text("Qwen2ForCausalLM", llama(), LLAMA, sizes=GROUPED),
    "qwen 3": text("Qwen3ForCausalLM", llama(), LLAMA, LLAMA_ALL, sizes=GROUPED, head_dim=4),
    "apertus": text("ApertusForCausalLM", llama(), LLAMA, sizes=GROUPED,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "phi": text("PhiForCausalLM", llama(inner="<mlp.fc2"), use("q_proj v_proj fc2", "fc2")),
    "phi 3": text("Phi3ForCausalLM", "model.layers.#: self_attn.qkv_proj <mlp.down_proj",
        use("qkv_proj down_proj", "down_proj"), sizes=GROUPED),
    "gpt-2": text("GPT2LMHeadModel", "transformer.h.#: attn.c_attn <mlp.c_proj",
        use("c_attn c_proj mlp.c_proj", "mlp.c_proj", fan_in_fan_out=True),
        use("attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", "mlp.c_fc mlp.c_proj"),
        use("c_attn mlp.c_fc", "mlp.c_fc", init_ia3_weights=True), sizes=GPT),
    "gpt-j": text("GPTJForCausalLM", "transformer.h.#: attn.k_proj attn.v_proj <mlp.fc_out",
        use("q_proj v_proj fc_out", "fc_out"), sizes=GPT, rotary_dim=4),
    "gpt-neox": text("GPTNeoXForCausalLM",
        "gpt_neox.layers.#: attention.query_key_value <mlp.dense_4h_to_h",
        use("query_key_value dense_4h_to_h", "dense_4h_to_h")),
    "bloom": text("BloomForCausalLM",
        "transformer.h.#: self_attention.query_key_value <mlp.dense_4h_to_h",
        use("query_key_value dense_4h_to_h", "dense_4h_to_h"),
        sizes=SPECIAL, hidden_size=HIDDEN, n_layer=2, n_head=4),
    "falcon": text("FalconForCausalLM",
        "transformer.h.#: self_attention.query_key_value <mlp.dense_4h_to_h",
        use("query_key_value mlp.dense_4h_to_h", "mlp.dense_4h_to_h"), ffn_hidden_size=INNER),
    "opt": text("OPTForCausalLM", tower("model.decoder.layers", "<fc2", "self_attn"), BART_PAPER,
        ffn_dim=INNER, word_embed_proj_dim=HIDDEN),
    "mixtral": text("MixtralForCausalLM", llama(inner="*mlp.experts"), use("q_proj v_proj"),
        sizes=GROUPED, num_local_experts=2),
    "qwen 2 experts": text("Qwen2MoeForCausalLM",
        llama(inner="*mlp.experts <mlp.shared_expert.down_proj"), LLAMA, sizes=GROUPED, **MOE,
        shared_expert_intermediate_size=20),
    "qwen 3 experts": text("Qwen3MoeForCausalLM", llama(inner="*mlp.experts"),
        use("k_proj v_proj"), sizes=GROUPED, **MOE, head_dim=4),
    "deepseek v3": text("DeepseekV3ForCausalLM",
        """model.layers.#: self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj
           model.layers.0: <mlp.down_proj
           model.layers.1: *mlp.experts <mlp.shared_experts.down_proj""",
        use("kv_b_proj down_proj", "down_proj"),
        num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=4,
        qk_rope_head_dim=2, v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=12, first_k_dense_replace=1),
    "gpt-oss": text("GptOssForCausalLM", llama(inner="*mlp.experts"), use("k_proj v_proj"),
        sizes=GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "llama 4": text("Llama4ForCausalLM",
        """model.layers.#: self_attn.k_proj self_attn.v_proj
           model.layers.0: <feed_forward.down_proj
           model.layers.1: *feed_forward.experts <feed_forward.shared_expert.down_proj""",
        LLAMA, sizes=GROUPED, num_local_experts=2, head_dim=4, intermediate_size_mlp=20,
        interleave_moe_layer_step=2),
    # -- text: encoder-decoders
    "nllb": text("M2M100ForConditionalGeneration", bart(), BART_PAPER, BART_ALL,
        sizes=BART, inputs=TEXT_TO_TEXT),
    "mbart": text("MBartForConditionalGeneration", bart(), BART_ALL,
        sizes=BART, inputs=TEXT_TO_TEXT),
    "bart": text("BartForConditionalGeneration", bart(), BART_PAPER,
        sizes=BART, inputs=TEXT_TO_TEXT),
    "pegasus": text("PegasusForConditionalGeneration", bart(), BART_PAPER,
        sizes=BART, inputs=TEXT_TO_TEXT),
    "led": text("LEDForConditionalGeneration",
        """led.encoder.layers.0.self_attn.longformer_self_attn: key value key_global value_global
           led.encoder.layers.0: <fc2
           led.decoder.layers.0: self_attn.k_proj self_attn.v_proj encoder_attn.k_proj """
        "encoder_attn.v_proj <fc2",
        BART_PAPER, use("key value fc2", "fc2"),
        sizes=LED, inputs={**TEXT_TO_TEXT, **SOME_GLOBAL}),
    "mt5": text("MT5ForConditionalGeneration", T5_SITES,
        T5_DEFAULT, use("k v w0", "w0", refused="module 'w0' matches nothing"),
        sizes=T5, inputs=TEXT_TO_TEXT, feed_forward_proj="gated-gelu"),
    # -- text: encoders
    "bert": text("BertForMaskedLM", bert("bert.encoder.layer"), BERT_PAPER, BERT_UP,
        use("query key value intermediate.dense output.dense", "intermediate.dense output.dense"),
        use("key value output", "output", refused="is a BertSelfOutput, whose"),
        use("k v", "intermediate.dense", refused="['intermediate.dense'] are not among")),
    "roberta": text("RobertaForSequenceClassification", bert("roberta.encoder.layer"),
        use("key value output.dense", "output.dense", task_type="SEQ_CLS"),
        use("key value intermediate.dense", "intermediate.dense", "classifier")),
    "electra": text("ElectraForSequenceClassification", bert("electra.encoder.layer"),
        use("query value dense intermediate.dense", "dense intermediate.dense",
            task_type="SEQ_CLS", inference_mode=False), embedding_size=12),
    "deberta": text("DebertaForMaskedLM",
        bert("deberta.encoder.layer", "attention.self.in_proj"),
        use("in_proj output.dense", "output.dense")),
    "deberta 2": text("DebertaV2ForMaskedLM",
        bert("deberta.encoder.layer", "attention.self.key_proj attention.self.value_proj"),
        use("key_proj value_proj output.dense", "output.dense")),
    "distilbert": text("DistilBertForSequenceClassification",
        "distilbert.transformer.layer.#: attention.k_lin attention.v_lin <ffn.lin2",
        use("k_lin v_lin ffn.lin1", "ffn.lin1", task_type="SEQ_CLS"),
        use("q_lin v_lin k_lin out_lin ffn.lin1 ffn.lin2", "ffn.lin1 ffn.lin2",
            task_type="SEQ_CLS"),
        sizes={"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": INNER, "n_heads": 4},
        n_layers=2, max_position_embeddings=32),
    "albert": text("AlbertForMaskedLM",
        "albert.encoder.albert_layer_groups.0.albert_layers.0: attention.key attention.value "
        "<ffn_output", use("key value ffn_output", "ffn_output"), embedding_size=8),
    "mpnet": text("MPNetForMaskedLM",
        bert("mpnet.encoder.layer", "attention.attn.k attention.attn.v"),
        use("k v output.dense", "output.dense")),
    "modernbert": text("ModernBertForMaskedLM", "model.layers.#: attn.Wqkv <mlp.Wo",
        use("Wqkv mlp.Wo", "mlp.Wo"), use("Wqkv Wo", "Wo"), cls_token_id=1, sep_token_id=2),
    "xlnet": text("XLNetLMHeadModel", "", use("layer_1 layer_2", "layer_2"),
        sizes={"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_inner": INNER, "n_head": 4},
        n_layer=2, refused="its layers are called layer_1, layer_2:"),
    "funnel": text("FunnelForMaskedLM",
        """funnel.encoder.blocks.#.0: attention.k_head attention.v_head <ffn.linear_2
           funnel.decoder.layers.0: attention.k_head attention.v_head <ffn.linear_2""",
        use("k_head v_head ffn.linear_2", "ffn.linear_2"),
        sizes={"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_inner": INNER, "n_head": 4},
        d_head=4, block_sizes=[1, 1], num_decoder_layers=1),
    "longformer": text("LongformerForMaskedLM",
        bert("longformer.encoder.layer", "attention.self.key attention.self.value "
            "attention.self.key_global attention.self.value_global"),
        BERT_PAPER, attention_window=4, inputs={**TEXT, **SOME_GLOBAL}),
    "mobilebert": text("MobileBertForMaskedLM",
        bert("mobilebert.encoder.layer") + " <ffn.0.output.dense", BERT_PAPER,
        embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8, num_feedforward_networks=2),
    "squeezebert": text("SqueezeBertForMaskedLM",
        "transformer.encoder.layers.#: attention.key attention.value <output.conv1d",
        use("key value output.conv1d", "output.conv1d", peft=False), peft=False,
        embedding_size=HIDDEN),
    # Its layers give a scale besides.
    "i-bert": text("IBertForMaskedLM", "",
        use("key value output.dense", "output.dense", refused="is a QuantLinear, whose output"),
        refused="is a QuantLinear, whose output cannot be rescaled: it is not one tensor of 16"),
    "fnet": text("FNetForMaskedLM", "", use("output.dense", "output.dense"),
        refused=f"{NO_ATTENTION} FNetForMaskedLM"),
    "canine": text("CanineModel", "\n".join(
        f"{part}.layer.0: attention.self.key attention.self.value <output.dense"
        for part in ("initial_char_encoder", "encoder", "final_char_encoder")),
        BERT_PAPER, sizes={**TOWER, "num_hidden_layers": 1}, downsampling_rate=2,
        num_hash_functions=2, num_hash_buckets=8, local_transformer_stride=2,
        max_position_embeddings=32),
}
# fmt: on
