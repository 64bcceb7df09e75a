"""transformers' `Trainer` treats a model with adapters as it treats PEFT's."""

import copy
import logging
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from accelerate.utils import fsdp_utils, is_peft_model
from safetensors.torch import load_file, save_file
from support.pairs import randomize, vectors
from support.versions import since
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp import wrap

import ia3
from ia3 import IA3Config, IA3Error, IA3Model, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

VOCABULARY = 48
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
BERT = {**SIZES, **LAYERS, "num_labels": 3}
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
FAST = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
STEPS = 4
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
BASE_FILES = {"model.safetensors", "pytorch_model.bin", "config.json"}


def classifier():
    """With dropout, so that the random state matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.BertForSequenceClassification(hf.BertConfig(**BERT))


def rows(count=16):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, VOCABULARY, (7,), generator=generator),
            "attention_mask": torch.ones(7, dtype=torch.long),
            "labels": torch.tensor(i % 3),
            "row": torch.tensor(i),  # no argument of the model
        }
        for i in range(count)
    ]


def adapted(library=ia3, task_type="SEQ_CLS"):
    return library.get_peft_model(classifier(), library.IA3Config(task_type=task_type))


def trainer(model, folder, subclass=hf.Trainer, data=None, **arguments):
    given = {"max_steps": STEPS, "save_steps": 2, **QUIET, **FAST, **arguments}
    kind = hf.Seq2SeqTrainingArguments if subclass is hf.Seq2SeqTrainer else hf.TrainingArguments
    args = kind(str(folder), **given)
    return subclass(model=model, args=args, train_dataset=data or rows(), eval_dataset=rows(8))


def files(folder):
    return {path.name for path in folder.iterdir()}


def values(model):
    library = ia3 if isinstance(model, IA3Model) else peft
    return copy.deepcopy(library.get_peft_model_state_dict(model))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


CHECKPOINTING = {"gradient_checkpointing": True}
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
CHOICES = {
    "plain": {},
    "bfloat16": {"bf16": True},
    "checkpointing": CHECKPOINTING,
    "reentrant checkpointing": CHECKPOINTING | REENTRANT,
    "accumulation": {"gradient_accumulation_steps": 2},
    "noise and smoothing": {"neftune_noise_alpha": 1.0, "label_smoothing_factor": 0.1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize(
    ("task_type", "choice"), [("SEQ_CLS", choice) for choice in CHOICES] + [(None, "plain")]
)
def test_losses_are_pefts(tmp_path, task_type, choice):
    losses, trained = [], []
    for library in (ia3, peft):
        folder = tmp_path / library.__name__
        given = {"save_strategy": "no", "max_steps": 2, **CHOICES[choice]}
        run = trainer(adapted(library, task_type), folder, **given)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        losses[-1].append(run.evaluate()["eval_loss"])
        trained.append(values(run.model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    near = {"rtol": 1e-2, "atol": 1e-3} if choice == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(trained[0], trained[1], **near)
    start = values(adapted(ia3, task_type))
    assert all(not torch.equal(trained[0][name], start[name]) for name in start)


def test_a_checkpoint_holds_the_adapter_alone(tmp_path):
    run = trainer(adapted(), tmp_path)
    run.train()
    for step in (2, 4):
        found = files(tmp_path / f"checkpoint-{step}")
        assert found >= ADAPTER_FILES
        assert not found & BASE_FILES
    inputs = {"input_ids": rows()[0]["input_ids"][None]}
    expected = run.model.eval()(**inputs).logits
    again = PeftModel.from_pretrained(classifier().eval(), tmp_path / "checkpoint-4")
    assert torch.equal(again(**inputs).logits, expected)
    theirs = peft.PeftModel.from_pretrained(classifier().eval(), tmp_path / "checkpoint-4")
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


# -- what other libraries ask ----------------------------------------------------------------------

TASKS = ["SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


@pytest.mark.parametrize("task_type", [*TASKS, None])
def test_a_model_is_an_instance_of_pefts_class_of_its_task(tiny_llama, task_type):
    model = get_peft_model(tiny_llama, IA3Config(task_type=task_type, modules_to_save=["lm_head"]))
    theirs = {task: peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] for task in TASKS}
    assert isinstance(model, peft.PeftModel)
    assert {task for task, kind in theirs.items() if isinstance(model, kind)} == {task_type} - {
        None
    }
    assert is_peft_model(model)
    assert isinstance(model, IA3Model)
    assert not isinstance(model, (peft.PeftMixedModel, hf.PreTrainedModel))
    # Nothing is inherited from PEFT.
    assert not any(kind.__module__.startswith("peft") for kind in type(model).__mro__)
    assert model.__class__.__name__ == type(model).__name__


def test_copies_and_pickles_are_of_the_own_class(tmp_path):
    model = adapted().eval()
    inputs = {"input_ids": rows()[0]["input_ids"][None]}
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    pickled = [pickle.loads(pickle.dumps(model, protocol)) for protocol in range(2, 6)]
    # In pure Python, as cloudpickle and dill do.
    pickled.append(pickle.loads(pickle._dumps(model)))
    for twin in (copy.deepcopy(model), read, *pickled):
        assert type(twin) is ia3.PeftModelForSequenceClassification
        assert isinstance(twin, peft.PeftModelForSequenceClassification)
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_a_class_made_of_what_a_model_says_is_its_class():
    """FSDP gives a model a class under its own and this one; others make new objects of it."""
    model = adapted()
    kind = model.__class__
    assert type(kind.__new__(kind)) is ia3.PeftModelForSequenceClassification
    assert type(kind(classifier(), IA3Config())) is ia3.PeftModelForSequenceClassification

    class Sharded:
        sharded = True

    model.__class__ = type("Both", (Sharded, kind), {"own": 1})
    assert (type(model).__name__, model.sharded, model.own) == ("Both", True, 1)
    assert isinstance(model, (Sharded, ia3.PeftModelForSequenceClassification))
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    assert not any(kind.__module__.startswith("peft") for kind in type(model).__mro__)
    model.__class__ = kind
    assert type(model) is ia3.PeftModelForSequenceClassification


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_is_what_it_was(tiny_llama, fullgraph):
    model = get_peft_model(tiny_llama, IA3Config(task_type="CAUSAL_LM")).eval()
    ids = torch.arange(3, 12)[None]
    expected = model(input_ids=ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected)


def test_pefts_state_dict_functions_know_the_vectors(tmp_path):
    """accelerate calls them for what is an instance of PEFT's class."""
    ours, theirs = adapted(), adapted(peft)
    for model in (ours, theirs):
        model.add_adapter("other", type(model.peft_config["default"])(task_type="SEQ_CLS"))
        for seed, name in enumerate(("default", "other")):
            randomize(vectors(model, name), seed)
    for name in ("default", "other"):
        expected = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        found = peft.get_peft_model_state_dict(ours, adapter_name=name)
        assert_same(found, expected)
        again = adapted()
        again.add_adapter("else", IA3Config(task_type="SEQ_CLS"))
        result = peft.set_peft_model_state_dict(again, expected, adapter_name="else")
        assert not result.unexpected_keys
        assert_same(ia3.get_peft_model_state_dict(again, adapter_name="else"), expected)
    # PEFT's own models are left alone.
    assert_same(peft.get_peft_model_state_dict(theirs), values(theirs))


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@since("accelerate", "1.15", "it does not save what trains alone")
@pytest.mark.parametrize(("version", "kind"), [(1, "FULL"), (1, "SHARDED"), (2, "SHARDED")])
def test_accelerates_checkpoint_of_a_sharded_model_has_the_adapter(
    one_process, tmp_path, tiny_llama, version, kind, monkeypatch
):
    monkeypatch.setattr(fsdp_utils, "logger", logging.getLogger("quiet"))

    def sharded(base):
        config = IA3Config(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        model = get_peft_model(base, config).eval()
        blocks = base.model.layers
        if version == 1:
            policy = wrap.ModuleWrapPolicy({type(blocks[0])})
            options = {"use_orig_params": True, "device_id": torch.device("cpu")}
            return fsdp.FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in (*blocks, model):
            fsdp.fully_shard(module, mesh=mesh)
        return model

    plugin = SimpleNamespace(
        fsdp_version=version,
        state_dict_type=fsdp.StateDictType[f"{kind}_STATE_DICT"],
        state_dict_config={
            "FULL": fsdp.FullStateDictConfig(),
            "SHARDED": fsdp.ShardedStateDictConfig(),
        }[kind],
        optim_state_dict_config=None,
        sync_module_states=False,
    )
    process = SimpleNamespace(
        num_processes=1,
        process_index=0,
        is_main_process=True,
        is_fsdp2=version == 2,
        wait_for_everyone=lambda: None,
    )
    ids = torch.arange(3, 12)[None]
    fresh = sharded(copy.deepcopy(tiny_llama))
    model = sharded(tiny_llama)
    assert is_peft_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
        expected = model(input_ids=ids).logits
        assert not torch.allclose(fresh(input_ids=ids).logits, expected)
        fsdp_utils.save_fsdp_model(plugin, process, model, tmp_path, adapter_only=True)
        fsdp_utils.load_fsdp_model(plugin, process, fresh, tmp_path, adapter_only=True)
        assert torch.equal(fresh(input_ids=ids).logits, expected)


# -- resuming --------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


class StopsAfter3(hf.Trainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise StoppedError
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    ("begun_with", "choice"), [(ia3, "plain"), (ia3, "bfloat16"), (peft, "plain")]
)
def test_resuming_ends_as_a_whole_run(tmp_path, begun_with, choice):
    whole = trainer(adapted(begun_with), tmp_path / "whole", **CHOICES[choice])
    whole.train()
    with pytest.raises(StoppedError):
        trainer(adapted(begun_with), tmp_path / "parts", StopsAfter3, **CHOICES[choice]).train()
    rest = trainer(adapted(), tmp_path / "parts", **CHOICES[choice])
    rest.train(resume_from_checkpoint=True)
    steps = [entry["step"] for entry in rest.state.log_history if "loss" in entry]
    assert steps == [1, 2, 3, 4]
    near = {"rtol": 0, "atol": 0} if begun_with is ia3 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(values(rest.model), values(whole.model), **near)


def test_resuming_with_several_adapters(tmp_path):
    def two_adapters():
        model = adapted()
        model.add_adapter("other", IA3Config(target_modules=["query"], feedforward_modules=[]))
        for vector in model.vectors("other").values():
            vector.data.fill_(1.5)
        model.set_adapter("other")
        return model

    whole = trainer(two_adapters(), tmp_path / "whole")
    whole.train()
    with pytest.raises(StoppedError):
        trainer(two_adapters(), tmp_path / "parts", StopsAfter3).train()
    assert files(tmp_path / "parts/checkpoint-2/other") == ADAPTER_FILES
    rest = trainer(two_adapters(), tmp_path / "parts")
    rest.train(resume_from_checkpoint=True)
    assert rest.model.active_adapters == ["other"]
    for name in ("default", "other"):
        for module, vector in whole.model.vectors(name).items():
            assert torch.equal(rest.model.vectors(name)[module], vector), (name, module)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    scores = iter([1.0, 0.0])
    model = adapted()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    run = trainer(model, tmp_path, eval_steps=2, eval_strategy="steps", **best)
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert_same(values(model), load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert any(not torch.equal(last[name], value) for name, value in values(model).items())
    assert run.model is model
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_loading_into_an_adapter_changes_its_values_in_place(tmp_path):
    source, model = adapted(), adapted()
    for parameter in source.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    source.save_pretrained(tmp_path)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = model.peft_config["default"]
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(values(model), values(source))
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameter for name, parameter in parameters.items())
    assert model.peft_config["default"] is config


@pytest.mark.parametrize("spoiled", ["ia3_l", "classifier.weight"])
@pytest.mark.parametrize("how", ["gone", "shape", "extra"])
def test_loading_what_does_not_fit_changes_nothing(tmp_path, spoiled, how):
    model = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    name = next(name for name in sorted(tensors) if name.endswith(spoiled))
    if how == "gone":
        del tensors[name]
    elif how == "shape":
        tensors[name] = torch.ones(7, 7)
    else:
        tensors[name.replace("base_model.model.", "base_model.model.no.")] = tensors[name].clone()
    save_file(tensors, file)
    before = values(model)
    with pytest.raises(IA3Error, match="does not fit"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    model.merge_adapter()
    with pytest.raises(IA3Error, match=r"'default' is merged: unmerge_adapter\(\) first"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(values(model), before)


def test_loading_where_other_values_stay_one_changes_nothing(tmp_path, tiny_gpt2):
    """PEFT's sites and the paper's differ on GPT-2 in what of the vectors is trained alone."""
    model = get_peft_model(tiny_gpt2, IA3Config())
    for vector in model.vectors("default").values():
        vector.data.fill_(2.0)
    model.save_pretrained(tmp_path)
    paper = get_peft_model(model.unload(), IA3Config(paper_sites=True))
    with pytest.raises(IA3Error, match="stay one"):
        paper.load_adapter(tmp_path, "default")
    assert all(bool((v == 1).all()) for v in paper.vectors("default").values())


# -- columns and labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_columns_are_those_of_the_base_model(tmp_path, task_type):
    seen = []
    model = adapted(ia3, task_type)
    forward = type(model.model).forward

    class Watched(hf.Trainer):
        def training_step(self, model, inputs, *args):
            seen.append(set(inputs))
            return super().training_step(model, inputs, *args)

    trainer(model, tmp_path, Watched, max_steps=1, save_strategy="no").train()
    assert seen == [{"input_ids", "attention_mask", "labels"}]
    assert type(model.model).forward is forward


def test_labels_are_those_of_the_base_model(tmp_path):
    data = [
        {name: row[name] for name in ("input_ids", "attention_mask")}
        | {"start_positions": torch.tensor(i % 7), "end_positions": torch.tensor(i % 5)}
        for i, row in enumerate(rows(8))
    ]
    found = []
    for library in (ia3, peft):
        torch.manual_seed(0)
        base = hf.BertForQuestionAnswering(hf.BertConfig(**{**BERT, "num_labels": 2}))
        model = library.get_peft_model(base, library.IA3Config(task_type="QUESTION_ANS"))
        run = trainer(model, tmp_path, data=data, max_steps=2, save_strategy="no")
        run.train()
        prediction = run.predict(data)
        assert run.label_names == ["start_positions", "end_positions"]
        found.append((prediction.metrics["test_loss"], prediction.label_ids))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    np.testing.assert_equal(found[0][1], found[1][1])


def test_generating_while_evaluating(tmp_path, tiny_t5):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, 2, 5), generator=generator).tolist()
    data = [
        {"input_ids": prompt, "attention_mask": [1] * 5, "labels": answer} for prompt, answer in ids
    ]
    model = get_peft_model(tiny_t5, IA3Config(task_type="SEQ_2_SEQ_LM"))
    options = {"predict_with_generate": True, "generation_max_length": 6}
    run = trainer(model, tmp_path, hf.Seq2SeqTrainer, data, max_steps=2, save_steps=1, **options)
    run.train()
    prediction = run.predict(data)
    inputs = torch.tensor([row["input_ids"] for row in data])
    expected = model.generate(input_ids=inputs, max_length=6)
    assert torch.equal(torch.tensor(prediction.predictions)[:, : expected.shape[1]], expected)
    assert files(tmp_path / "checkpoint-1") >= ADAPTER_FILES


class Other(nn.Embedding):
    def forward(self, input_ids, labels):
        scores = super().forward(input_ids).mean(1)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (classifier, {"model.safetensors", "config.json"}),
        (lambda: adapted().merge_and_unload(), {"model.safetensors", "config.json"}),
        (lambda: adapted(peft), ADAPTER_FILES),
        (lambda: Other(VOCABULARY, 3), {"model.safetensors"}),
    ],
    ids=["a base model", "a merged one", "PEFT's", "not transformers'"],
)
def test_other_models_are_saved_as_ever(tmp_path, make, expected):
    trainer(make(), tmp_path, max_steps=2).train()
    assert files(tmp_path / "checkpoint-2") & (ADAPTER_FILES | BASE_FILES) == expected


