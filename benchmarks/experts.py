"""What vectors on mixture-of-experts blocks cost, by where they are put.

    python benchmarks/experts.py [--repeats 25] [--tokens 1 32 512]

The block alone, frozen, then with its vectors attached in each of the three ways: on up, on the
input of `down_proj`, multiplied into `down_proj`. Each takes turns with the frozen block; figures
are medians of a turn's ratio. A training step is a forward and a backward pass to
the input and the vectors. Saved memory is what autograd keeps between the two, parameters left out,
a storage counted once. One JSON line for each block, implementation and batch.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable

import torch
from measuring import saved_bytes, take_turns
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ia3.core import experts

WAYS: tuple[experts.Way, ...] = ("up", "inner", "weight")


class Vectors(nn.Module):
    """One vector for each expert, near one."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.8 + 0.4 * torch.rand(shape))

    def forward(self) -> Tensor:
        return self.vectors


def blocks() -> dict[str, tuple[nn.Module, int]]:
    """Name -> a frozen block in the proportions of a known one, and its experts per token."""
    few = MixtralExperts(
        MixtralConfig(hidden_size=512, intermediate_size=1792, num_local_experts=8)
    )
    many = Qwen3MoeExperts(
        Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=192, num_experts=64)
    )
    for block in (few, many):
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.05)
            parameter.requires_grad_(False)
    return {"Mixtral / 8": (few, 2), "Qwen3-MoE / 4": (many, 8)}


def with_vectors(block: nn.Module, way: experts.Way) -> nn.Module:
    """A copy whose vectors are put where `way` says, whatever would be chosen."""
    block = copy.deepcopy(block)
    block.add_module("vectors", Vectors(experts.experts_shape(block)))
    handle = experts.attach(block, block.get_submodule("vectors"))
    run = handle.forward

    def forced(*args: Tensor) -> Tensor:
        chosen, experts._way = experts._way, lambda module, vectors: way
        try:
            result: Tensor = run(*args)
        finally:
            experts._way = chosen
        return result

    block.__dict__["forward"] = forced
    return block


def ratio(
    frozen: nn.Module, block: nn.Module, step: Callable[[nn.Module], object], repeats: int
) -> float:
    """The median of the time of a step to that of the frozen block's step beside it."""
    steps = {"frozen": lambda: step(frozen), "block": lambda: step(block)}
    return round(take_turns(steps, repeats, warm_up=2).ratio("block", "frozen"), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25, help="turns")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 32, 512], help="lengths of the input"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for title, (block, chosen) in blocks().items():
        rescaled = {way: with_vectors(block, way) for way in WAYS}
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            for variant in (block, *rescaled.values()):
                variant.config._experts_implementation = implementation
            for tokens in arguments.tokens:
                if implementation == "batched_mm" and tokens > 32:
                    continue  # it copies a weight for each row: made for small batches
                hidden, count = block.down_proj.shape[1], block.down_proj.shape[0]
                states = torch.randn(tokens, hidden, requires_grad=True)
                weights, index = torch.rand(tokens, count).softmax(-1).topk(chosen)
                inputs = (states, index, weights)

                def forward(block: nn.Module, inputs: tuple[Tensor, ...] = inputs) -> None:
                    with torch.no_grad():
                        block(*inputs)

                def train(block: nn.Module, inputs: tuple[Tensor, ...] = inputs) -> None:
                    block(*inputs).square().sum().backward()

                line = {
                    "block": title,
                    "implementation": implementation,
                    "tokens": tokens,
                    "forward": {
                        way: ratio(block, own, forward, arguments.repeats)
                        for way, own in rescaled.items()
                    },
                    "training": {
                        way: ratio(block, own, train, arguments.repeats)
                        for way, own in rescaled.items()
                    },
                    "saved_mb": {
                        name: round(
                            saved_bytes(own, lambda own=own, inputs=inputs: own(*inputs)) / 2**20, 2
                        )
                        for name, own in {"frozen": block, **rescaled}.items()
                    },
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
