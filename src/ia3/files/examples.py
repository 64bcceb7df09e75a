"""The example data: beside the source, or in the installed package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..errors import MissingFileError

EXAMPLE = "support-tickets"


def example_folder() -> Path:
    """Where the support tickets are, in `train.csv` and `test.csv`.

    Raises:
        MissingFileError: they are not there.
    """
    package = Path(str(files("ia3")))
    for examples in (package / "examples", package.parent.parent / "examples"):
        if (examples / EXAMPLE / "train.csv").is_file():
            return examples / EXAMPLE
    raise MissingFileError(f"the example data {EXAMPLE!r} is neither in the package nor beside it")
