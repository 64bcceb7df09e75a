#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: (IA)³ on the keys and values of a WavLM, as the paper has it. One expects what
# Wav2Vec2 shows, which has modules of the same names: the vectors change the output and get gradients. WavLM's
# attention never calls k_proj and v_proj, it passes their weights to a function: vectors there have no effect, their
# gradients are None, and PEFT says nothing. The weights are read, though, so that vectors other than ones
# (initialised at random, or from another adapter) change the output as soon as they are merged. It matters because
# two of three vectors of a block count as trainable parameters and are never trained.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning

"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import peft
import torch
import transformers

print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)

sizes = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
    conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2, initializer_range=0.5,
)
config = peft.IA3Config(
    target_modules=["k_proj", "v_proj", "feed_forward.output_dense"], feedforward_modules=["feed_forward.output_dense"]
)


def look(model):
    torch.manual_seed(0)
    sound = torch.randn(1, 400)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.get_peft_model(model.eval(), config)
    said = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    before = model(sound).last_hidden_state
    vectors = {name: p for name, p in model.named_parameters() if "k_proj" in name or "v_proj" in name}
    vectors = {name: p for name, p in vectors.items() if "ia3_l" in name}
    with torch.no_grad():
        for vector in vectors.values():
            vector += torch.rand_like(vector)
    adapted = model(sound).last_hidden_state
    adapted.square().sum().backward()
    without = sum(vector.grad is None for vector in vectors.values())
    model.merge_adapter()
    merged = model(sound).last_hidden_state
    effect, merging = (adapted - before).abs().max().item(), (merged - adapted).abs().max().item()
    print(
        f"{type(model.get_base_model()).__name__}: the vectors change the output by {effect:.1e}; {without} of "
        f"{len(vectors)} have no gradient; merging changes it by {merging:.1e}; warnings: {said}"
    )
    return effect, len(vectors) - without, merging, said


torch.manual_seed(0)
wav2vec2 = look(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes)))
torch.manual_seed(0)
wavlm = look(transformers.WavLMModel(transformers.WavLMConfig(**sizes)))

if not (wav2vec2[0] > 1e-2 and wav2vec2[1] == 4 and wav2vec2[2] < 1e-4):
    raise SystemExit("Not as described: Wav2Vec2 does not take the vectors either.")
if wavlm[0] > 0 or wavlm[1]:
    raise SystemExit("Not as described: vectors on WavLM's keys and values have an effect or a gradient.")
if wavlm[2] < 1e-2:
    raise SystemExit("Not as described: merging leaves WavLM's output as it is.")
if wavlm[3]:
    raise SystemExit("Not as described: PEFT warns of modules that are never called.")
PYTHON
