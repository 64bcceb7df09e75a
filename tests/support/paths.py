"""Where things lie: this repository, and the folder beside it with data of other people."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
REPOSITORY = TESTS.parent
SHARED = REPOSITORY.parent / "shared"
DATA = SHARED / "data"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data sets are not at {DATA}")
