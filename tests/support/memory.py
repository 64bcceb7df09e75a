"""What a training step keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def saved_bytes(model: Any, ids: Tensor) -> int:
    """Bytes kept beside parameters and buffers, where the model's input wants gradients."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    # Storages are held: an address tells one apart only as long as it exists.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=embeddings, labels=ids).loss.backward()
    return sum(storage.nbytes() for storage in storages.values())
