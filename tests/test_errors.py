"""Errors that name where they are stay of their kind."""

import pytest

from ia3.errors import IA3Error, NoMatchingPeftModuleError, naming
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
