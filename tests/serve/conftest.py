"""A server with two small models and a folder of adapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.encoders import encoder_folder
from support.served import Server, save_classifier, save_language_model

from ia3.serve.engine.bases import ServedBase, serve_base


@dataclass(frozen=True)
class Made:
    """Folders of a language model, an encoder, and adapters of both; two of these are broken."""

    model: str
    encoder: str
    adapters: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("served")
    model, encoder = save_language_model(folder / "model"), str(encoder_folder(folder / "encoder"))
    adapters = folder / "adapters"
    save_classifier(model, adapters / "tickets")
    save_classifier(model, adapters / "later", learning_rate=0.3)
    save_classifier(encoder, adapters / "sorted")
    shutil.copytree(adapters / "tickets", adapters / "plain")
    (adapters / "plain/ia3_task.json").unlink()
    _without_copies(adapters / "plain")
    shutil.copytree(adapters / "tickets", adapters / "cut")
    weights = adapters / "cut/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    other = save_language_model(folder / "other", seed=1)
    save_classifier(other, adapters / "stranger")
    return Made(model, encoder, adapters)


def _without_copies(folder: Path) -> None:
    """Take the task out of the header too, as PEFT writes the file."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})


@pytest.fixture(scope="module")
def bases(made: Made) -> Iterator[list[ServedBase]]:
    """Both models in this process, each with a bank for three adapters."""
    bases = [serve_base(made.model, capacity=3), serve_base(made.encoder, capacity=3)]
    yield bases
    for base in bases:
        # A model is loaded once; the next module makes a bank of its own.
        base.bank.close()
        base.bank.model.unload()


@pytest.fixture(scope="session")
def server(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a copy of the adapters; tests leave them as they were."""
    adapters = tmp_path_factory.mktemp("copied") / "adapters"
    shutil.copytree(made.adapters, adapters)
    with Server("--model", made.encoder, "--model", made.model, "--adapters", adapters) as running:
        running.adapters = adapters  # type: ignore[attr-defined]
        yield running