WITHOUT_PEFT = """
import importlib.util, sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")

sys.meta_path.insert(0, Nowhere())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] == "peft" else found(name, package)
)
"""

TRAINER = "from transformers import Trainer, TrainingArguments"

MODEL = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
))
before = "transformers.trainer" in sys.modules
import ia3
model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
assert ("transformers.trainer" in sys.modules) == before
"""

TRAIN = """
from pathlib import Path
row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3]), "row": 0}
folder = Path(sys.argv[1])
def run(steps, resume):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, per_device_train_batch_size=2,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 8)
    assert trainer.label_names == ["labels"]
    trainer.train(resume_from_checkpoint=resume)
run(1, None)
run(2, True)
names = {path.name for path in (folder / "checkpoint-2").iterdir()}
assert {"adapter_config.json", "adapter_model.safetensors"} <= names, names
assert not {"model.safetensors", "config.json"} & names, names
print("peft" in sys.modules)
"""


@pytest.mark.parametrize(
    ("script", "peft_is_there"),
    [
        pytest.param(WITHOUT_PEFT + TRAINER + MODEL + TRAIN, False, marks=pytest.mark.slow),
        pytest.param(WITHOUT_PEFT + MODEL + TRAINER + TRAIN, False, marks=pytest.mark.slow),
        (MODEL + TRAINER + TRAIN, True),
    ],
    ids=["no peft, Trainer first", "no peft, model first", "peft, model first"],
)
def test_in_any_order(tmp_path, script, peft_is_there):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(peft_is_there)


ASK = """
from accelerate.utils import is_peft_model
from peft import PeftModel, PeftModelForCausalLM
assert isinstance(model, PeftModel) and isinstance(model, PeftModelForCausalLM)
assert is_peft_model(model)
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("from peft import PeftModel" + MODEL, marks=pytest.mark.slow),
        MODEL,
        pytest.param(MODEL + "model.config\n", marks=pytest.mark.slow),
    ],
    ids=["peft first", "model first", "model asked first"],
)
def test_pefts_class_in_any_order_and_peft_is_not_imported_for_it(script):
    script = script.replace("import ia3", "had_peft = 'peft' in sys.modules\nimport ia3")
    script += "assert ('peft' in sys.modules) == had_peft\n" + ASK
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_peft_a_model_is_of_its_own_class_alone():
    script = WITHOUT_PEFT + MODEL + "assert model.__class__ is type(model)\n"
    script += "from accelerate.utils import is_peft_model\nassert not is_peft_model(model)\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
