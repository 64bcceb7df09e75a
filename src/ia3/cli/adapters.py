"""What adapters are in a folder, what they do, how they differ, and arithmetic on them."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from warnings import catch_warnings

import typer
from rich.table import Table
from rich.text import Text

from ..errors import IA3Error, counted
from ..files.atomic import write_file
from ..files.saved import TASK_NAME, weights_file
from ..report.console import counting_bar, print_rows, results, visible
from . import options
from .options import check_files, check_out, print_json, reason, report, say, warn, write_adapter

if TYPE_CHECKING:
    from ..adapter.files import Adapter
    from ..adapter.layout import Outline
    from ..classify.engine import Fit
    from ..report.maps import SiteMap

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Looked through with all below it.")]
AdapterFolders = Annotated[list[Path], typer.Argument(help="Folders of adapters.")]
AdapterFolder = Annotated[Path, typer.Argument(help="An adapter's folder.")]
Png = Annotated[Path | None, typer.Option(help="Draw the maps into this PNG file.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with the maps into this file.")]

STATISTICS = {"mean": "{:+.3f}", "spread": "{:.3f}", "inhibited": "{:.1%}", "amplified": "{:.1%}"}


def list_adapters(folder: Folder, as_json: options.Json = False) -> None:
    """List the adapters in a folder and all below it; broken ones with what is wrong."""
    from ..adapter.layout import find_adapters, read_outline

    folders = list(find_adapters(folder))
    found: list[Outline] = []
    broken: dict[Path, str] = {}
    # Thousands of configs may each have unknown keys.
    with catch_warnings(action="ignore"), counting_bar("adapters", len(folders)) as progress:
        for path in folders:
            progress(1)
            try:
                found.append(read_outline(path))
            except (IA3Error, OSError) as error:
                broken[path] = reason(error)
    if as_json:
        print_json(adapters=[_outlined(each) for each in found], broken=_broken(broken))
        return
    header = ("adapter", "base model", "sites", "values", "size", "modified")
    rows = []
    for each in found:
        names = [os.path.relpath(each.folder, folder), each.config.base_model_name_or_path or "-"]
        counts = [f"{len(each.shapes):,}", f"{each.values:,}", _size(each.adapter_bytes)]
        rows.append([*names, *counts, _moment(each.modified).strftime("%Y-%m-%d %H:%M")])
    print_rows("", header, rows, names=2)
    reasons = [[os.path.relpath(path, folder), why] for path, why in broken.items()]
    print_rows("broken", ("adapter", "reason"), reasons, names=2)
    _print(f"{counted(len(found), 'adapter')}, {len(broken):,} broken")


def inspect(
    adapters: AdapterFolders,
    png: Png = None,
    html: Html = None,
    force: options.ReplaceFiles = False,
    as_json: options.Json = False,
) -> None:
    """Show what adapters switch off and on inside the model: a table, and maps by layer."""
    files = check_files([png, html], force, ("--png", "--html"))
    from ..adapter.layout import read_vectors
    from ..report import heatmap, maps

    if files:
        from ..report import adapters as drawing
    import numpy as np

    found: list[dict[str, Any]] = []
    grids = []
    for path in adapters:
        outline = _outline(path)
        read = read_vectors(outline)
        if not read:
            raise IA3Error(f"{path}: there are no vectors to look at")
        vectors = {name: vector.astype(np.float64).reshape(-1) for name, vector in read.items()}
        whole = heatmap.statistics(np.concatenate(list(vectors.values())))
        by_site = [
            {"site": name, "values": v.size, **heatmap.statistics(v)} for name, v in vectors.items()
        ]
        more = {"copies": outline.copies, **whole, "by_site": by_site}
        found.append(_outlined(outline) | more)
        grids.append((str(path), heatmap.layer_site_grid(vectors)))
    facts = _facts(found)
    if html is not None:
        title = grids[0][0] if len(grids) == 1 else counted(len(grids), "adapter")
        shown = drawing.maps_of_adapters(grids, drawing.MOST_ON_PAGE)
        write_file(html, drawing.maps_page(title, facts, shown).encode())
    if png is not None:
        shown = drawing.maps_of_adapters(grids, drawing.MOST_IN_PICTURE)
        write_file(png, drawing.maps_picture(shown))
    if as_json:
        print_json(adapters=found, files=list(map(str, files)))
        return
    if len(found) == 1:
        _print_facts([*facts, *_config_facts(outline)])
        from ..report.terminal import short_sites

        sites = heatmap.site_statistics(vectors)
        names = short_sites([of["site"] for of in sites])
        rows = [
            [name, f"{of['vectors']:,}", f"{of['values']:,}", *_shown(of)]
            for name, of in zip(names, sites, strict=True)
        ]
        print_rows("over all layers", ("site", "vectors", "values", *STATISTICS), rows)
    else:
        rows = [[of["adapter"], f"{of['values']:,}", *_shown(of)] for of in found]
        print_rows("", ("adapter", "values", *STATISTICS), rows)
        _print(f"\nMeans over {counted(len(grids), 'adapter')}:")
    _print_maps(maps.site_maps([heatmap.mean_grid([grid for _, grid in grids])])[0])
    _print(
        "mean: of log2 |value|, in octaves (+1 doubles an activation, -1 halves it). "
        "spread: standard deviation of the values. "
        f"inhibited: share with |value| < {heatmap.INHIBITED_BELOW}. "
        f"amplified: share with |value| > {heatmap.AMPLIFIED_ABOVE}. "
        "site: the part of a layer whose activation is multiplied."
    )
    for path in files:
        say(f"written: {path}")


def diff(
    first: AdapterFolder,
    second: AdapterFolder,
    top: Annotated[int, typer.Option(help="How many of the largest changes to show.", min=0)] = 10,
    png: Png = None,
    html: Html = None,
    force: options.ReplaceFiles = False,
    as_json: options.Json = False,
) -> None:
    """Show how a second adapter differs from a first."""
    files = check_files([png, html], force, ("--png", "--html"))
    from ..adapter.layout import read_vectors
    from ..adapter.similarity import difference, largest_changes
    from ..report.heatmap import difference_grid
    from ..report.maps import site_maps

    if files:
        from ..report.adapters import maps_page, maps_picture
    outlines = [_outline(path) for path in (first, second)]
    before, after = (read_vectors(outline) for outline in outlines)
    whole, sites = difference(before, after)
    changes = largest_changes(before, after, top)
    (maps,) = site_maps([difference_grid(sites)])
    other_base = outlines[0].base_difference(outlines[1])
    header = ("site", "index", "first", "second", "change, octaves")
    rows = [
        [c.site, str(c.index), f"{c.first:.4g}", f"{c.second:.4g}", f"{c.change:+.3f}"]
        for c in changes
    ]
    identity = "- (one of them is the identity)"
    facts = [
        *(("first", str(first)), ("second", str(second)), ("values", f"{whole.values:,}")),
        ("cosine of the log-scales", identity if whole.cosine is None else f"{whole.cosine:+.4f}"),
        ("norm of the difference", f"{whole.norm:.4g}"),
        ("mean change", f"{whole.change:+.4f} octaves"),
    ]
    title = f"{first} and {second}"
    if html is not None:
        from ..report.page import section, table

        largest = [section("Largest changes", table(header, rows))] if rows else []
        page = maps_page(title, facts, [("Where they differ", maps)], largest)
        write_file(html, page.encode())
    if png is not None:
        write_file(png, maps_picture([(title, maps)]))
    if other_base is not None:
        warn(f"they are adapters of different base models: {other_base}")
    if as_json:
        figures = {name: value for name, value in asdict(whole).items() if name != "site"}
        figures |= {"by_site": list(map(asdict, sites)), "other_base": other_base}
        figures |= {"largest_changes": list(map(asdict, changes)), "files": list(map(str, files))}
        print_json(first=str(first), second=str(second), **figures)
        return
    _print_facts(facts)
    _print_maps(maps)
    print_rows("largest changes", header, rows)
    _print(
        "octaves: of |value|, +1 is twice as much and -1 half. log-scale: log2 |value|; the cosine "
        "is 1 where both turn the same activations up and down. site: the part of a layer whose "
        "activation is multiplied."
    )
    for path in files:
        say(f"written: {path}")


def search(
    folder: Folder,
    like: Annotated[Path, typer.Option(help="The folder of the adapter to compare with.")],
    top: Annotated[int, typer.Option(help="How many to show.", min=1)] = 10,
    as_json: options.Json = False,
) -> None:
    """Find the adapters most like one: those that turn the same things in the model up and down."""
    from ..adapter.layout import find_adapters
    from ..adapter.similarity import search as search_among

    outline = _outline(like)
    folders = list(find_adapters(folder))
    with catch_warnings(action="ignore"), counting_bar("adapters", len(folders)) as progress:
        found = search_among(outline, folders, top, progress)
    if as_json:
        nearest = [{"adapter": str(n.adapter), "cosine": n.cosine} for n in found.nearest]
        counts = {"compared": found.compared, "other_base": found.other_base}
        print_json(like=str(like), nearest=nearest, **counts, broken=_broken(found.broken))
        return
    rows = [[os.path.relpath(n.adapter, folder), f"{n.cosine:+.4f}"] for n in found.nearest]
    print_rows("", ("adapter", "cosine"), rows)
    _print(
        f"{found.compared:,} compared; passed over: {found.other_base:,} of another base model, "
        f"{len(found.broken):,} broken"
    )


def combine(
    adapters: AdapterFolders,
    out: Annotated[Path, typer.Option(help="Folder for the new adapter.")],
    combination_type: Annotated[
        str, typer.Option(help="linear, average, geometric_mean, task_arithmetic or ties.")
    ] = "average",
    weights: Annotated[
        str | None, typer.Option(help="Numbers with commas between; 1 each if absent.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="For ties: the share of values kept, 0.2 if absent.")
    ] = None,
    majority_sign_method: Annotated[
        str, typer.Option(help="For ties: total (of the values) or frequency.")
    ] = "total",
    force: options.ReplaceAdapter = False,
    as_json: options.Json = False,
) -> None:
    """Make one adapter of several: their average, a weighted sum, or another way that PEFT has.

    Classifiers of the same labels, on the same model, become one classifier.
    """
    if weights is None and combination_type == "linear":
        raise typer.BadParameter("linear needs them", param_hint="--weights")
    try:
        given = ["1"] * len(adapters) if weights is None else weights.split(",")
        numbers = [float(part) for part in given]
    except ValueError as error:
        problem = f"{weights!r} is not a list of numbers with commas between"
        raise typer.BadParameter(problem, param_hint="--weights") from error
    check_out(out, force)
    for path in adapters:
        weights_file(path)  # what is not there is said before torch is loaded
    from ..adapter.combining import combine as combined_of
    from ..adapter.files import read_adapter

    stored = [(str(path), read_adapter(path)) for path in adapters]
    nameless = [name for name, adapter in stored if adapter.base is None]
    bases = {adapter.config.base_model_name_or_path for _, adapter in stored}
    if nameless and len(bases) > 1:
        names = ", ".join(sorted(map(repr, bases)))
        why = f"{names} ({nameless[0]} has no fingerprint)"
        warn(f"nothing but their names tells whether they are of one base model: {why}")
    method: Any = combination_type, density, majority_sign_method
    adapter = combined_of(stored, numbers, *method)
    adapter.config = replace(adapter.config, inference_mode=True)
    classifier = _combined_classifier(adapters, numbers, adapter)
    size = write_adapter(out, classifier or adapter)
    values = sum(vector.numel() for vector in adapter.vectors.values())
    sites, kind = len(adapter.vectors), "adapter" if classifier is None else "classifier"
    report(
        as_json,
        f"{combination_type} of {counted(len(adapters), kind)}: "
        f"{counted(sites, 'vector')} of {counted(values, 'value')}; "
        f"{_size(size)} in {out}",
        adapter=str(out),
        classes=None if classifier is None else classifier.classes,
        combination_type=combination_type,
        adapters=list(map(str, adapters)),
        weights=numbers,
        sites=sites,
        values=values,
        adapter_bytes=size,
    )


def _combined_classifier(
    paths: Sequence[Path], weights: Sequence[float], adapter: Adapter
) -> Fit | None:
    """The classifier that these folders' ones become, where they can; a warning says why not."""
    without = [path for path in paths if not (path / TASK_NAME).exists()]
    if len(without) == len(paths):
        return None
    problem: str | None = f"{without[0]} is an adapter alone" if without else None
    if problem is None:
        from ..classify.combined import combined_fit, no_classifier
        from ..classify.estimator import read_classifier

        fits = [(str(path), read_classifier(path)) for path in paths]
        problem = no_classifier(fits, weights)
        if problem is None:
            return combined_fit([fit for _, fit in fits], weights, adapter)
    warn(f"this makes an adapter, and no classifier: {problem}")
    return None


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


