"""Entries of a config: which modules they name, and the fewest that name given modules."""

import re
import threading
import time

import pytest
import regex
from hypothesis import example, given, settings, strategies as st
from peft import IA3Config as PeftConfig
from peft.tuners.ia3.model import IA3Model as PeftModel
from torch import nn

from ia3 import IA3Error
from ia3.targets.matching import (
    Listed,
    Matching,
    compiled,
    feedforward_among,
    names_or_suffixes,
    rule,
    saved_with,
    without_a_match,
)

# Two repetitions within each other, and a name that is tried in every way.
SLOW, TRIED = r"(a|aa|a?a)+[^b]", "a" * 60 + "bb"


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
        return set(filter(rule("target_modules", entries), everything))

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
    assert not any(map(rule("feedforward_modules", found), apart))


def test_entry_of_a_name_that_is_not_there():
    with pytest.raises(IA3Error, match=r"'q_proj' of Module .*regular expression"):
        names_or_suffixes(tree(["layers.0.k_proj"]), ["q_proj"])


def test_feedforward_entry_is_no_end_of_another_targets_name():
    """PEFT's rule for feed-forward modules has no dot: `o` would be the end of `wo` too."""
    model = tree(["layer.o", "layer.wo"])
    assert names_or_suffixes(model, ["layer.o"]) == ["o"]
    assert names_or_suffixes(model, ["layer.o"], apart_from=["layer.wo"]) == ["layer.o"]


# -- PEFT's rules ----------------------------------------------------------------------------------

NAMES = st.lists(st.text("ab.", min_size=1, max_size=7), min_size=1, max_size=8, unique=True)


@given(names=NAMES, entries=NAMES)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_lists_name_what_they_name_in_peft(names, entries):
    config = PeftConfig(target_modules=entries, feedforward_modules=entries)
    peft = {
        "target_modules": PeftModel._check_target_module_exists,
        "feedforward_modules": PeftModel._check_target_module_feedforward,
    }
    for field, in_peft in peft.items():
        named = [name for name in names if in_peft(config, name)]
        assert list(filter(rule(field, entries), names)) == named
        one = {entry: PeftConfig(**{field: [entry] for field in peft}) for entry in entries}
        without = sorted(e for e, alone in one.items() if not any(in_peft(alone, n) for n in names))
        assert without_a_match(field, entries, names) == without
        for name in named:
            shortest = min((e for e, alone in one.items() if in_peft(alone, name)), key=len)
            assert Listed(field, entries).naming(name) == shortest


@given(targets=NAMES, feedforward=NAMES)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_feedforward_entries_among_the_targets(targets, feedforward):
    pairs = [(target, module) for target in targets for module in feedforward]
    longer = {target for target, module in pairs if target.endswith(module)}
    inside = {module for target, module in pairs if module.endswith(f".{target}")}
    expected = sorted({*targets, *inside}), sorted(longer | inside)
    assert feedforward_among(targets, feedforward) == expected


@given(names=NAMES, entries=NAMES)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_what_is_saved_whole_is_inside_an_entry(names, entries):
    for name in names:
        inside = [entry for entry in entries if f".{entry}." in f".{name}."]
        found = saved_with(entries)(name)
        assert found in inside if inside else found is None


