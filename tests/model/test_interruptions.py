"""Ctrl-C at any line: the model is as before or as after, and the next call makes it so."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.two_adapters import NARROW, WIDE, output, wide_and_narrow

import ia3
from ia3 import IA3Model

SOURCE = str(Path(ia3.__file__).parent)


class _Interruption:
    """Raises `KeyboardInterrupt` at the n-th line of the package that runs."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def _interrupted(line: int, action: Callable[[], object]) -> bool:
    before = sys.gettrace()
    sys.settrace(_Interruption(line))
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def at_each_line(
    make: Callable[[], IA3Model],
    action: Callable[[IA3Model], object],
    check: Callable[[IA3Model], None],
) -> None:
    """Interrupt an action at one line after the other, and look at the model each time."""
    # Once to its end: what is imported or compiled then is not again.
    action(make())
    line = 0
    while True:
        # Every third: a change that is left half done takes several lines.
        line += 3
        model = make()
        if not _interrupted(line, lambda: action(model)):  # noqa: B023
            break
        check(model)
    assert line > 100


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("names", [("wide", "narrow"), ("narrow", "wide")])
def test_switching(names: tuple[str, str], plain: bool) -> None:
    def make() -> IA3Model:
        model = wide_and_narrow()
        model.use_plain_product(plain)
        model.set_adapter(names[0])
        return model

    expected = {}
    for name in names:
        model = make()
        model.set_adapter(name)
        expected[name] = output(model)
    bare = output(make().unload())

    def check(model: IA3Model) -> None:
        for name in names:
            model.set_adapter(name)
            assert torch.equal(output(model), expected[name])
        assert torch.equal(output(model.unload()), bare)

    at_each_line(make, lambda model: model.set_adapter(names[1]), check)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adding(saved: list[str] | None) -> None:
    config = ia3.IA3Config(
        target_modules=["v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        modules_to_save=saved,
    )
    model = wide_and_narrow()
    expected, names = output(model), [name for name, _ in model.named_parameters()]

    def check(model: IA3Model) -> None:
        assert torch.equal(output(model), expected)
        if "third" in model.peft_config:
            model.delete_adapter("third")
        assert [name for name, _ in model.named_parameters()] == names
        model.add_adapter("third", config)
        model.set_adapter("third")
        model.delete_adapter("third")
        model.set_adapter("wide")
        assert torch.equal(output(model), expected)

    at_each_line(wide_and_narrow, lambda model: model.add_adapter("third", config), check)


@pytest.mark.parametrize("name", ["wide", "narrow"])
@pytest.mark.filterwarnings("ignore:adapter 'wide' was active")
def test_deleting(name: str) -> None:
    other = {"wide": "narrow", "narrow": "wide"}[name]
    model = wide_and_narrow()
    model.set_adapter(other)
    expected = output(model)

    def check(model: IA3Model) -> None:
        output(model)
        model.state_dict()
        if name in model.peft_config:
            model.delete_adapter(name)
        model.set_adapter(other)
        assert torch.equal(output(model), expected)
        assert not [n for n, _ in model.named_parameters() if n.endswith(f".{name}")]
        model.add_adapter(name, {"wide": WIDE, "narrow": NARROW}[name])

    at_each_line(wide_and_narrow, lambda model: model.delete_adapter(name), check)


def test_routed_calls() -> None:
    ids = torch.arange(10).reshape(2, 5)

    def call(model: IA3Model) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(ids, adapter_names=["wide", "narrow"]).logits
        return logits

    expected = call(wide_and_narrow())

    def check(model: IA3Model) -> None:
        # What was interrupted is in a cycle with its traceback.
        gc.collect(1)
        torch.testing.assert_close(call(model), expected)
        # Refused while a route is on.
        model.merge_adapter()
        model.unmerge_adapter()

    at_each_line(wide_and_narrow, call, check)
