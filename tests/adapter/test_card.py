"""The model card beside an adapter: written with it, and a person's words in it are kept."""

import copy

import peft
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

import ia3
from ia3 import IA3Config, get_peft_model
from ia3.adapter.card import model_card
from ia3.base.embedded import EMBEDDED_MODEL

CAUSAL = IA3Config(task_type="CAUSAL_LM", base_model_name_or_path="someone/base")


def head(folder):
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_a_card_says_what_pefts_says(tiny_llama, tmp_path):
    tiny_llama.name_or_path = tiny_llama.config._name_or_path = "someone/base"
    tiny_llama.add_model_tags("mine")
    for library in (ia3, peft):
        model = library.get_peft_model(
            copy.deepcopy(tiny_llama), library.IA3Config(task_type="CAUSAL_LM")
        )
        model.save_pretrained(tmp_path / library.__name__)
    ours, theirs = head(tmp_path / "ia3"), head(tmp_path / "peft")
    assert "ia3" in ours["tags"]
    ours["tags"].remove("ia3")
    # PEFT overlooks the base model's own tags, which are on its tuner.
    assert set(ours.pop("tags")) == {*theirs.pop("tags"), "mine"}
    assert ours == theirs
    text = (tmp_path / "ia3" / "README.md").read_text("utf-8")
    assert "[someone/base](https://huggingface.co/someone/base)" in text
    assert f"- ia3 {ia3.__version__}" in text


def test_no_path_of_this_machine_is_in_a_card(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    base = type(tiny_llama).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text("utf-8")
    assert "base_model" not in head(tmp_path / "adapter")
    # A folder that is gone, or another machine's.
    for name in (EMBEDDED_MODEL, "/data/models/base", "../base", "C:\\models\\base", "a/b/c", ""):
        card = model_card(None, IA3Config(base_model_name_or_path=name))
        assert not name or name not in card
        assert "base_model" not in card.partition("\n---\n")[0]


MINE = """---
license: mit
tags:
- mine
# a remark
base_model: someone/else
---

# What I wrote

with  spaces\tand a last line without an end"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_persons_text_and_what_their_head_says_are_kept(tiny_llama, tmp_path, line_end):
    mine = MINE.replace("\n", line_end).encode()
    (tmp_path / "README.md").write_bytes(mine)
    tiny_llama.name_or_path = tiny_llama.config._name_or_path = "someone/base"
    model = get_peft_model(tiny_llama, IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    after = (tmp_path / "README.md").read_bytes()
    text = b"# What I wrote" + mine.split(b"# What I wrote")[1]
    assert after.endswith(line_end.encode() + text)
    said = head(tmp_path)
    assert (said["license"], said["base_model"]) == ("mit", "someone/else")
    assert said["tags"][0] == "mine"
    assert {"ia3", "transformers"} <= set(said["tags"])
    # Nothing is left to add.
    model.save_pretrained(tmp_path)
    model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == after


def test_a_text_without_a_head_gets_one(tmp_path):
    found = model_card("# Mine\n\n---\nnot a head\n---\n", CAUSAL)
    top, _, text = found.partition("\n---\n")
    assert text == "# Mine\n\n---\nnot a head\n---\n"
    assert yaml.safe_load(top.removeprefix("---"))["library_name"] == "peft"


@pytest.mark.parametrize(
    "content",
    [
        *(b"---\ntags: [a\n---\n# Mine\n", b"\xff\xfe no text", b"---\n- a list\n---\n"),
        # What the reader of YAML, the hub's reader and the completion do not expect.
        *(b"---\ntags: [[1], {a: 2}]\n---\n", b"---\ntags: 5\n---\n", b"---\nto_dict: 3\n---\n"),
        *(b"---\na: !!float\n---\n", b"---\n!!timestamp\n---\n", b"---\na: 2001-99-99\n---\n"),
        b"---\nlanguage: " + b"[" * 900 + b"]" * 900 + b"\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_is_left_alone(tiny_llama, tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    model = get_peft_model(tiny_llama, IA3Config())
    model.save_pretrained(tmp_path)
    model.create_or_update_model_card(str(tmp_path))
    assert (tmp_path / "README.md").read_bytes() == content
    assert (tmp_path / "adapter_config.json").is_file()


def test_one_card_goes_into_the_folder_that_was_named(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama, IA3Config())
    model.add_adapter("other", IA3Config())
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "one", adapter_name="other")
    model.save_pretrained(tmp_path / "inside", selected_adapters=["other"])
    found = {str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("README.md")}
    assert found == {"all", "one", "inside"}
    model.unload()
    model.create_or_update_model_card(tmp_path / "none")
    assert head(tmp_path / "none")["library_name"] == "peft"


def test_the_trainers_card_stays_an_adapters(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama, IA3Config(task_type="CAUSAL_LM"))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments)
    trainer.save_model()
    trainer.create_model_card()
    assert head(tmp_path)["library_name"] == "peft"
    assert "num_epochs: 3.0" in (tmp_path / "README.md").read_text("utf-8")
