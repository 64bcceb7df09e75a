"""`ia3 doctor`: what this machine has to train and predict with, and what it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from .. import __version__
from ..base.embedded import EMBEDDED_ENCODER, EMBEDDED_MODEL, INSTALL, embedded_place, home
from ..files.atomic import check_folder
from ..report.console import print_rows, results, visible
from . import options
from .options import print_json, reason

# What `ia3 fit` needs, and what some commands need besides.
NEEDED = ("", "tfew")
OPTIONAL = ("report", "datasets", "smollm2", "peft")
# Of the environment: what decides how many threads there are, and where models come from.
TELLING = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("IA3_HOME", "HF_HOME", "HF_HUB_OFFLINE"),
)
IN_WORDS = {
    "memory_gib": "memory, GiB",
    "threads": "torch's threads",
    "free_gib": "free there, GiB",
    "hub_cache": "the hub's cache",
}


def doctor(as_json: options.Json = False) -> None:
    """Show versions, threads, device, cache and the models at hand; exit code 1 if one is amiss.

    What would stop 'ia3 fit', or leave out one of its models, is said with what mends it.
    """
    problems: list[str] = []
    versions = {"ia3": __version__, "python": platform.python_version(), **_versions(problems)}
    machine = _machine(problems)
    cache = _cache(problems)
    models = [*_embedded(problems), *_of_the_hub()]
    environment = {name: os.environ[name] for name in TELLING if name in os.environ}
    if as_json:
        print_json(
            **{"versions": versions, **machine, "environment": environment},
            cache=cache,
            models=models,
            problems=problems,
        )
    else:
        print_rows("", ("package", "version"), [list(pair) for pair in versions.items()])
        facts = {IN_WORDS.get(k, k): v for k, v in {**machine, **cache}.items()} | environment
        rows = [[name, str(value)] for name, value in facts.items()]
        print_rows("", ("this machine", "is"), rows, names=2)
        rows = [[each["name"], each["kind"], each["place"]] for each in models]
        print_rows("models at hand", ("name", "kind", "place"), rows, names=3)
        for problem in problems or ["nothing is amiss"]:
            results.print(visible(problem), markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def _versions(problems: list[str]) -> dict[str, str]:
    """The packages that are installed, of those that this one names, and their versions."""
    found: dict[str, str] = {}
    for extra in (*NEEDED, *OPTIONAL):
        for requirement in _requirements(extra):
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                if extra in NEEDED:
                    what = f"{requirement.name} is not installed"
                    problems.append(
                        f"{what}: pip install '{requirement.name}{requirement.specifier}'"
                    )
                continue
            found[requirement.name] = version
            if not requirement.specifier.contains(version, prereleases=True):
                what = f"{requirement.name} is {version}, expected {requirement.specifier}"
                problems.append(f"{what}: pip install '{requirement.name}{requirement.specifier}'")
    return found


def _requirements(extra: str) -> Iterator[Any]:
    """What this package, installed with an extra, says that it needs for it."""
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires("ia3") or []
    except (ImportError, metadata.PackageNotFoundError):  # run from its source
        return
    for requirement in map(Requirement, lines):
        # That of another extra, and the package itself with one, are named there.
        marker = requirement.marker
        of_extra = marker is not None and marker.evaluate({"extra": extra})
        if requirement.name != "ia3" and (of_extra if extra else marker is None):
            yield requirement


def _machine(problems: list[str]) -> dict[str, Any]:
    """Its processors, its memory, and what torch makes of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": _memory(),
    }
    try:
        import torch

        from ..base.loading import device_named

        found["threads"] = torch.get_num_threads()
        device = device_named("auto")
        found["device"] = str(device)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    except Exception as error:  # a library that is broken, or of another machine, raises anything
        problems.append(f"torch cannot compute here: {reason(error)}; install it again")
    return found


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _cache(problems: list[str]) -> dict[str, Any]:
    """Where models are kept, and how much room there is."""
    folder = home()
    try:
        check_folder(folder)
    except OSError as error:
        what = f"the cache {folder} cannot be written ({reason(error)})"
        problems.append(f"{what}: set IA3_HOME to a folder that can")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return {
        "cache": str(folder),
        "free_gib": round(shutil.disk_usage(there).free / 2**30, 1),
        "hub_cache": _hub_cache(),
    }


def _hub_cache() -> str | None:
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


def _embedded(problems: list[str]) -> Iterator[dict[str, str]]:
    """The models of the defaults, which come in packages."""
    kinds = {EMBEDDED_ENCODER: "sentence encoder", EMBEDDED_MODEL: "language model"}
    for name, kind in kinds.items():
        place = embedded_place(name)
        if place is None:
            problems.append(f"{name} is not installed: {INSTALL[name]}")
        else:
            yield {"name": name, "kind": kind, "place": str(place)}


def _of_the_hub() -> Iterator[dict[str, str]]:
    """The models in the hub's cache, which load without a network."""
    cache = _hub_cache()
    if cache is None or not Path(cache).is_dir():
        return
    from huggingface_hub import scan_cache_dir

    for repository in sorted(scan_cache_dir(cache).repos, key=lambda each: each.repo_id):
        if repository.repo_type == "model" and repository.revisions:
            files = {file.file_name for of in repository.revisions for file in of.files}
            kind = "sentence encoder" if "modules.json" in files else "other"
            yield {"name": repository.repo_id, "kind": kind, "place": str(repository.repo_path)}
