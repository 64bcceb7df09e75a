"""What torch was told around a call, and what counts within one: its answers are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def usual_state() -> Iterator[None]:
    """Within the context, this thread's gradients, precision and devices are torch's defaults.

    Training under `no_grad` or in inference mode would raise, autocast would round what is to be
    float32, and a default device would part small tensors from the model's.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", *([accelerator.type] if accelerator else [])}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in filter(torch.is_autocast_enabled, kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
