"""Everything of a model that attaching, merging or a failed load could leave changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ia3.core.route import OneCall

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Module names and identities, attributes, hooks; tensors' identities, bits, dtypes, grads."""
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "children": {name: list(module._modules) for name, module in modules.items()},
        "hooks": {
            (name, kind): list(getattr(module, kind))
            for name, module in modules.items()
            for kind in HOOKS
        },
        "keys": list(model.state_dict()),
        "tensors": {name: (id(t), t.dtype, t.device, t.shape) for name, t in tensors.items()},
        "trained": {name: t.requires_grad for name, t in tensors.items()},
        "gradients": {name: t.grad is not None for name, t in tensors.items()},
        "bits": {name: _bits(t) for name, t in tensors.items()},
        "training": {name: module.training for name, module in modules.items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is what it was when `before` was taken of it."""
    now = snapshot(model)
    for aspect, value in before.items():
        assert now[aspect] == value, aspect


def hooks_on(module: nn.Module) -> int:
    """What is called with a module beside what it computes itself; a forward put on it is one.

    Not that of the whole model which opens a call: it stays as long as adapters are on it.
    """
    own = module.__dict__.get("forward")
    forward = own is not None and not isinstance(getattr(own, "forward", None), OneCall)
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + forward


def weights(model: nn.Module) -> dict[str, bytes | None]:
    """Parameter name -> bits, of the base model alone."""
    return {name: _bits(p) for name, p in model.named_parameters() if "ia3_l" not in name}


def _bits(tensor: Tensor) -> bytes | None:
    if tensor.device.type == "meta":
        return None
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
