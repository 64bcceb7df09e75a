"""LoRA's own products on a CPU, which vLLM computes for every row: left out where none needs them.

vLLM takes the rows of the base model for rows of the last slot there; LoRA's tables get one slot
more, which stays empty.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class CPUProducts(PunicaWrapperCPU):
    """vLLM's, for batches with a LoRA row.

    `no_lora` says that the batch has none: vLLM sets it for each that it calls a prefill, which on
    CPUs is every one.
    """

    def add_lora_linear(self, y: Tensor, *others: Any, **options: Any) -> None:
        """Add LoRA's products of a linear layer to its output, in place."""
        if not self.no_lora:
            super().add_lora_linear(y, *others, **options)

    def add_lora_logits(self, y: Tensor, *others: Any, **options: Any) -> None:
        """Add LoRA's products of the output layer to the logits, in place."""
        if not self.no_lora:
            super().add_lora_logits(y, *others, **options)
