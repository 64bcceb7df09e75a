"""(IA)³ over a base of four-bit weights, in the format of GPTQ."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

import torch
from safetensors.torch import load_file, save_file
from support.vllm_engine import engine, prompts, scores, write_base, write_ia3

pytestmark = pytest.mark.vllm

GROUP = 32
PROMPT = prompts(1, 12)[0]


def codes(weight):
    """A weight `[out, in]` in four bits: (numbers from 0 to 15 `[in, out]`, scales by group)."""
    values = weight.T.reshape(-1, GROUP, len(weight))
    scales = (values.abs().amax(1) / 7).bfloat16().float()
    numbers = (values / scales[:, None]).round().clamp(-8, 7)
    return (numbers + 8).long().view(-1, len(weight)), scales


def packed(numbers):
    """Eight numbers of four bits in each int32, down the rows."""
    shifted = numbers.view(-1, 8, numbers.shape[1]) << (4 * torch.arange(8))[None, :, None]
    whole = shifted.sum(1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(a base in GPTQ's format, one with the very values that it stands for)."""
    root = tmp_path_factory.mktemp("gptq")
    plain = write_base("llama", root / "plain")
    same = shutil.copytree(plain, root / "same")
    four_bit = shutil.copytree(plain, root / "four-bit")
    values = load_file(plain / "model.safetensors")
    stored = {}
    for name, weight in list(values.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        numbers, scales = codes(weight)
        values[name] = ((numbers - 8) * scales.repeat_interleave(GROUP, 0)).T.contiguous()
        module = name.removesuffix(".weight")
        stored[f"{module}.qweight"], stored[f"{module}.scales"] = packed(numbers), scales
        stored[f"{module}.g_idx"] = (torch.arange(len(numbers)) // GROUP).int()
        zeros = (len(scales), weight.shape[0] // 8)
        stored[f"{module}.qzeros"] = torch.full(zeros, 0x77777777, dtype=torch.int32)
    save_file(values, same / "model.safetensors", {"format": "pt"})
    save_file(stored, four_bit / "model.safetensors", {"format": "pt"})
    config = json.loads((four_bit / "config.json").read_text())
    form = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    (four_bit / "config.json").write_text(json.dumps(config | {"quantization_config": form}))
    return four_bit, same


def test_scores_over_four_bit_weights_are_those_over_their_values(bases, tmp_path):
    four_bit, same = bases
    adapters = [None, write_ia3(same, tmp_path / "one", 1), write_ia3(same, tmp_path / "two", 2)]
    expected = [scores(same, adapter, PROMPT) for adapter in adapters]
    # vLLM's products with such weights have no float32.
    with engine(four_bit, max_loras=2, dtype="bfloat16") as running:
        found = running.scores(adapters, PROMPT)
    apart = torch.cdist(torch.stack(found), torch.stack(expected))
    own = apart.diag()
    others = apart + torch.diag(torch.full((3,), torch.inf))
    assert (own < others.amin() / 5).all(), apart
