"""The commands under launchers, with a language model that is spread over the processes."""

from __future__ import annotations

import json

import pytest
from cli.test_launched import check_near, done, fit, in_one_process, place, vectors  # noqa: F401
from support.versions import since

from ia3.base.loading import load_base_model
from ia3.tfew import TFewConfig
from ia3.tfew.prompts.manifest import read_manifest
from ia3.tfew.training.pretraining import pretrain

pytestmark = [pytest.mark.slow, since("transformers", "5.23", "a model that is spread")]


@pytest.mark.parametrize(("launcher", "options"), [("torchrun", ["--shard"]), ("fsdp", [])])
def test_fit_measures_and_writes_what_one_process_does(place, launcher, options):  # noqa: F811
    out = f"sharded-{launcher}"
    code, said, errors = done(
        *fit("llama", out, "--cross-validate", "--json", *options), folder=place, launcher=launcher
    )
    assert code == 0, errors
    assert json.loads(said)["measured"]["accuracy"] is not None
    assert "rror" not in errors
    check_near(vectors(place / out), in_one_process(place, "llama"))


def test_auto_chooses_between_an_encoder_and_a_model_that_is_spread(place):  # noqa: F811
    command = fit("auto", "chosen", "--encoder", "encoder", "--language-model", "llama")
    code, said, errors = done(*command, "--shard", "--json", folder=place)
    assert code == 0, errors
    assert {each["engine"] for each in json.loads(said)["candidates"]} == {
        "encoder",
        "language-model",
    }


def test_pretrain_writes_what_one_process_does(place):  # noqa: F811
    command = ["pretrain", "pretrain.yaml", "--model", "llama", "--steps", 5, "--shard"]
    code, _, errors = done(*command, "--out", "pretrained-sharded", folder=place, count=4)
    assert code == 0, errors
    base = load_base_model(str(place / "llama"))
    tasks = read_manifest(place / "pretrain.yaml")
    expected = pretrain(base, tasks, TFewConfig(steps=5, batch_size=16, learning_rate=0.003))
    check_near(vectors(place / "pretrained-sharded"), expected.vectors)
