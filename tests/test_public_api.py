"""What is public raises what its docstring says, and nothing else, whatever it is given."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.public_api import (
    BAD,
    LEFT_OUT,
    STATES,
    Public,
    World,
    arguments,
    called,
    public,
)

import ia3
from ia3.errors import IA3Error

PUBLIC = list(public())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield World(tmp_path_factory.mktemp("public"))


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    # An empty text is the working folder, and a name of nothing a new one in it.
    monkeypatch.chdir(tmp_path)
    return made


def tried(it: Public, given: dict, what: str) -> list[str]:
    """Call it; a sentence where it raises what its docstring does not name."""
    try:
        called(it, given)
    except Exception as error:
        named = it.raised()
        kind = type(error)
        if isinstance(error, IA3Error):
            if kind.__name__ not in named:
                return [f"{what}: {kind.__name__} is not in the docstring: {error}"]
        elif not isinstance(error, OSError) or "OSError" not in named:
            return [f"{what}: {kind.__name__}: {error}"]
        return [""]
    return []


@pytest.mark.parametrize("it", PUBLIC, ids=lambda it: it.name)
def test_a_docstring_names_errors_of_this_package(it):
    for name, kind in it.raised().items():
        assert issubclass(kind, IA3Error) or name == "OSError", name


@pytest.mark.parametrize("it", PUBLIC, ids=lambda it: it.name)
def test_a_bad_argument_raises_what_the_docstring_names_and_changes_nothing(it, world):
    wrong = []
    for parameter in it.parameters:
        for label, value in BAD.items() if parameter != "self" else ():
            if (it.name, parameter, label) in LEFT_OUT:
                continue
            given = arguments(it, world)
            world.watch()
            found = tried(it, given | {parameter: value}, f"{parameter} is {label}")
            changed = world.changed()
            if found and changed:
                wrong.append(f"{parameter} is {label}: changed {changed}")
            wrong += filter(None, found)
            world.renew(changed)
    assert wrong == []


@pytest.mark.parametrize("kind", STATES)
def test_a_call_in_a_state_that_it_does_not_fit_raises_what_the_docstring_names(kind, world):
    wrong = []
    for it in PUBLIC:
        if it.name.startswith(f"{kind}.") and "self" in it.parameters:
            for number, enter in enumerate(STATES[kind]):
                if (it.name, "adapter_names", "None") in LEFT_OUT:
                    continue
                given = arguments(it, world)
                world.watch()
                enter(given["self"])
                wrong += filter(None, tried(it, given, f"{it.name} in state {number}"))
                world.renew(world.changed())
    assert wrong == []


def test_an_unfitted_classifier_raises_scikit_learns_error(world, tmp_path):
    from sklearn.exceptions import NotFittedError

    for classifier in (world.unfitted, world.in_context.__sklearn_clone__()):
        calls = [
            lambda c=classifier: c.predict(["a text"]),
            lambda c=classifier: c.predict_proba(["a text"]),
            lambda c=classifier: c.score(["a text"], ["billing"]),
            lambda c=classifier: c.classes_at(torch.eye(2).numpy()),
        ]
        for call in calls:
            with pytest.raises(NotFittedError) as raised:
                call()
            assert isinstance(raised.value, ia3.NotFittedError)
            assert isinstance(raised.value, ia3.StateError)
    with pytest.raises(NotFittedError):
        world.unfitted.save(tmp_path / "unfitted")
    assert not (tmp_path / "unfitted").exists()
