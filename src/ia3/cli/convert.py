"""`ia3 convert`: adapters of the T-Few authors' code as PEFT has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..files.atomic import check_folder, write_files
from .options import Json, ReplaceAdapter, check_out, print_json, say, silence_loading


def convert(
    file: Annotated[Path, typer.Argument(help="A .pt file of the T-Few authors' code.")],
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of the T5 it is for, such as bigscience/T0_3B; its config.json "
            "is all that is read."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    force: ReplaceAdapter = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter of the T-Few authors' code into PEFT's two files."""
    check_out(out, force)
    check_folder(out)
    silence_loading()
    from ..adapter.convert import convert_tfew_authors, structure_of
    from ..adapter.layout import WEIGHTS_NAME
    from ..adapter.store import Adapter, adapter_files

    config, vectors = convert_tfew_authors(file, structure_of(model))
    config = replace(config, base_model_name_or_path=model, inference_mode=True)
    files = adapter_files(Adapter(config, vectors))
    write_files(out, files)
    values = sum(vector.numel() for vector in vectors.values())
    size = len(files[WEIGHTS_NAME])
    if as_json:
        print_json(adapter=str(out), vectors=len(vectors), values=values, adapter_bytes=size)
    else:
        say(f"{len(vectors)} vectors of {values:,} values; {size / 1024:.0f} KiB in {out}")