PIECES = (
    *(
        "a",
        "b",
        "ab",
        ".",
        r"\.",
        "_",
        "|",
        "*",
        "+",
        "?",
        "{2}",
        "{1,2}",
        "{,2}",
        "*?",
        "+?",
        "??",
    ),
    *("(", ")", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?P<n>", "(?P=n)", "(?(1)", r"\1"),
    *("[", "]", "[^", "-", "[ab]", "[^a]", "[a-b]", "[[", "[]", "&&", "||", "--", "(?i)", "(?i:"),
    *(r"\w", r"\d", r"\b", r"\B", r"\A", r"\Z", "^", "$", "(?x)", " ", "#", "(?#", "*+", "A", "1"),
    *(r"\p{L}", r"\R", r"\X", "(?R)", "(?1)", "{e}", "{e<=1}", "[[:alpha:]]", "(?|", r"\L<a>"),
)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
@settings(deadline=None, max_examples=800, derandomize=True)
@example(r"(?i).*\.K_PROJ")
@example(r"(?P<kind>k|v)_(?P=kind)")
@example(r"model\.layers\.(?:1\d|[2-9])\.self_attn\.[kv]_proj")
def test_expressions_match_as_with_pythons_re_or_are_refused(text):
    names = ["a", "b", "ab", "aab", "a.b", "ba", "A", "a_b", "1", "k_k", "x.k_proj", "ab\n"]
    names += ["model.layers.11.self_attn.v_proj"]
    try:
        expected = re.compile(text)
    except Exception:
        with pytest.raises(IA3Error, match="is not a regular expression"):
            rule("target_modules", text)
        return
    try:
        found = rule("target_modules", text)
    except IA3Error as error:
        if "for modules' names" in str(error):
            return
        raise
    assert [n for n in names if found(n)] == [n for n in names if expected.fullmatch(n)]


# -- bounds ----------------------------------------------------------------------------------------


def test_all_expressions_and_names_of_a_model_share_a_second():
    slow = [TRIED + "b" * i for i in range(20)]
    matching = Matching()
    before = time.process_time()
    with pytest.raises(IA3Error) as caught:
        list(filter(matching.rule("exclude_modules", SLOW), slow))
    for word in ("exclude_modules", repr(SLOW), "1 second", "list the modules"):
        assert word in str(caught.value)
    with pytest.raises(IA3Error, match="feedforward_modules"):
        matching.rule("feedforward_modules", ".*")("a")
    assert time.process_time() - before < 5
    assert rule("target_modules", ".*")("a")


def test_other_threads_run_while_an_expression_does():
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.01):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    with pytest.raises(IA3Error, match="takes longer"):
        rule("target_modules", SLOW)(TRIED)
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(start < at < end for at in ticks) >= 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(?:a{300}){300}", "its repetitions are too many"),
        ("a{2000}" * 14_000, "its repetitions are too many"),
        ("a{9000000}", "'{' can be none of their parts"),
        ("a{5000}" * 100, "its repetitions are too many"),
        ("a" * 100_001, "100,001 characters, expected 100,000 at most"),
        ("(?:" * 20_000 + "a" + ")" * 20_000, "nested too deeply"),
        ("(a)(?(" + "9" * 5000 + ")a|b)", "is not a regular expression"),
        ("(?L)a", "cannot use .L"),
        ("a{2", "'{' can be none of their parts"),
        ("(?:abc){e<=3}", "'{' can be none of their parts"),
        ("[[:alpha:]]+", r"'\[:' can be none of their parts"),
        ("(a(?R)?b)", "unknown extension"),
        ("[" * 300, "\\[{50,200}[.]{3}"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_expressions_that_are_refused_before_they_are_run(text, message):
    with pytest.raises(IA3Error, match=message) as caught:
        compiled("exclude_modules", text)
    assert str(caught.value).startswith("exclude_modules")
    assert len(str(caught.value)) < 500


def test_escaped_braces_are_no_repetition():
    assert rule("target_modules", r"a\{9999999}")("a{9999999}")
    assert rule("target_modules", re.escape("a{b}[:c]"))("a{b}[:c]")


def test_an_expression_of_many_names_is_fast():
    """As the exclude_modules that are written of many modules."""
    names = [f"model.layers.{i}.mlp.experts.{j}.up" for i in range(50) for j in range(40)]
    text = "|".join(map(re.escape, names))
    assert all(map(rule("exclude_modules", text), names))
    regex.purge()


def test_ten_thousand_names_and_entries_take_no_product_of_both():
    """A hundred million comparisons took half a minute."""
    parts = [f"model.layers.{i}.mlp.part{j}" for i in range(100) for j in range(100)]
    model, entries = tree(parts), sorted(parts)[::-1]
    start = time.process_time()
    for field in ("target_modules", "feedforward_modules"):
        assert all(map(rule(field, entries), parts))
        assert not any(map(rule(field, entries), (f"{name}x" for name in parts)))
        assert not without_a_match(field, entries, parts)
    assert feedforward_among(parts, entries) == (sorted(parts), sorted(parts))
    assert not any(map(saved_with([f"{name}.x" for name in parts]), parts))
    outputs = [name for name in parts if name[-1] == "1"]
    found = names_or_suffixes(model, outputs, apart_from=[n for n in parts if n[-1] != "1"])
    assert set(filter(rule("target_modules", found), parts)) == set(outputs)
    assert time.process_time() - start < 10
