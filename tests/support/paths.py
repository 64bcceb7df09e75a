"""Where things lie: this repository, and the folder beside it with data of other people."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
REPOSITORY = TESTS.parent
SHARED = REPOSITORY.parent / "shared"
