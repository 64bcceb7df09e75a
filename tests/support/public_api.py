"""Everything public: each function, method and property, with good values for its parameters."""

from __future__ import annotations

import builtins
import contextlib
import enum
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Trainer

import ia3
import ia3.compat.peft
import ia3.tfew
from ia3 import errors
from ia3.adapter.files import Adapter
from ia3.base.loading import BaseModel
from ia3.tfew.prompts.templates import Template
from support.tfew import word_tokenizer

MODULES = (ia3, ia3.tfew, ia3.compat.peft)
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
TEXTS = ["I was charged twice", "My parcel is lost"]
LABELS = ["billing", "delivery"]
WORDS = [*" ".join([*TEXTS, *LABELS, "Category :"]).split(), "Billing", "Delivery"]

# Values that hardly any parameter takes.
BAD: dict[str, Any] = {
    "None": None,
    "0": 0,
    "-1": -1,
    "1.5": 1.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "an empty text": "",
    "a name of nothing": "no such thing",
    "a text with a null byte": "a\0b",
    "half a surrogate pair": "\ud800",
    "bytes": b"x",
    "an empty list": [],
    "an empty mapping": {},
    "an object": object(),
    "a function": lambda *args, **options: None,
    "a number of 401 digits": 10**400,
    "a number of 5,001 digits": 10**5000,
    "nested lists": [[["deep"]]],
    "a path within a file": Path("/dev/null/nothing"),
    "a complex tensor": torch.ones(2, 3, dtype=torch.complex64),
}
# What a docstring may name that is not this package's: a disk that is full or may not be written.
BUILTINS = {"OSError"}


@dataclass(frozen=True)
class Public:
    """A public callable: how it is called, and where its docstring is."""

    name: str
    call: Callable[..., Any]
    doc: str
    parameters: dict[str, inspect.Parameter]

    def raised(self) -> dict[str, type[BaseException]]:
        """Name -> class of what the docstring's `Raises:` lists."""
        return {name: error_named(name) for name in names_raised(self.doc)}


def names_raised(doc: str) -> list[str]:
    """The names in a docstring's section `Raises:`, in its order."""
    found = re.search(r"^Raises:\n((?:    .*\n|\n)+)", inspect.cleandoc(doc) + "\n", re.MULTILINE)
    lines = found.group(1).splitlines() if found else []
    return [name for line in lines for name in re.findall(r"^    (\w+):", line)]


def error_named(name: str) -> type[BaseException]:
    """The class that a docstring names; `LookupError` where there is none."""
    for module in (*MODULES, errors):
        if inspect.isclass(found := getattr(module, name, None)):
            return found
    if name in BUILTINS:
        return getattr(builtins, name)
    raise LookupError(f"no class {name!r}")


def public() -> Iterator[Public]:
    """All of it, each once; what is inherited from other libraries is theirs."""
    seen: set[int] = set()
    for module in MODULES:
        for name in getattr(module, "__all__", ["install", "uninstall"]):
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):  # the package of the same name
                value = sys.modules[f"{value.__name__}.mixed"].classify
            if id(value) in seen or isinstance(value, dict | tuple):
                continue
            seen.add(id(value))
            where = f"{module.__name__}.{name}"
            if not isinstance(value, type):
                yield _function(where, value, value.__doc__ or "")
            elif not issubclass(value, BaseException | enum.Enum):
                maker = next(base for base in value.__mro__ if "__init__" in vars(base))
                yield _function(where, value, maker.__doc__ or "")
                yield from _members(value, seen)


def _members(kind: type, seen: set[int]) -> Iterator[Public]:
    for base in kind.__mro__:
        if not base.__module__.startswith("ia3."):
            continue
        for name, member in vars(base).items():
            # The Trainer calls what it has, in its own way.
            theirs = issubclass(base, Trainer) and hasattr(Trainer, name)
            if name.startswith("_") or theirs or id(member) in seen:
                continue
            seen.add(id(member))
            where = f"{base.__name__}.{name}"
            if isinstance(member, property):
                yield Public(where, member.fget, member.__doc__ or "", _parameters(member.fget))
            elif isinstance(member, classmethod):
                yield _function(where, getattr(kind, name), member.__doc__ or "")
            elif isinstance(member, types.FunctionType):
                yield _function(where, member, member.__doc__ or "")


