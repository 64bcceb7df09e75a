"""Entries of a config: which modules they name, and the fewest that name given modules."""

import pytest
from hypothesis import given, settings, strategies as st
from torch import nn

from ia3 import IA3Error
from ia3.targets.matching import matches, matches_feedforward, names_or_suffixes


def tree(paths):
    """A module with submodules by these names."""
    root = nn.Module()
    for path in paths:
        parent = root
        for part in path.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
    return root


PARTS = st.sampled_from(["a", "b", "ab", "0"])
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8)


@given(paths=PATHS, data=st.data())
@settings(deadline=None, max_examples=150)
def test_entries_select_exactly_the_names_and_none_can_be_spared(paths, data):
    model = tree(paths)
    everything = [name for name, _ in model.named_modules() if name]
    wanted = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    others = set(everything) - set(wanted)

    def selected(entries):
        return {name for name in everything if matches(name, entries)}

    try:
        found = names_or_suffixes(model, wanted)
    except IA3Error as error:
        (name,) = [name for name in wanted if repr(name) in str(error)]
        assert any(other.endswith(f".{name}") for other in others)
        return
    assert selected(found) == set(wanted)
    for spared in found:
        assert selected([entry for entry in found if entry != spared]) != set(wanted)
    apart = data.draw(st.lists(st.sampled_from(sorted(others)), unique=True)) if others else []
    try:
        found = names_or_suffixes(model, wanted, apart_from=apart)
    except IA3Error:
        return
    assert selected(found) == set(wanted)
    assert not any(matches_feedforward(name, found) for name in apart)


def test_entry_of_a_name_that_is_not_there():
    with pytest.raises(IA3Error, match=r"'q_proj' of Module .*regular expression"):
        names_or_suffixes(tree(["layers.0.k_proj"]), ["q_proj"])


def test_feedforward_entry_is_no_end_of_another_targets_name():
    """PEFT's rule for feed-forward modules has no dot: `o` would be the end of `wo` too."""
    model = tree(["layer.o", "layer.wo"])
    assert names_or_suffixes(model, ["layer.o"]) == ["o"]
    assert names_or_suffixes(model, ["layer.o"], apart_from=["layer.wo"]) == ["layer.o"]
