"""vLLM in this process, on tiny random models."""

from __future__ import annotations

import os
from importlib.util import find_spec

if find_spec("vllm"):
    # Before its first import. Its processes get them too; it would bind threads to cores.
    os.environ |= {
        "VLLM_PLUGINS": "ia3",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
