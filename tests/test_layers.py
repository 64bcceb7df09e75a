"""The plan of the source: folders import only folders below them, and no files in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from support.paths import REPOSITORY

SOURCE = REPOSITORY / "src" / "ia3"

# From the ground up.
LAYERS = [
    "errors",
    "arguments",
    "files",
    "base",
    "core",
    "targets",
    "adapter",
    "vllm",
    "model",
    "compat",
    "bank",
    "tfew/temporary_adapter",
    "tfew/prompts",
    "tfew/scoring",
    "tfew/training",
    "tfew",
    "sentences",
    "classify",
    "experiments",
    "report",
    "serve",
    "cli",
]


def imports() -> dict[str, set[str]]:
    """Each file of the source -> the files it imports, anywhere in it."""
    files = {".".join(p.relative_to(SOURCE).with_suffix("").parts) for p in SOURCE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for file in sorted(files - {"__init__", "__main__"}):
        package = file.split(".")[:-1]
        tree = ast.parse((SOURCE / f"{file.replace('.', '/')}.py").read_text("utf-8"))
        found[file] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = package[: len(package) - node.level + 1]
                module = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    inner = f"{module}.{alias.name}".removeprefix(".")
                    names = [n for n in (inner, f"{inner}.__init__") if n in files]
                    names += [n for n in (module, f"{module}.__init__") if n in files]
                    found[file] |= set(names[:1]) - {file}
    return found


def layer(file: str) -> int:
    path = file.replace(".", "/")
    return next(n for n in range(len(LAYERS)) if f"{path}/".startswith(f"{LAYERS[n]}/"))


def test_a_folder_imports_only_folders_below_it() -> None:
    up = {
        (file, other)
        for file, others in imports().items()
        for other in others
        if layer(other) > layer(file)
    }
    assert up == set()


def test_no_files_import_in_a_circle() -> None:
    TopologicalSorter(imports()).prepare()


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by it, and fails where it meets both; not every command does."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()