def _function(where: str, call: Callable[..., Any], doc: str) -> Public:
    return Public(where, call, doc, _parameters(call))


def _parameters(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(call).parameters
    return {name: p for name, p in found.items() if p.kind not in various}


# -- good values -----------------------------------------------------------------------------------


class World:
    """Real small things to call with, made when first asked for and shared until they change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self._made: dict[str, Any] = {}
        self._before: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._made:
            self._made[name] = getattr(self, f"_{name}")()
        return self._made[name]

    def watch(self) -> None:
        """Remember what there is now."""
        if self._made.keys() - self._before.keys():  # what is made may change what it is made of
            self._before = {name: seen_of(thing) for name, thing in self._made.items()}

    def changed(self) -> list[str]:
        """What is not as it was, which is made anew when asked for again."""
        return [n for n, before in self._before.items() if seen_of(self._made[n]) != before]

    def renew(self, names: list[str]) -> None:
        for name in names or ():
            for other in (name, *USES.get(name, ())):
                self._made.pop(other, None)
                self._before.pop(other, None)

    def _base(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()

    def _adapted(self) -> ia3.IA3Model:
        model = ia3.get_peft_model(self._base(), ia3.IA3Config())
        model.add_adapter("second", ia3.IA3Config())
        return model

    def _injected(self) -> nn.Module:
        return ia3.inject_adapter_in_model(ia3.IA3Config(), self._base())

    def _bank(self) -> ia3.AdapterBank:
        bank = ia3.AdapterBank(self._base(), capacity=2)
        bank.add("row", self.adapter)
        return bank

    def _adapter(self) -> Adapter:
        return self._adapted().adapter("default")

    def _saved(self) -> Path:
        self._adapted().save_pretrained(self.folder / "saved", adapter_name="default")
        return self.folder / "saved"

    def _tokenizer(self) -> Any:
        return word_tokenizer(WORDS)

    def _base_model(self) -> BaseModel:
        return BaseModel(self._base(), self.tokenizer, "tiny")

    def _classifier(self) -> ia3.FewShotClassifier:
        settings = {"steps": 0, "template": "{{ text }} Category :"}
        return ia3.FewShotClassifier(self._base(), tokenizer=self.tokenizer, **settings).fit(
            TEXTS, LABELS
        )

    def _classifiers(self) -> ia3.AdapterBank:
        """A bank of one classifier on an encoder."""
        folder = self.folder / "encoder"
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
        config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
        BertModel(config).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        classifier = ia3.FewShotClassifier(str(folder), steps=0).fit(TEXTS, LABELS)
        classifier.save(self.folder / "on_encoder")
        bank = ia3.AdapterBank(BertModel.from_pretrained(folder))
        bank.add("row", self.folder / "on_encoder")
        return bank

    def _unfitted(self) -> ia3.FewShotClassifier:
        return self.classifier.__sklearn_clone__()

    def _saved_classifier(self) -> Path:
        self.classifier.save(self.folder / "classifier")
        return self.folder / "classifier"

    def _in_context(self) -> ia3.InContextClassifier:
        settings = {"template": "{{ text }} Category :", "tokenizer": self.tokenizer}
        return ia3.InContextClassifier(self._base(), **settings).fit(TEXTS, LABELS)

    def _encoder(self) -> ia3.tfew.Encoder:
        return ia3.tfew.Encoder(self.base_model, LABELS, chat=False)

    def _prompt_template(self) -> ia3.tfew.PromptTemplate:
        prompt = Template("{{ text }} Category : ||| {{ answer_choices[label] }}", name="ask")
        return ia3.tfew.PromptTemplate("ask", prompt, Template("billing ||| delivery"))

    def _rows(self) -> list[dict[str, Any]]:
        return [{"text": text, "label": label} for label, text in enumerate(TEXTS)]

    def _task(self) -> ia3.tfew.Task:
        return ia3.tfew.Task("tickets", [self.prompt_template], self.rows, self.rows)

    def _examples(self) -> list[ia3.tfew.TrainingExample]:
        return self.task.training_examples(self.encoder)

    def _on_base_model(self) -> ia3.IA3Model:
        return ia3.get_peft_model(self.base_model.model, ia3.IA3Config())

    def _trainer(self) -> ia3.tfew.TFewTrainer:
        config = ia3.tfew.TFewConfig(steps=1)
        settings = ia3.tfew.training_arguments(self.base_model, config, self.folder / "trainer")
        return ia3.tfew.TFewTrainer(
            self.base_model, self.on_base_model, self.examples, config, settings
        )

    def _table(self) -> Path:
        path = self.folder / "rows.csv"
        path.write_text("text,label\nI was charged twice,billing\nMy parcel is lost,delivery\n")
        return path

    def _yaml(self) -> Path:
        templates = Path(ia3.tfew.__file__).parent / "prompts" / "template_files"
        return templates / "overruling.yaml"


# What is made of something goes with it.
USES = {
    "base_model": ("encoder", "examples", "on_base_model", "trainer"),
    "on_base_model": ("base_model", "encoder", "examples", "trainer"),
    "trainer": ("on_base_model", "base_model", "encoder", "examples"),
    "classifier": ("unfitted", "saved_classifier"),
}


def seen_of(thing: Any) -> Any:
    """What of a thing must not change where a call with it raises; `None` for plain values."""
    if isinstance(thing, ia3.AdapterBank):
        return (seen_of(thing.model), thing.list(), id(thing.values), thing.values._version)
    if isinstance(thing, BaseModel):
        return seen_of(thing.model)
    if isinstance(thing, ia3.FewShotClassifier | ia3.InContextClassifier):
        return ({k: id(v) for k, v in vars(thing).items() if k != "_base"}, seen_of(thing.model))
    if isinstance(thing, ia3.IA3Config):
        return thing.to_dict()
    if isinstance(thing, Adapter):
        return (thing.config.to_dict(), {k: _tensor(v) for k, v in thing.vectors.items()})
    if isinstance(thing, Trainer):
        return seen_of(thing.model)
    if not isinstance(thing, nn.Module):
        return None
    tensors = {**dict(thing.named_parameters()), **dict(thing.named_buffers())}
    seen = {name: _tensor(t) for name, t in tensors.items()}
    modules = {name: (id(m), m.training) for name, m in thing.named_modules()}
    if isinstance(thing, ia3.IA3Model):
        on = thing._adapters
        return (seen, modules, list(on.configs), on.active, on.enabled, on.merge.adapters)
    return (seen, modules)


def _tensor(tensor: Tensor) -> Any:
    return (id(tensor), tensor._version, tensor.dtype, tensor.requires_grad)


LOGITS = torch.zeros(2, 2, 3, 8)
GOOD: dict[str, Callable[[World], Any]] = {
    "adapter": lambda w: w.adapter,
    "adapter_name": lambda w: "second",
    "adapter_names": lambda w: ["second"],
    "adapters": lambda w: ["default", "second"],
    "answer_choices": lambda w: LABELS,
    "arguments": lambda w: w.trainer.args,
    "base": lambda w: w.base_model,
    "choices": lambda w: {"billing": "billing", "delivery": "delivery"},
    "chat": lambda w: False,
    "classifiers": lambda w: {},
    "config": lambda w: ia3.tfew.TFewConfig(steps=1, batch_size=1),
    "config_dict": lambda w: {"peft_type": "IA3"},
    "device": lambda w: "cpu",
    "dtype": lambda w: torch.bfloat16,
    "encoder": lambda w: w.encoder,
    "example": lambda w: w.rows[0],
    "examples": lambda w: w.examples,
    "failures": lambda w: {},
    "folder": lambda w: w.out,
    "ia3_model": lambda w: w.on_base_model,
    "k": lambda w: 1,
    "labels": lambda w: LABELS,
    "logits": lambda w: LOGITS,
    "model": lambda w: w.base,
    "model_id": lambda w: w.saved,
    "name": lambda w: "row",
    "names": lambda w: ["row"],
    "output_dir": lambda w: w.out,
    "path": lambda w: w.yaml,
    "path_json_file": lambda w: w.saved / "adapter_config.json",
    "peft_config": lambda w: ia3.IA3Config(),
    "peft_model_state_dict": lambda w: ia3.get_peft_model_state_dict(w.adapted),
    "pretrained_model_name_or_path": lambda w: w.saved,
    "probabilities": lambda w: torch.eye(2, dtype=torch.float64).numpy(),
    "repo_id": lambda w: "someone/adapter",
    "rows": lambda w: w.rows,
    "save_directory": lambda w: w.out,
    "scores": lambda w: [0.5, 1.0],
    "seed": lambda w: 0,
    "source": lambda w: w.table,
    "state_dict": lambda w: ia3.get_base_model_state_dict(w.base),
    "target_ids": lambda w: torch.ones(2, 2, 3, dtype=torch.int64),
    "task": lambda w: w.task,
    "tasks": lambda w: {"tickets": (TEXTS, LABELS)},
    "template": lambda w: w.prompt_template.prompt,
    "templates": lambda w: [w.prompt_template],
    "texts": lambda w: TEXTS,
    "train": lambda w: w.rows,
    "values": lambda w: {"peft_type": "IA3"},
    "weights": lambda w: [1.0, 1.0],
}
# Where a parameter of the name wants something else.
OTHERS: dict[tuple[str, str], Callable[[World], Any]] = {
    ("ia3.combine", "adapters"): lambda w: [("one", w.adapter), ("two", w.adapter)],
    ("ia3.fit_many", "classifier"): lambda w: w.classifier,
    ("ia3.classify", "bank"): lambda w: w.classifiers,
    ("ia3.suggest", "classifier"): lambda w: w.classifier,
    ("ia3.classify", "names"): lambda w: ["row", "row"],
    ("ia3.FewShotClassifier", "template"): lambda w: "{{ text }} Category :",
    ("IA3Model.add_adapter", "adapter_name"): lambda w: "third",
    ("IA3Model.add_weighted_adapter", "adapter_name"): lambda w: "third",
    ("IA3Model.from_adapter", "adapter_name"): lambda w: "third",
    ("IA3Model.load_adapter", "adapter_name"): lambda w: "third",
    ("IA3Model.route", "names"): lambda w: ["default", "second"],
    ("AdapterBank.add", "name"): lambda w: "new",
    ("AdapterBank.add", "source"): lambda w: w.adapter,
    ("AdapterBank.gather", "index"): lambda w: [0],
    ("FewShotClassifier.load", "folder"): lambda w: w.saved_classifier,
    ("FewShotClassifier.load", "model"): lambda w: w.classifier.model,
    ("FewShotClassifier.load", "tokenizer"): lambda w: w.tokenizer,
    ("ia3.load_base_model", "tokenizer"): lambda w: w.tokenizer,
    ("ia3.tfew.load_templates", "task"): lambda w: "copa",
    ("ia3.tfew.tfew_loss", "labels"): lambda w: torch.tensor([0, 1]),
    ("ia3.tfew.tfew_loss", "pad_token_id"): lambda w: 0,
    ("ia3.tfew.predict_choices", "examples"): lambda w: [e.encoded[0] for e in w.examples],
    ("ia3.tfew.training_arguments", "folder"): lambda w: w.out,
    ("ia3.set_base_model_state_dict", "model"): lambda w: w.adapted,
    ("ia3.get_peft_model_state_dict", "adapter_name"): lambda w: "default",
    ("ia3.set_peft_model_state_dict", "adapter_name"): lambda w: "default",
    ("IA3Config.from_json", "path"): lambda w: w.saved / "adapter_config.json",
    ("ia3.get_peft_model", "adapter_name"): lambda w: "default",
    ("ia3.IA3Model", "adapter_name"): lambda w: "default",
}
for _name in ("get_layer_status", "get_model_status", "get_peft_model_state_dict"):
    OTHERS[f"ia3.{_name}", "model"] = lambda w: w.adapted
    OTHERS["ia3.set_peft_model_state_dict", "model"] = lambda w: w.adapted
SELVES: dict[str, Callable[[World], Any]] = {
    "IA3Model": lambda w: w.adapted,
    "AdapterBank": lambda w: w.bank,
    "FewShotClassifier": lambda w: w.classifier,
    "TextClassifier": lambda w: w.classifier,
    "InContextClassifier": lambda w: w.in_context,
    "IA3Config": lambda w: ia3.IA3Config(),
    "Encoder": lambda w: w.encoder,
    "PromptTemplate": lambda w: w.prompt_template,
    "Task": lambda w: w.task,
    "TFewConfig": lambda w: ia3.tfew.TFewConfig(),
    "TFewTrainer": lambda w: w.trainer,
    "Evaluation": lambda w: ia3.tfew.evaluate(w.base_model, w.task),
}


# What the base model's own method is called with besides.
FURTHER: dict[str, Callable[[World], dict[str, Any]]] = {
    "IA3Model.forward": lambda w: {"input_ids": torch.tensor([[3, 4, 5]])},
    "IA3Model.generate": lambda w: {"inputs": torch.tensor([[3, 4, 5]]), "max_new_tokens": 1},
}
# Calls that are not made: they load a large model, or begin a thread that generates.
LEFT_OUT = {
    ("ia3.fit_many", "classifier", "None"),
    *(
        (f"IA3Model.{name}", "adapter_names", "None")
        for name in (
            "generate_batch",
            "init_continuous_batching",
            "continuous_batching_context_manager",
        )
    ),
}


def arguments(it: Public, world: World) -> dict[str, Any]:
    """Good values for the parameters that have no default, and for those named in `OTHERS`."""
    given = {}
    for name, parameter in it.parameters.items():
        other = OTHERS.get((it.name, name))
        if name == "self":
            given[name] = SELVES[it.name.partition(".")[0]](world)
        elif other is not None:
            given[name] = other(world)
        elif parameter.default is inspect.Parameter.empty:
            given[name] = GOOD.get(name, lambda w: 1)(world)
    return given | FURTHER.get(it.name, lambda w: {})(world)


def called(it: Public, given: dict[str, Any]) -> Any:
    """Call it; of a context manager, enter and leave it."""
    result = it.call(*[given[n] for n in ("self",) if n in given], **_without_self(given))
    if isinstance(result, contextlib.AbstractContextManager) and not hasattr(result, "read"):
        with result:
            pass
    return result


def _without_self(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "self"}


# -- states ----------------------------------------------------------------------------------------


def _merged(model: ia3.IA3Model) -> None:
    model.merge_adapter()


def _unloaded(model: ia3.IA3Model) -> None:
    model.unload()


def _disabled(model: ia3.IA3Model) -> None:
    model.disable_adapter_layers()


def _emptied(model: ia3.IA3Model) -> None:
    model.delete_adapter("second")
    model.delete_adapter("default")


def _fused(model: ia3.IA3Model) -> None:
    model.fuse_mlp()


# Whose methods are called, with good values, in which states.
STATES: dict[str, list[Callable[[Any], None]]] = {
    "IA3Model": [_merged, _unloaded, _disabled, _emptied, _fused],
    "AdapterBank": [lambda bank: bank.close(), lambda bank: _unloaded(bank.model)],
}
