"""A tiny model, its adapters, and what each row has to be: computed alone, before threads start.

The adapters' vectors are so different that no row of one could be taken for a row of another: two
rows differ by more than 1,000 times `TOLERANCE`.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic, sleep
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.adapter.files import Adapter
from ia3.core.route import BASE

TOLERANCE = 2e-5
# Without progress for so long, a thread hangs.
PATIENCE = 60.0
PROMPTS = torch.tensor([[3, 9, 27, 17, 51], [4, 16, 2, 8, 32], [5, 25, 61, 49, 53]])
NEW_TOKENS = 3


def tiny_llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()


def tiny_t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    tokens = {"vocab_size": 64, "decoder_start_token_id": 0, "eos_token_id": None}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, dropout_rate=0.0)).eval()


class Served:
    """A model with adapters in versions: `(name, version)` -> the `Adapter`.

    A row is right if it is the one of a version of its adapter.
    """

    def __init__(self, kind: str, seed: int, versions: dict[str, int]) -> None:
        torch.manual_seed(seed)
        self.base = tiny_llama() if kind == "llama" else tiny_t5()
        if kind == "t5":
            with torch.no_grad():
                for parameter in self.base.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.4)
        self.before = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.adapters: dict[tuple[str, int], Adapter] = {}
        self.logits: dict[tuple[str, int], Tensor] = {}
        self.tokens: dict[tuple[str, int], Tensor] = {}
        keys = [(name, version) for name, count in versions.items() for version in range(count)]
        model = IA3Model.without_adapters(self.base)
        self._expect((BASE, 0), model)
        model.unload()
        for key in keys:
            while key not in self.logits or not self._is_apart(key):
                self.adapters[key] = self._made(key)
                model = IA3Model.from_adapter(self.base, self.adapters[key])
                self._expect(key, model.eval())
                model.unload()

    def _made(self, key: tuple[str, int]) -> Adapter:
        """An adapter with random vectors: at three activations a block, or at one."""
        narrow = key[0].endswith("narrow")
        down = "down_proj" if hasattr(self.base.config, "intermediate_size") else "wo"
        keys = "k_proj" if down == "down_proj" else "k"
        values = "v_proj" if down == "down_proj" else "v"
        modules = [keys] if narrow else [keys, values, down]
        config = IA3Config(target_modules=modules, feedforward_modules=[] if narrow else [down])
        model = IA3Model(self.base, config)
        for vector in model.vectors("default").values():
            with torch.no_grad():
                vector.uniform_(-3, 3)
        adapter = model.adapter("default")
        adapter.vectors = {name: v.detach().clone() for name, v in adapter.vectors.items()}
        model.unload()
        return adapter

    def inputs(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        ids = PROMPTS[list(prompts)]
        if self.base.config.is_encoder_decoder:
            return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
        return {"input_ids": ids}

    @torch.no_grad()
    def _expect(self, key: tuple[str, int], model: IA3Model) -> None:
        rows = range(len(PROMPTS))
        self.logits[key] = torch.cat([model(**self.inputs([i])).logits for i in rows])
        self.tokens[key] = torch.cat([self.generated(model, [i]) for i in rows])

    def generated(self, model: Any, prompts: Sequence[int], **options: Any) -> Tensor:
        """`[rows, NEW_TOKENS]`"""
        ids = PROMPTS[list(prompts)]
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        found = model.generate(ids, **given, max_new_tokens=NEW_TOKENS, **options)
        return found[:, -NEW_TOKENS:].clone()

    def _is_apart(self, key: tuple[str, int]) -> bool:
        """Whether no row of an adapter could be taken for one of another."""
        return all(
            _error(self.logits[key][prompt], row) > 1000 * TOLERANCE
            for other, rows in self.logits.items()
            if other != key
            for prompt, row in enumerate(rows)
        )

    def of(self, name: str) -> list[tuple[str, int]]:
        return [key for key in self.logits if key[0] == name]

    def is_row(self, found: Tensor, prompt: int, keys: Sequence[tuple[str, int]]) -> bool:
        """Whether logits `[tokens, vocabulary]` are those of one of these."""
        return any(_error(found, self.logits[key][prompt]) < TOLERANCE for key in keys)

    def is_text(self, found: Tensor, prompt: int, keys: Sequence[tuple[str, int]]) -> bool:
        """Whether what was generated is what one of these generates."""
        return any(torch.equal(found, self.tokens[key][prompt]) for key in keys)

    def tell(self, found: Tensor, prompt: int) -> str:
        """Whose row it is nearest to, for a failure."""
        errors = {key: _error(found, row[prompt]) for key, row in self.logits.items()}
        nearest = min(errors, key=errors.__getitem__)
        return f"nearest {nearest} at {errors[nearest]:.2g}"


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Watch:
    """Threads that do one thing again and again, until the time is over or one hangs.

    What they raise is counted: an `IA3Error` by its kind and what its message says, anything else
    is a failure.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.over = Event()
        self._lock = Lock()

    def count(self, what: str, times: int = 1) -> None:
        with self._lock:
            self.counts[what] += times

    def fail(self, sentence: str) -> None:
        with self._lock:
            if len(self.failures) < 50:
                self.failures.append(f"seed {self.seed}: {sentence}")
            self.counts["failures"] += 1

    def doing(self, what: str, action: Callable[[], object]) -> None:
        """Do it once, and count what comes of it."""
        try:
            action()
        except IA3Error as error:
            self.count(f"{what}: {type(error).__name__}")
            sleep(0.001)  # others have to come on
        except Exception as error:
            # The last calls: who asked the library that raised.
            calls = traceback.extract_tb(error.__traceback__)[-6:]
            where = " > ".join(f"{call.filename}:{call.lineno}" for call in calls)
            self.fail(f"{what}: {type(error).__name__}: {error} ({where})")
        else:
            self.count(what)

    def run(
        self, seconds: float, roles: dict[str, Callable[[random.Random], tuple[str, Any]]]
    ) -> None:
        """Each role in a thread of its own: it says what it does next, and how."""
        progress = dict.fromkeys(roles, monotonic())
        self.over.clear()

        def again(role: str) -> None:
            chance = random.Random(f"{self.seed} {role}")
            while not self.over.is_set():
                self.doing(*roles[role](chance))
                progress[role] = monotonic()

        threads = {role: Thread(target=again, args=(role,), daemon=True) for role in roles}
        for thread in threads.values():
            thread.start()
        end = monotonic() + seconds
        while monotonic() < end and not self.counts["hangs"]:
            self.over.wait(min(1.0, max(0.0, end - monotonic())))
            self._look(progress, threads)
        self.over.set()
        for role, thread in threads.items():
            thread.join(PATIENCE)
            if thread.is_alive() and not self.counts["hangs"]:
                self._hangs(role)

    def _look(self, progress: dict[str, float], threads: dict[str, Thread]) -> None:
        late = [role for role, last in progress.items() if monotonic() - last > PATIENCE]
        if late:
            self._hangs(late[0])
        if dead := [role for role, thread in threads.items() if not thread.is_alive()]:
            self.fail(f"the thread of {dead[0]!r} has ended")
            self.over.set()

    def _hangs(self, role: str) -> None:
        faulthandler.dump_traceback(sys.stderr)
        self.count("hangs")
        self.fail(f"{role}: no progress for {PATIENCE:.0f} s (the stacks are on standard error)")


class Hasty:
    """Within the context threads take turns as often as they can."""

    def __enter__(self) -> None:
        self.before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self.before)


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """What a base model has that it had not, or has no longer, after all was unloaded."""
    after = model.state_dict()
    found = list(before.keys() ^ after.keys())
    found += [
        name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])
    ]
    for name, module in model.named_modules():
        own = module.__dict__
        slots = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
        found += [f"{name}.{slot}" for slot in slots if own[slot]]
        found += [f"{name}.forward"] if "forward" in own else []
        found += [f"{name}._parameters"] if type(module._parameters) is not dict else []
        found += [f"{name} trains"] if module.training else []
    found += [f"{name} is frozen" for name, p in model.named_parameters() if not p.requires_grad]
    return found


def write_folder(adapter: Adapter, folder: Path) -> None:
    """As `save_pretrained` does."""
    from ia3.adapter.files import adapter_files
    from ia3.files.atomic import write_files

    write_files(folder, adapter_files(adapter))
