"""Which versions of packages the tests run with: `make test-oldest` has older ones."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

from .paths import REPOSITORY


def pinned(package: str) -> bool:
    """Whether a package has the version in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    return f"{package}=={version(package)}" in lines


def since(package: str, first: str, reason: str) -> pytest.MarkDecorator:
    """A mark for what needs at least this version of another library: `reason` says of what."""
    older = Version(version(package)) < Version(first)
    return pytest.mark.skipif(older, reason=f"{package} before {first}: {reason}")
