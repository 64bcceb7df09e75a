"""What adapters are in a folder, what they do, how they differ, and arithmetic on them."""

from __future__ import annotations

import datetime
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import IA3Error
from ..files.atomic import check_folder, write_file, write_files
from ..report.console import counting_bar, visible
from .options import Json, ReplaceAdapter, check_out, print_json, say

if TYPE_CHECKING:
    from ..adapter.layout import Outline
    from ..report.heatmap import LayerSiteGrid
    from ..report.maps import SiteMap

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Looked through with all below it.")]
AdapterFolder = Annotated[Path, typer.Argument(help="An adapter's folder.")]
Png = Annotated[Path | None, typer.Option(help="Draw the maps into this PNG file.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with the maps into this file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]

STATISTICS = ("mean", "spread", "inhibited", "amplified")


def list_adapters(folder: Folder, as_json: Json = False) -> None:
    """List the adapters in a folder and all below it; broken ones with what is wrong."""
    from ..adapter.layout import find_adapters, read_outline

    folders = list(find_adapters(folder))
    found: list[Outline] = []
    broken: list[dict[str, str]] = []
    with _quietly(), counting_bar("adapters", len(folders)) as progress:
        for path in folders:
            progress(1)
            try:
                found.append(read_outline(path))
            except (IA3Error, OSError) as error:
                broken.append({"adapter": str(path), "reason": _one_line(error)})
    if as_json:
        print_json(adapters=[_outlined(each) for each in found], broken=broken)
        return
    header = ("adapter", "base model", "sites", "values", "size", "modified")
    rows = [
        [
            _below(each.folder, folder),
            each.config.base_model_name_or_path or "-",
            f"{len(each.shapes):,}",
            f"{each.values:,}",
            _size(each.adapter_bytes),
            _moment(each.modified).strftime("%Y-%m-%d %H:%M"),
        ]
        for each in found
    ]
    console = Console(emoji=False)
    if rows:
        _print_rows(console, "", header, rows, names=2)
    if broken:
        reasons = [[_below(Path(one["adapter"]), folder), one["reason"]] for one in broken]
        _print_rows(console, "broken", ("adapter", "reason"), reasons, names=2)
    counts = f"{len(found):,} adapters, {len(broken):,} broken"
    console.print(counts, markup=False, highlight=False)


def inspect(
    adapters: Annotated[
        list[Path], typer.Argument(help="Folders of adapters; of several, the means are shown.")
    ],
    png: Png = None,
    html: Html = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show what adapters switch off and on: a table, and maps by layer and site."""
    _check_pictures(png, html, force)
    from ..adapter.layout import read_vectors
    from ..report.heatmap import layer_site_grid, site_statistics, statistics

    if png is not None or html is not None:
        from ..report.adapters import inspection_page, inspection_picture
    import numpy as np

    outlines: list[Outline] = []
    grids: list[LayerSiteGrid] = []
    details: list[dict[str, Any]] = []
    by_site: list[Any] = []
    with _bar(len(adapters)) as progress:
        for path in adapters:
            progress(1)
            outline = _outline(path)
            vectors = read_vectors(outline)
            if not vectors:
                raise IA3Error(f"{path}: there are no vectors to look at")
            outlines.append(outline)
            grids.append(layer_site_grid(vectors))
            whole = np.concatenate([v.reshape(-1) for v in vectors.values()]).astype(np.float64)
            details.append(
                {
                    **_outlined(outline),
                    "copies": outline.copies,
                    **vars(statistics(whole)),
                    "by_site": [
                        {"site": name, "values": v.size, **vars(statistics(v.astype(np.float64)))}
                        for name, v in vectors.items()
                    ],
                }
            )
            if len(adapters) == 1:
                by_site = site_statistics(vectors)
    named = list(zip(map(str, adapters), grids, strict=True))
    if html is not None:
        title = str(adapters[0]) if len(adapters) == 1 else f"{len(adapters)} adapters"
        page = inspection_page(title, _facts(outlines, details), named)
        write_file(html, page.encode())
    if png is not None:
        write_file(png, inspection_picture(named))
    if as_json:
        print_json(adapters=details, files=[str(path) for path in (png, html) if path is not None])
        return
    console = Console(emoji=False)
    if len(outlines) == 1:
        _print_facts(console, _facts(outlines, details), outlines[0])
        _print_sites(console, by_site)
    else:
        _print_each(console, outlines, details)
    from ..report.heatmap import mean_grid
    from ..report.maps import statistic_maps

    (maps,) = statistic_maps([mean_grid(grids)])
    if len(grids) > 1:
        console.print(f"\nMeans over {len(grids)} adapters:", markup=False)
    _print_maps(console, maps)
    console.print(_legend(), markup=False, highlight=False)
    _say_written(png, html)


def diff(
    first: AdapterFolder,
    second: AdapterFolder,
    top: Annotated[int, typer.Option(help="How many of the largest changes to show.", min=0)] = 10,
    png: Png = None,
    html: Html = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show how a second adapter differs from a first."""
    _check_pictures(png, html, force)
    from ..adapter.layout import read_vectors
    from ..adapter.similarity import difference, largest_changes
    from ..report.heatmap import difference_grid
    from ..report.maps import difference_maps

    if png is not None or html is not None:
        from ..report.adapters import difference_page, difference_picture
    outlines = [_outline(path) for path in (first, second)]
    before, after = (read_vectors(outline) for outline in outlines)
    whole, sites = difference(before, after)
    changes = largest_changes(before, after, top)
    maps = difference_maps(difference_grid(sites))
    other_base = outlines[0].base_difference(outlines[1])
    header = ("site", "index", "first", "second", "change, octaves")
    rows = [
        [c.site, str(c.index), f"{c.first:.4g}", f"{c.second:.4g}", f"{c.change:+.3f}"]
        for c in changes
    ]
    facts = [
        ("first", str(first)),
        ("second", str(second)),
        ("values", f"{whole.values:,}"),
        ("cosine of the log-scales", _cosine(whole.cosine)),
        ("norm of the difference", f"{whole.norm:.4g}"),
        ("mean change", f"{whole.change:+.4f} octaves"),
    ]
    title = f"{first} and {second}"
    if html is not None:
        write_file(html, difference_page(title, facts, maps, header, rows).encode())
    if png is not None:
        write_file(png, difference_picture(title, maps))
    if other_base is not None:
        say(f"they are adapters of different base models: {other_base}", "warning:", "yellow")
    if as_json:
        print_json(
            first=str(first),
            second=str(second),
            **{key: value for key, value in asdict(whole).items() if key != "site"},
            by_site=[asdict(site) for site in sites],
            largest_changes=[asdict(each) for each in changes],
            other_base=other_base,
            files=[str(path) for path in (png, html) if path is not None],
        )
        return
    console = Console(emoji=False)
    _print_facts(console, facts)
    _print_maps(console, maps)
    if rows:
        _print_rows(console, "largest changes", header, rows)
    _say_written(png, html)


def search(
    folder: Folder,
    like: Annotated[Path, typer.Option(help="The folder of the adapter to compare with.")],
    top: Annotated[int, typer.Option(help="How many to show.", min=1)] = 10,
    as_json: Json = False,
) -> None:
    """Find the adapters most like one, by the cosine of their log-scales."""
    from ..adapter.layout import find_adapters
    from ..adapter.similarity import search as nearest

    outline = _outline(like)
    folders = list(find_adapters(folder))
    with _quietly(), counting_bar("adapters", len(folders)) as progress:
        found = nearest(outline, folders, top, progress)
    if as_json:
        print_json(
            like=str(like),
            nearest=[{"adapter": str(n.adapter), "cosine": n.cosine} for n in found.nearest],
            compared=found.compared,
            other_base=found.other_base,
            broken=[
                {"adapter": str(path), "reason": " ".join(reason.split())}
                for path, reason in found.broken.items()
            ],
        )
        return
    console = Console(emoji=False)
    if found.nearest:
        rows = [[_below(n.adapter, folder), f"{n.cosine:+.4f}"] for n in found.nearest]
        _print_rows(console, "", ("adapter", "cosine"), rows)
    console.print(
        f"{found.compared:,} compared; passed over: {found.other_base:,} of another base model, "
        f"{len(found.broken):,} broken",
        markup=False,
        highlight=False,
    )


def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of the adapters.")],
    out: Annotated[Path, typer.Option(help="Folder for the new adapter.")],
    combination_type: Annotated[
        str,
        typer.Option(help="linear, average, geometric_mean, task_arithmetic or ties."),
    ] = "average",
    weights: Annotated[
        str | None,
        typer.Option(help="A number for each adapter, with commas between; 1 each if absent."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="For ties: the share of an adapter's values that is kept, 0.2 if absent."
        ),
    ] = None,
    majority_sign_method: Annotated[
        str, typer.Option(help="For ties: total (of the values) or frequency.")
    ] = "total",
    force: ReplaceAdapter = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several: average, geometric mean, task arithmetic, TIES, weighted sum."""
    if weights is None and combination_type == "linear":
        raise typer.BadParameter("linear needs them", param_hint="--weights")
    numbers = [1.0] * len(adapters) if weights is None else _numbers(weights)
    check_out(out, force)
    check_folder(out)
    from ..adapter.combining import check_combination
    from ..adapter.combining import combine as combined_of
    from ..adapter.layout import WEIGHTS_NAME
    from ..adapter.store import adapter_files, read_adapter

    check_combination(combination_type, density, majority_sign_method)
    stored = []
    with _bar(len(adapters)) as progress:
        for path in adapters:
            progress(1)
            stored.append((str(path), read_adapter(path)))
    nameless = [(name, adapter) for name, adapter in stored if adapter.base is None]
    bases = {adapter.config.base_model_name_or_path for _, adapter in stored}
    if nameless and len(bases) > 1:
        say(
            f"nothing but their names tells whether they are of one base model: "
            f"{', '.join(sorted(map(repr, bases)))} ({nameless[0][0]} has no fingerprint)",
            "warning:",
            "yellow",
        )
    adapter = combined_of(
        stored,
        numbers,
        combination_type,  # type: ignore[arg-type]  # checked above
        density,
        majority_sign_method,  # type: ignore[arg-type]
    )
    adapter.config = replace(adapter.config, inference_mode=True)
    files = adapter_files(adapter)
    write_files(out, files)
    values = sum(vector.numel() for vector in adapter.vectors.values())
    size = len(files[WEIGHTS_NAME])
    if as_json:
        print_json(
            adapter=str(out),
            combination_type=combination_type,
            adapters=[str(path) for path in adapters],
            weights=numbers,
            sites=len(adapter.vectors),
            values=values,
            adapter_bytes=size,
        )
    else:
        say(
            f"{combination_type} of {len(adapters)} adapters: {len(adapter.vectors)} vectors of "
            f"{values:,} values; {_size(size)} in {out}"
        )


# -- reading --------------------------------------------------------------------------------------


def _outline(path: Path) -> Outline:
    from ..adapter.layout import read_outline

    if not path.is_dir():
        raise IA3Error(f"{path} is not a folder: expected an adapter's")
    return read_outline(path)


def _outlined(outline: Outline) -> dict[str, Any]:
    return {
        "adapter": str(outline.folder),
        "base_model": outline.config.base_model_name_or_path,
        "model_type": None if outline.base is None else outline.base.model_type,
        "task_type": outline.config.task_type,
        "sites": len(outline.shapes),
        "values": outline.values,
        "adapter_bytes": outline.adapter_bytes,
        "modified": _moment(outline.modified).isoformat(timespec="seconds"),
    }


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers with commas between", param_hint="--weights"
        ) from error


def _check_pictures(png: Path | None, html: Path | None, force: bool) -> None:
    for path in (png, html):
        if path is not None:
            check_out(path, force)
            check_folder(path.parent)


@contextmanager
def _quietly() -> Iterator[None]:
    """Unknown keys in the configs of thousands are not worth a warning each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _bar(count: int) -> AbstractContextManager[Any]:
    # A bar for a handful would be gone before anybody saw it.
    return counting_bar("adapters", count) if count > 20 else nullcontext(lambda done: None)


# -- printing -------------------------------------------------------------------------------------


def _facts(outlines: Sequence[Outline], details: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    bases = sorted({o.config.base_model_name_or_path or "-" for o in outlines})
    facts = [
        (
            "adapter" if len(outlines) == 1 else "adapters",
            ", ".join(str(o.folder) for o in outlines),
        ),
        ("base model", ", ".join(bases)),
    ]
    if len(outlines) == 1:
        (outline,), (detail,) = outlines, details
        facts += [
            ("sites", f"{len(outline.shapes):,}"),
            ("values", f"{outline.values:,}"),
            ("size", _size(outline.adapter_bytes)),
            *((name, _shown(name, detail[name])) for name in STATISTICS),
        ]
    return facts


def _print_facts(
    console: Console, facts: Sequence[tuple[str, str]], outline: Outline | None = None
) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(visible(value)))
    if outline is not None:
        config = outline.config
        if outline.base is not None:
            table.add_row("model type", Text(visible(outline.base.model_type)))
        for name in ("task_type", "target_modules", "feedforward_modules", "modules_to_save"):
            value = getattr(config, name)
            if value:
                shown = visible(value if isinstance(value, str) else ", ".join(sorted(value)))
                table.add_row(name, Text(shown if len(shown) < 400 else f"{shown[:400]}…"))
    console.print(table)


def _print_sites(console: Console, by_site: Sequence[Any]) -> None:
    from ..report.terminal import short_sites

    names = short_sites([each.site for each in by_site])
    header = ("site", "vectors", "values", *STATISTICS)
    rows = [
        [
            *(name, f"{each.vectors:,}", f"{each.values:,}"),
            *(_shown(what, getattr(each, what)) for what in STATISTICS),
        ]
        for name, each in zip(names, by_site, strict=True)
    ]
    _print_rows(console, "over all layers", header, rows)


def _print_each(
    console: Console, outlines: Sequence[Outline], details: Sequence[dict[str, Any]]
) -> None:
    rows = [
        [
            *(str(outline.folder), f"{outline.values:,}"),
            *(_shown(what, detail[what]) for what in STATISTICS),
        ]
        for outline, detail in zip(outlines, details, strict=True)
    ]
    _print_rows(console, "", ("adapter", "values", *STATISTICS), rows)


def _print_maps(console: Console, maps: Sequence[SiteMap]) -> None:
    from ..report.terminal import heat_tables

    for tables in heat_tables(maps, console.width):
        console.print(tables)


def _print_rows(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    names: int = 1,
) -> None:
    """A table; a line a value where it is too wide for the terminal.

    Args:
        names: how many of the first columns are names, which may be broken into lines.
    """
    rows = [[visible(value) for value in row] for row in rows]
    table = Table(title=title or None)
    for name in header[:names]:
        table.add_column(name, overflow="fold", min_width=12)
    for name in header[names:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    wide = console.options.update(width=10_000)
    if console.measure(table, options=wide).minimum > console.width:
        # Numbers that are broken or cut off say nothing.
        table = Table(title=title or None, show_header=False, show_lines=True)
        table.add_column(overflow="fold")
        for row in rows:
            lines = (f"{name}: {value}" for name, value in zip(header, row, strict=True))
            table.add_row(Text("\n".join(lines)))
    console.print(table)


def _legend() -> str:
    from ..report.heatmap import AMPLIFIED_ABOVE, INHIBITED_BELOW

    return (
        "mean: of log2 |value|, in octaves (+1 doubles an activation, -1 halves it). "
        "spread: standard deviation of the values. "
        f"inhibited: share with |value| < {INHIBITED_BELOW}. "
        f"amplified: share with |value| > {AMPLIFIED_ABOVE}."
    )


def _say_written(png: Path | None, html: Path | None) -> None:
    for path in (png, html):
        if path is not None:
            say(f"written: {path}")


def _shown(name: str, value: float) -> str:
    if name in ("inhibited", "amplified"):
        return f"{value:.1%}"
    return f"{value:+.3f}" if name == "mean" else f"{value:.3f}"


def _cosine(value: float | None) -> str:
    return "- (one of them is the identity)" if value is None else f"{value:+.4f}"


def _size(count: int) -> str:
    if count < 2**20:
        return f"{math.ceil(count / 1024):,} KiB"
    return f"{count / 2**20:,.1f} MiB"


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds).astimezone()


def _below(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
