"""Errors that name where they are stay of their kind; what they quote is bounded."""

import time

import pytest

from ia3.errors import IA3Error, NoMatchingPeftModuleError, did_you_mean, naming, shown
from ia3.tfew import DivergedError


@pytest.mark.parametrize(
    "error", [IA3Error("bad"), NoMatchingPeftModuleError("bad"), DivergedError(3, "bad")]
)
def test_an_error_that_names_where_it_is_stays_of_its_kind(error):
    said = str(error)
    with pytest.raises(IA3Error) as raised, naming("outer"), naming("inner"):
        raise error
    assert type(raised.value) is type(error)
    assert str(raised.value) == f"outer: inner: {said}"
    assert vars(raised.value) == vars(error)


def test_a_suggestion_takes_no_product_of_long_and_many_names():
    start = time.process_time()
    many = [f"{'ab' * 45}{number}" for number in range(100_000)]
    assert did_you_mean("b" * 90, iter(many)) == ""
    assert did_you_mean("a" * 100_000, ["a" * 100_000] * 1000) == ""
    assert did_you_mean("k_porj", ["a" * 100_000, "v_proj", "k_proj"]) == "; did you mean 'k_proj'?"
    assert time.process_time() - start < 20


def test_values_are_cut():
    assert shown("a") == "'a'"
    assert shown([1] * 1000) == "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ...]"