def _broken(reasons: Mapping[Path, str]) -> list[dict[str, str]]:
    return [{"adapter": str(p), "reason": " ".join(why.split())} for p, why in reasons.items()]


# -- printing -------------------------------------------------------------------------------------


def _facts(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    bases = sorted({of["base_model"] or "-" for of in found})
    first, *others = found
    names = ", ".join(of["adapter"] for of in found)
    facts = [("adapters" if others else "adapter", names), ("base model", ", ".join(bases))]
    if others:
        return facts
    facts += [(name, f"{first[name]:,}") for name in ("sites", "values")]
    facts.append(("size", _size(first["adapter_bytes"])))
    return [*facts, *zip(STATISTICS, _shown(first), strict=True)]


def _config_facts(outline: Outline) -> Iterator[tuple[str, str]]:
    if outline.base is not None:
        yield "model type", outline.base.model_type
    for name in ("task_type", "target_modules", "feedforward_modules", "modules_to_save"):
        value = getattr(outline.config, name)
        if value:
            shown = value if isinstance(value, str) else ", ".join(sorted(value))
            yield name, shown if len(shown) < 400 else f"{shown[:400]}…"


def _print(line: str) -> None:
    results.print(line, markup=False, highlight=False)


def _print_facts(facts: Sequence[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(visible(value)))
    results.print(table)


def _print_maps(maps: Sequence[SiteMap]) -> None:
    from ..report.terminal import heat_tables

    for tables in heat_tables(maps, results.width):
        results.print(tables)


def _shown(of: Mapping[str, Any]) -> list[str]:
    return [form.format(of[name]) for name, form in STATISTICS.items()]


def _size(count: int) -> str:
    if count < 2**20:
        return f"{math.ceil(count / 1024):,} KiB"
    return f"{count / 2**20:,.1f} MiB"


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds).astimezone()
