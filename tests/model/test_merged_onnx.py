"""A merged folder exported to ONNX by PyTorch's exporter, and run in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.pairs import randomize, vectors
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

import ia3
from ia3.model.merged import on_its_base, write_merged

pytestmark = pytest.mark.slow

BESIDE = "lies beside the environment: see `test-slow` in the Makefile"
onnxruntime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {BESIDE}")


class OneOutput(nn.Module):
    """A model as a function of ids and mask: what is exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return found.logits if "logits" in found else found.last_hidden_state


def exported(model: nn.Module, file: Path):
    ids = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(0))
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        OneOutput(model.eval()),
        (ids, torch.ones_like(ids)),
        file,
        dynamo=True,
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        input_names=["input_ids", "attention_mask"],
        output_names=["output"],
    )
    return onnxruntime.InferenceSession(file)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_onnxruntime_computes_as_the_model_with_the_adapter(make_model, tmp_path, kind):
    task, auto = "CAUSAL_LM", AutoModelForCausalLM
    if kind == "bert":
        task, auto = "FEATURE_EXTRACTION", AutoModel
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=48, **sizes, num_attention_heads=4, initializer_range=0.2)
        BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    else:
        make_model(kind).save_pretrained(tmp_path / "base")
    base = auto.from_pretrained(tmp_path / "base")
    adapted = ia3.get_peft_model(base, ia3.IA3Config(task_type=task))
    randomize(vectors(adapted), 0)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    write_merged(on_its_base(tmp_path / "adapter"), tmp_path / "merged")
    model = auto.from_pretrained(tmp_path / "merged")
    model.config.use_cache = False
    session = exported(model, tmp_path / "model.onnx")
    for shape in ((2, 7), (3, 11), (1, 2)):
        ids = torch.randint(3, 48, shape, generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, shape[1] - 1 :] = 0
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        found = torch.from_numpy(session.run(None, given)[0])
        with torch.no_grad():
            expected = OneOutput(adapted)(ids, mask)
        assert ((found - expected).abs() * mask[:, :, None]).max() < 1e-4
