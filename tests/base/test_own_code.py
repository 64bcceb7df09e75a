"""A model that brings code of its own: transformers neither runs it nor asks."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tfew import tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ia3 import AutoPeftModel, FewShotClassifier, IA3Config, get_peft_model
from ia3.adapter.convert import structure_of
from ia3.base.loading import load_base_model
from ia3.errors import IA3Error

# Harmless: it leaves a file beside itself.
CODE = """
from pathlib import Path
import os
Path(os.environ["IA3_TEST_TRACE"]).write_text("was run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
REFUSED = "brings code of its own"


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IA3_TEST_TRACE", str(tmp_path / "trace"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "trace"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


@pytest.fixture(params=["config", "model", "tokenizer"])
def part(request) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, part: str) -> Path:
    """A model whose config, model or tokenizer is of a class of its own."""
    made = tmp_path / "own"
    tokenizer = word_tokenizer(["yes", "no"])
    tiny_llama(vocabulary=len(tokenizer)).save_pretrained(made)
    tokenizer.save_pretrained(made)
    (made / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    if part == "config":
        change(made / "config.json", model_type="own", auto_map=classes)
    elif part == "model":
        # transformers knows the config, but no language model of it.
        causal = {"AutoModelForCausalLM": "own.OwnModel"}
        change(made / "config.json", model_type="vit", auto_map=causal)
    else:
        own = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
        change(made / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    return made


def test_a_model_with_code_of_its_own_is_refused_wherever_it_is_named(
    folder: Path, part: str, trace: Path, tmp_path: Path
) -> None:
    with pytest.raises(IA3Error, match=REFUSED):
        load_base_model(folder)
    with pytest.raises(IA3Error, match=f"{REFUSED}.*trust_remote_code=True.* model= and token"):
        FewShotClassifier(str(folder), steps=0).fit(["a", "b"], ["yes", "no"])

    # Of a file that somebody else wrote.
    tokenizer = word_tokenizer(["yes", "no"])
    model = tiny_llama(vocabulary=len(tokenizer))
    saved = tmp_path / "saved"
    FewShotClassifier(model, steps=0, tokenizer=tokenizer).fit(["a", "b"], ["yes", "no"]).save(
        saved
    )
    change(saved / "ia3_task.json", model=str(folder))
    with pytest.raises(IA3Error, match=REFUSED):
        FewShotClassifier.load(saved).predict(["a"])
    change(saved / "adapter_config.json", base_model_name_or_path=str(folder))
    if part == "tokenizer":
        for file in folder.glob("*token*"):
            (saved / file.name).write_bytes(file.read_bytes())
        (saved / "own.py").write_text(CODE)
    with pytest.raises(IA3Error, match=REFUSED):
        AutoPeftModel.from_pretrained(saved)
    if part == "config":
        with pytest.raises(IA3Error, match=REFUSED):
            structure_of(folder)
    assert not trace.exists()


@pytest.mark.parametrize("part", ["config"], indirect=True)
def test_a_loaded_model_is_used_and_the_callers_word_is_passed_on(
    folder: Path, trace: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert trace.exists()
    classifier = FewShotClassifier(model, steps=0, tokenizer=tokenizer)
    assert len(classifier.fit(["a", "b"], ["yes", "no"]).predict(["a"])) == 1
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(IA3Error, match=f"{REFUSED}.*say trust_remote_code=True"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert AutoPeftModel.from_pretrained(tmp_path / "adapter", trust_remote_code=True)


@pytest.mark.parametrize("part", ["config"], indirect=True)
def test_nobody_is_asked_at_a_terminal(folder: Path, trace: Path) -> None:
    program = f"""
from ia3.base.loading import load_base_model
from ia3.errors import IA3Error
try:
    load_base_model({str(folder)!r})
except IA3Error as error:
    print(error)
"""
    # Were a question asked, it would be answered with yes.
    terminal, theirs = pty.openpty()
    os.write(terminal, b"y\ny\n")
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], stdin=theirs, capture_output=True, timeout=120
        )
    finally:
        os.close(terminal)
        os.close(theirs)
    assert REFUSED in done.stdout.decode()
    assert b"[y/N]" not in done.stdout + done.stderr
    assert not trace.exists()


def test_weights_in_a_pickle_run_no_code(tmp_path: Path, trace: Path) -> None:
    class Code:
        def __reduce__(self):
            return (Path.touch, (trace,))

    tokenizer = word_tokenizer(["yes", "no"])
    model = tiny_llama(vocabulary=len(tokenizer))
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_base_model(tmp_path).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    torch.save({**model.state_dict(), "code": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(IA3Error, match="cannot be loaded: its weights are a pickle that"):
        load_base_model(tmp_path, dtype="float64")
    assert not trace.exists()
