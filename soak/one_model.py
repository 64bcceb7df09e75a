"""What threads do with one model of `served.py`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import served
import torch
from served import BASE, PROMPTS, Served, Watch

from ia3 import AdapterBank, IA3Model
from ia3.adapter.files import read_adapter

RESIDENT = {"resident": 1, "other": 1, "another-narrow": 1}
COMING = {"coming": 2, "coming-narrow": 2}
BANKED = {"kept": 2, "kept-narrow": 1, "third": 1, "fourth": 2}


class OneModel:
    """What threads do with one model: each method does one thing, chosen by chance."""

    def __init__(self, kind: str, watch: Watch, folder: Path) -> None:
        self.watch, self.folder = watch, folder
        self.served = Served(kind, watch.seed, {**RESIDENT, **COMING, **BANKED})
        self.model = IA3Model.without_adapters(self.served.base)
        for name in RESIDENT:
            adapter = self.served.adapters[name, 0]
            self.model.add_adapter(name, adapter.config, vectors=adapter.vectors)
        self.model.set_adapter("resident")
        for name in (*COMING, *BANKED):
            self.replace(name, 0)
        self.bank = AdapterBank(self.model, capacity=3)

    def replace(self, name: str, version: int) -> None:
        served.write_folder(self.served.adapters[name, version], self.folder / name)

    # -- what is computed -------------------------------------------------------------------------

    def route(self, chance: random.Random) -> tuple[str, Any]:
        rows = chance.randint(1, 4)
        names = chance.choices([*RESIDENT, *RESIDENT, BASE, *COMING, *BANKED], k=rows)
        prompts = chance.choices(range(len(PROMPTS)), k=rows)
        what = chance.choice(["forward", "forward", "generate", "entered"])
        return f"route: {what}", lambda: self.routed(what, names, prompts)

    @torch.no_grad()
    def routed(self, what: str, names: list[str], prompts: list[int]) -> None:
        if what == "generate":
            texts = self.served.generated(self.model, prompts, adapter_names=names)
            for name, prompt, text in zip(names, prompts, texts, strict=True):
                if not self.served.is_text(text, prompt, self.served.of(name)):
                    self.watch.fail(f"a generated row of {name!r} in {names} is another's")
        elif what == "entered":
            with self.model.route(names):
                for _ in range(2):
                    self.check(names, prompts, self.model(**self.served.inputs(prompts)).logits)
        else:
            found = self.model(**self.served.inputs(prompts), adapter_names=names)
            self.check(names, prompts, found.logits)
        self.watch.count("rows", len(names))

    def check(self, names: Sequence[str], prompts: Sequence[int], found: torch.Tensor) -> None:
        for name, prompt, row in zip(names, prompts, found, strict=True):
            if not self.served.is_row(row, prompt, self.served.of(name)):
                told = self.served.tell(row, prompt)
                self.watch.fail(f"a row of {name!r} in {list(names)} is another's: {told}")

    def call(self, chance: random.Random) -> tuple[str, Any]:
        prompts = chance.choices(range(len(PROMPTS)), k=chance.randint(1, 3))
        what = chance.choices(["forward", "generate", "disabled"], [10, 5, 1])[0]
        return f"active: {what}", lambda: self.active(what, prompts)

    @torch.no_grad()
    def active(self, what: str, prompts: list[int]) -> None:
        keys, test = list(self.served.logits), self.served.is_row
        if what == "generate":
            rows, test = self.served.generated(self.model, prompts), self.served.is_text
        elif what == "disabled":
            with self.model.disable_adapter():
                rows = self.model(**self.served.inputs(prompts)).logits
            keys = [(BASE, 0)]
        else:
            rows = self.model(**self.served.inputs(prompts)).logits
        self.watch.count("rows", len(prompts))
        pairs = list(zip(rows, prompts, strict=True))
        # One state for all of them.
        if not any(all(test(row, prompt, [key]) for row, prompt in pairs) for key in keys):
            told = "" if what == "generate" else self.served.tell(rows[0], prompts[0])
            self.watch.fail(f"{what} of the active adapter is of no adapter: {told}")

    # -- what changes -----------------------------------------------------------------------------

    def switch(self, chance: random.Random) -> tuple[str, Any]:
        name = chance.choice([*RESIDENT, *COMING])
        return "set_adapter", lambda: self.model.set_adapter(name)

    def come_and_go(self, chance: random.Random) -> tuple[str, Any]:
        name = chance.choice([*COMING])
        if chance.random() < 0.6:
            return "load_adapter", lambda: self.model.load_adapter(self.folder / name, name)
        return "delete_adapter", lambda: self.model.delete_adapter(name)

    def write(self, chance: random.Random) -> tuple[str, Any]:
        name = chance.choice([name for name, count in {**COMING, **BANKED}.items() if count > 1])
        version = chance.randrange(2)
        return "replace a file", lambda: self.replace(name, version)

    def save(self, chance: random.Random) -> tuple[str, Any]:
        name = chance.choice([*RESIDENT, *COMING])
        return "save_pretrained", lambda: self._saved(name)

    def _saved(self, name: str) -> None:
        folder = self.folder / f"saved {name}"
        self.model.save_pretrained(folder, adapter_name=name)
        found = read_adapter(folder).vectors
        for key in self.served.of(name):
            wanted = self.served.adapters[key].vectors
            same = found.keys() == wanted.keys()
            if same and all(torch.equal(found[module], wanted[module]) for module in wanted):
                return
        self.watch.fail(f"what was saved of {name!r} is of no version of it")

    def keep(self, chance: random.Random) -> tuple[str, Any]:
        name = chance.choice([*BANKED])
        what = chance.choice(["add", "add", "remove", "refresh", "refresh", "pin", "unpin", "list"])
        bank = self.bank
        actions: dict[str, Callable[[], object]] = {
            "add": lambda: bank.add(name, self.folder / name),
            "remove": lambda: bank.remove(name),
            "refresh": bank.refresh,
            "pin": lambda: bank.pin(name),
            "unpin": lambda: bank.unpin(name),
            "list": lambda: (bank.list(), bank.names()),
        }
        return f"bank.{what}", actions[what]

    def merge(self, chance: random.Random) -> tuple[str, Any]:
        name = chance.choice([*RESIDENT, *COMING])
        if chance.random() < 0.4:
            return "merge_adapter", lambda: self._merge(name)
        return "unmerge_adapter", self.model.unmerge_adapter

    def _merge(self, name: str) -> None:
        # It would be merged beside what is merged: rows of two.
        self.model.unmerge_adapter()
        self.model.merge_adapter(name)

    def fuse(self, chance: random.Random) -> tuple[str, Any]:
        if chance.random() < 0.5:
            return "fuse_mlp", self.model.fuse_mlp
        return "unfuse_mlp", self.model.unfuse_mlp

    # -- what is read -----------------------------------------------------------------------------

    def read(self, chance: random.Random) -> tuple[str, Any]:
        model, name = self.model, chance.choice([*RESIDENT, *COMING])
        actions: dict[str, Callable[[], object]] = {
            "state_dict": model.state_dict,
            "get_layer_status": model.get_layer_status,
            "get_model_status": model.get_model_status,
            "vectors": lambda: self._vectors(name),
            "active_peft_config": lambda: model.active_peft_config,
            "trainable": model.get_nb_trainable_parameters,
            "modules_to_save": lambda: (model.modules_to_save, model.targeted_module_names),
            "train": lambda: model.train(False),
            "deepcopy": lambda: self.copied(chance.randrange(len(PROMPTS))),
        }
        what = chance.choice([*actions])
        return what, actions[what]

    def _vectors(self, name: str) -> None:
        found = self.model.vectors(name)
        if any(v is None for v in found.values()) or not found:
            self.watch.fail(f"vectors({name!r}) holds {found}")

    @torch.no_grad()
    def copied(self, prompt: int) -> None:
        twin = copy.deepcopy(self.model)
        row = twin(**self.served.inputs([prompt])).logits[0]
        if not self.served.is_row(row, prompt, list(self.served.logits)):
            self.watch.fail(
                f"a copy computes what no adapter does: {self.served.tell(row, prompt)}"
            )
        twin.unload()

    def end(self) -> None:
        if self.watch.counts["hangs"]:
            return
        self.model.unload()
        if found := served.changed(self.served.base, self.served.before):
            self.watch.fail(f"the base model is not what it was: {found[:5]}")
