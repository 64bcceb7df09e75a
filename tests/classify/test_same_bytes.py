"""The same seed gives the same bytes in every file, whatever process trains."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.tfew import child_environment
from support.versions import since

CHILD = """
import sys
from pathlib import Path
from support.tfew import random_model, tiny_t5, word_tokenizer
from transformers import GPT2Config
from ia3 import FewShotClassifier, IA3Config, fit_many, get_peft_model
from ia3.base.loading import BaseModel
from ia3.tfew import TFewConfig
from ia3.tfew.prompts.promptsource import PromptTemplate
from ia3.tfew.prompts.tasks import Task
from ia3.tfew.prompts.templates import Template
from ia3.tfew.training.pretraining import pretrain

class Broken(Exception):
    pass

def work(kind, breaks):
    tokenizer = word_tokenizer(
        "cold hot tea soup ice pan yes no maybe the is a it so".split(), end=kind == "t5"
    )
    if kind == "t5":
        model = tiny_t5(vocabulary=len(tokenizer))
    else:
        # With dropout, so that the steps depend on the random state.
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
        sizes["initializer_range"] = 0.2
        model = random_model(GPT2Config(vocab_size=len(tokenizer), **sizes))
    model.config._name_or_path = "tiny"
    rows = [{"text": text, "note": note, "day": 3} for text in ("cold tea", "hot soup", "cold ice")
            for note in ("it is", "so")]
    labels = ["cold", "warm", "cold", "warm", "icy", "icy"]
    words = {"icy": "maybe", "warm": "yes", "cold": "no"}
    templates = ["{{ note }} {{ text }} is", "the {{ text }} {{ ['a', 'it'] | choice }}"]

    def classifier(**settings):
        return FewShotClassifier(model, templates, words, tokenizer=tokenizer, **settings)

    def break_at(last):
        def on_step(step):
            if breaks and step.step == last:
                raise Broken
        return on_step

    upper = 1 if kind == "gpt2" else None
    classifier(steps=4, upper_blocks=upper).fit(rows, labels).save(f"{kind}/fit")
    for _ in range(2 if breaks else 1):
        try:
            resumed = classifier(steps=28).fit(
                rows, labels, checkpoints=f"{kind}/checkpoints", on_step=break_at(27)
            )
            resumed.save(f"{kind}/resumed")
        except Broken:
            assert Path(kind, "checkpoints", "checkpoint-25").is_dir()
            breaks = False
    tasks = {name: (rows, labels) for name in ("first", "second")}
    settings = {"first": classifier(steps=2), "second": classifier(steps=1, seed=2)}
    fit_many(tasks, settings, out=f"{kind}/many")
    prompt = "the {{ text }} {{ note }} ||| {{ answer_choices[label] }}"
    asks = [PromptTemplate(name, Template(f"{name} {prompt}"), Template("no ||| yes"))
            for name in ("a", "it")]
    train = [{**row, "label": i % 2} for i, row in enumerate(rows)]
    mixture = [Task(name, asks, train[: 3 + i]) for i, name in enumerate(("one", "two", "three"))]
    adapter = pretrain(
        BaseModel(model, tokenizer, "tiny"), mixture, TFewConfig(steps=3, batch_size=2, seed=1)
    )
    classifier(steps=0, init_from=adapter).fit(rows, labels).save(f"{kind}/pretrained")
    config = IA3Config(
        target_modules={"q", "k", "v"} if kind == "t5" else {"c_attn", "mlp.c_proj", "attn.c_proj"},
        feedforward_modules=[] if kind == "t5" else {"mlp.c_proj"},
        modules_to_save=["lm_head"],
    )
    get_peft_model(model, config).save_pretrained(f"{kind}/saved")

work("gpt2", sys.argv[1] == "breaks")
work("t5", sys.argv[1] == "breaks")
"""


def run(folder: Path, how: str, seed: str) -> subprocess.Popen:
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, how],
        cwd=folder,
        # One thread: of several, each process would time how many it takes.
        env={**child_environment(), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@since("huggingface_hub", "2.4", "its model cards have another order in each process")
def test_two_processes_write_the_same_bytes_and_so_does_one_that_was_broken(tmp_path):
    runs = {
        "one": run(tmp_path / "one", "whole", "1"),
        "other": run(tmp_path / "other", "breaks", "2"),
    }
    for process in runs.values():
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    one, other = (files_in(tmp_path / name) for name in runs)
    assert list(one) == list(other)
    folders = {str(Path(*Path(name).parts[:2])) for name in one}
    kept = ("checkpoints", "fit", "many", "pretrained", "resumed", "saved")
    assert folders == {f"{kind}/{name}" for kind in ("gpt2", "t5") for name in kept}
    different = [name for name in one if one[name] != other[name]]
    assert different == []
