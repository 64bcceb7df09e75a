"""How the benchmarks measure: time that takes turns, and memory kept for the backward pass.

Nothing here needs more than torch and transformers: the peers' interpreters import it too.
"""

from __future__ import annotations

import copy
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], object]
# Tokens in the cache before the one that is decoded.
CACHED = 64


@dataclass(frozen=True)
class Timings:
    """Seconds of each contestant, one value a turn."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, against: str) -> float:
        """The median over the turns of one's time to the other's in the same turn."""
        pairs = zip(self.seconds[name], self.seconds[against], strict=True)
        return statistics.median(own / other for own, other in pairs)


def take_turns(
    steps: Mapping[str, Step],
    repeats: int,
    *,
    after: Mapping[str, Step] | None = None,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time contestants one after the other, in a new order each turn.

    Args:
        steps: name -> what is timed.
        repeats: turns that count.
        after: name -> what is run after a contestant's step, untimed.
        warm_up: turns that do not count.
        clock: `time.process_time` where other processes take turns with this one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    collected = gc.isenabled()
    # What is there already is not looked through again each turn: that takes up to a second.
    gc.collect()
    gc.freeze()
    try:
        for turn in range(warm_up + repeats):
            gc.collect()
            # As timeit does: a collection would fall on whichever contestant happens to run.
            gc.disable()
            for name in order.sample(sorted(steps), len(steps)):
                start = clock()
                steps[name]()
                took = clock() - start
                if after and name in after:
                    after[name]()
                if turn >= warm_up:
                    seconds[name].append(took)
            gc.enable()
    finally:
        gc.unfreeze()
        (gc.enable if collected else gc.disable)()
    return Timings(seconds)


def saved_bytes(model: nn.Module, run: Step) -> int:
    """Bytes that a forward pass keeps for the backward pass: every storage once, no parameters.

    Args:
        model: its parameters are left out.
        run: the forward pass; what it returns is held until all is counted.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(saved.values())


def same_weights(model: nn.Module) -> nn.Module:
    """A copy with modules of its own on the very same parameters and buffers.

    Where weights lie in memory moves a time by a percent or two; so it is the same for all.
    """
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def forward_pass(model: nn.Module, embeddings: Tensor) -> Step:
    """The model's logits from its embeddings.

    Args:
        embeddings: `[batch, seq, dim]`; as they require gradients, gradients flow through all of
            the model, adapters or not.
    """
    return lambda: model(inputs_embeds=embeddings, use_cache=False).logits


def training_step(model: nn.Module, embeddings: Tensor, labels: Tensor) -> Step:
    """Forward and backward pass of the language-modelling loss.

    Args:
        embeddings: `[batch, seq, dim]`, requiring gradients.
        labels: `[batch, seq]`, token ids.
    """
    trained = [embeddings, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        for tensor in trained:
            tensor.grad = None
        model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss.backward()

    return step


def batch_of(model: Any, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """(embeddings `[rows, length, dim]` that require gradients, labels `[rows, length]`)."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(0, table.shape[0], (rows, length), generator=generator).to(table.device)
    return table[ids].detach().clone().requires_grad_(), ids


class Decoding:
    """One token of each row after the other at the same position, without gradients.

    Args:
        model: what is called.
        prompt: `[rows, tokens]`, in the cache before the token that is decoded.
        options: of every call.
    """

    def __init__(self, model: Any, prompt: Tensor, **options: Any) -> None:
        from transformers import DynamicCache

        self._model, self._tokens = model, prompt[:, :1]
        self._options = {"past_key_values": DynamicCache(), "use_cache": True, **options}
        with torch.no_grad():
            model(input_ids=prompt, **self._options)

    def back(self) -> None:
        """Forget the tokens decoded last."""
        self._options["past_key_values"].crop(-1)

    def step(self) -> None:
        """Decode a token of each row."""
        with torch.no_grad():
            self._model(input_ids=self._tokens, **self._options)


def time_decoding(models: Mapping[str, nn.Module], vocabulary: int, repeats: int) -> Timings:
    """One decoded token of each, batch 1."""
    prompt = (torch.arange(CACHED) % vocabulary)[None]
    return take_turns_decoding({name: Decoding(m, prompt) for name, m in models.items()}, repeats)


def take_turns_decoding(decodings: Mapping[str, Decoding], repeats: int) -> Timings:
    """A token decoded by each in turn."""
    steps = {name: decoding.step for name, decoding in decodings.items()}
    back = {name: decoding.back for name, decoding in decodings.items()}
    return take_turns(steps, repeats, after=back, warm_up=3)


def llama(*, layers: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A LLaMA of random weights, frozen, in evaluation mode, on torch's default device.

    Args:
        layers: how many.
        dtype: of the weights.
        settings: more of a `LlamaConfig`.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=8192, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def on_ia3(model: nn.Module) -> Any:
    """This project's adapter `"default"` at the paper's sites, on the model itself."""
    import ia3

    return ia3.get_peft_model(model, ia3.IA3Config(task_type="CAUSAL_LM"))


def on_peft(model: nn.Module) -> Any:
    """PEFT's adapter `"default"` at its default sites of a LLaMA, on the model itself."""
    import peft

    return peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))


def fused(model: Any) -> Any:
    """The same `IA3Model` with its gated MLPs computed as one operation."""
    model.fuse_mlp()
    return model


def contestants(frozen: nn.Module) -> dict[str, Any]:
    """Contestant -> a model with an adapter on these weights, in evaluation mode."""
    models = {
        "ia3": on_ia3(same_weights(frozen)),
        "ia3 fused": fused(on_ia3(same_weights(frozen))),
        "PEFT": on_peft(same_weights(frozen)),
    }
    return {name: model.eval() for name, model in models.items()}


class Handling:
    """Adapters saved, loaded, switched and deleted on a model that has one.

    Args:
        model: of this project or of PEFT.
        folder: its adapter `"default"` is saved there.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self._folder = model, folder
        self.save()

    def save(self) -> None:
        """Save `"default"`."""
        self.model.save_pretrained(self._folder)

    def load(self) -> None:
        """Load it as another."""
        self.model.load_adapter(self._folder, "loaded")

    def delete(self) -> None:
        """Delete what was loaded."""
        self.model.delete_adapter("loaded")

    def switch(self) -> None:
        """Switch between two adapters."""
        other = "default" if self.model.active_adapter != "default" else "other1"
        self.model.set_adapter(other)

    def fill(self, count: int) -> None:
        """Have so many adapters on the model."""
        config = type(self.model.peft_config["default"])
        for number in range(len(self.model.peft_config), count):
            self.model.add_adapter(f"other{number}", config(task_type="CAUSAL_LM"))
