"""The demo, and the embedded model it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files.atomic import check_folder
from ..report.console import screen
from .options import DEFAULT_MODEL, Json, print_json, say, silence_loading


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the report.")] = Path(
        "ia3-demo"
    ),
    model: Annotated[str, typer.Option(help="Model name, folder or hub id.")] = DEFAULT_MODEL,
    as_json: Json = False,
) -> None:
    """Learn to route support tickets from 32 examples, and check what is promised."""
    check_folder(out)
    silence_loading()
    from .run_demo import PROMISES, run_demo

    result = run_demo(out, model, screen)
    if as_json:
        print_json(**result)
    if not all(result[promise] for promise in PROMISES):
        raise typer.Exit(1)


def prepare() -> None:
    """Convert the embedded model into the cache (IA3_HOME), once."""
    from ..base.loading import embedded_model_folder

    say(f"the embedded model is in {embedded_model_folder()}")
