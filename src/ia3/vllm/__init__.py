"""(IA)³ adapters in vLLM, which finds `register` by its entry point `ia3`.

    VLLM_PLUGINS=ia3 vllm serve BASE --enable-lora --lora-modules tickets=FOLDER

vLLM's own way of loading LoRA adapters then takes (IA)³ folders too: at the start, with
`/v1/load_lora_adapter`, and as a `LoRARequest`. It imports vLLM only when it is asked for.
"""

from __future__ import annotations

import os

from .versions import check_version, replace_names

# As vLLM reads it: names between commas.
ASKED_BY = "VLLM_PLUGINS"
NAME = "ia3"


def register() -> None:
    """Have this process's vLLM serve (IA)³ adapters, where `VLLM_PLUGINS` names `ia3`.

    vLLM calls every plugin where the variable is not set: then nothing is changed.

    Raises:
        StateError: this version of vLLM has not been tried.
    """
    if NAME in os.environ.get(ASKED_BY, "").split(","):
        check_version()
        replace_names()
    else:
        _say_inactive()


def _say_inactive() -> None:
    from vllm.logger import init_logger

    init_logger(f"vllm.{NAME}").info(
        "ia3 is installed and not active: with %s=%s this serves (IA)³ adapters too", ASKED_BY, NAME
    )
