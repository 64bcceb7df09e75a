"""`ia3 merge` and `ia3 export`: an adapter for programs that know no (IA)³."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import IA3Error, counted
from ..files.atomic import check_folder, holds_nothing
from ..files.hub import CONFIG_NAME
from ..files.rows import read_rows
from ..files.saved import HEAD_NAME, TASK_NAME, WEIGHTS_NAME, weights_file
from ..report.console import counting_bar, print_rows, results
from . import options
from .labelled import examples_for, labels_among, read_task
from .multilabel import check_multilabel, label_lists_among
from .options import load_classifier, print_json, report, say, silence_loading

if TYPE_CHECKING:
    from ..model.lora import SiteLoss

AnyAdapter = Annotated[Path, typer.Argument(help="An adapter's folder.")]
BaseCopy = Annotated[
    str | None, typer.Option(help="The model it was trained on, where that lies elsewhere now.")
]


def merge(
    adapter: AnyAdapter,
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    model: BaseCopy = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the model in a folder that exists.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Merge an adapter into its base model, and write that as a model like any other.

    It keeps the base model's type of numbers, tokenizer and other files. A classifier's prompts,
    or its linear head on an encoder, stay with the adapter: what reads the model needs them too.
    """
    weights_file(adapter)  # what is not there is said before torch is loaded
    _check_replaced(adapter, out, force, ("config.json", "modules.json"))
    silence_loading()
    from ..model.merged import on_its_base, write_merged

    loaded = on_its_base(adapter, model)
    _check_apart(out, loaded.source)
    vectors = len(loaded.model.targeted_module_names)
    merged = write_merged(loaded, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    dtype = str(merged.dtype).removeprefix("torch.")
    apart = [name for name in (TASK_NAME, HEAD_NAME) if (adapter / name).is_file()]
    if not as_json and apart:
        what = "linear head stays" if HEAD_NAME in apart else "prompts and the labels' words stay"
        say(f"the classifier's {what} in {adapter} ({', '.join(apart)})")
    report(
        as_json,
        f"{counted(vectors, 'vector')} merged into {loaded.base}, {dtype}; "
        f"{size / 2**20:.0f} MiB in {out}",
        model=str(out),
        base_model=loaded.base,
        vectors=vectors,
        dtype=dtype,
        bytes=size,
        stays_with_adapter=apart,
    )


def export(
    adapter: AnyAdapter,
    lora: Annotated[
        int, typer.Option(metavar="RANK", help="Rank of the LoRA; the higher, the nearer.", min=1)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the LoRA.")],
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Take it that the LoRA is not the same.")
    ] = False,
    bias: Annotated[
        bool,
        typer.Option(
            "--bias", help="Also write what changes in biases; PEFT reads it, few servers do."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled texts to measure a classifier on, before and after."),
    ] = None,
    text: options.TextColumns = ["text"],  # noqa: B006
    label: options.LabelColumn = "label",
    split: options.Split = "test",
    subset: options.Subset = None,
    multilabel: options.Multilabel = None,
    model: BaseCopy = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the adapter in a folder that exists.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write the LoRA nearest to an adapter, for servers that know nothing else.

    It is another adapter, and a worse one: it says how much of each change to a weight is left out
    and, of a classifier on --data, what that does to its accuracy.
    """
    if not lossy:
        raise IA3Error(
            f"a LoRA of rank {lora} is only the nearest to this adapter: vectors scale "
            "activations, and no change of low rank does the same; give --lossy if that will do, "
            "or use 'ia3 merge', which loses nothing"
        )
    weights_file(adapter)
    _check_replaced(adapter, out, force, (CONFIG_NAME,))
    asked = None
    if data is not None:
        asked = _labelled(adapter, data, text, label, split, subset, multilabel)
    silence_loading()
    from ..model.lora import nearest_lora

    before = after = None
    if asked is None:
        from ..model.merged import on_its_base

        on_base = on_its_base(adapter, model).model
        with counting_bar("factoring", len(on_base.targeted_module_names)) as progress:
            found = nearest_lora(on_base, lora, bias=bias, progress=progress)
    else:
        from ..classify.measure import measured_on, with_lora
        from ..tfew.temporary_adapter import temporary_adapter

        classifier = load_classifier(adapter, model, None, "auto", "auto")
        stored = classifier.adapter_
        with (
            temporary_adapter(classifier.base, stored) as on_base,
            counting_bar("factoring", len(stored.vectors)) as progress,
        ):
            found = nearest_lora(on_base, lora, bias=bias, progress=progress)
        texts, truth = asked
        count = 2 * len(texts) * len(classifier.templates_)
        with counting_bar("measuring", count) as progress:
            before = measured_on(classifier, texts, truth, f"on {data}", progress=progress)
            with with_lora(classifier, found) as other:
                after = measured_on(other, texts, truth, f"on {data}", progress=progress)
    found.save_pretrained(out)
    size = (out / WEIGHTS_NAME).stat().st_size
    if as_json:
        accuracy = None
        if before is not None and after is not None:
            accuracy = {"adapter": before.accuracy, "lora": after.accuracy, "texts": before.texts}
        print_json(
            lora=str(out),
            rank=lora,
            by_site=list(map(asdict, found.losses)),
            accuracy=accuracy,
            adapter_bytes=size,
        )
        return
    _print_losses(found.losses)
    if before is not None and after is not None:
        change = 100 * (after.accuracy - before.accuracy)
        _print(
            f"accuracy on {data}: {before.accuracy:.1%} with the adapter, {after.accuracy:.1%} "
            f"with the LoRA ({change:+.1f} points, {counted(before.texts, 'text')})"
        )
    modules = counted(len(found.losses), "module")
    say(f"LoRA of rank {lora}: {modules}; {size / 2**20:.1f} MiB in {out}")


def _labelled(
    adapter: Path,
    data: str,
    text: Sequence[str],
    label: str,
    split: str,
    subset: str | None,
    multilabel: str | None,
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The texts that a classifier is asked, and their labels."""
    task = read_task(adapter)
    check_multilabel(adapter, task.multilabel, multilabel)
    several = multilabel is not None
    rows = read_rows(data, split=split, subset=subset, text=text, label=label, multilabel=several)
    examples = examples_for(adapter, task, rows, text)
    if multilabel is None:
        return examples, labels_among(rows, label, task.labels)
    return examples, label_lists_among(rows, label, multilabel, task.labels)


def _print_losses(losses: Sequence[SiteLoss]) -> None:
    from ..core.names import starred

    by_kind: dict[str, list[SiteLoss]] = {}
    for loss in losses:
        by_kind.setdefault(starred(loss.site), []).append(loss)
    rows = []
    for kind, own in by_kind.items():
        changes, biases = [loss.change for loss in own], [loss.bias for loss in own]
        of_changes = [f"{sum(changes) / len(own):.1%}", f"{max(changes):.1%}"]
        rows.append([kind, f"{len(own):,}", *of_changes, f"{max(biases):.1%}"])
    print_rows("", ("site", "modules", "mean loss", "most", "bias"), rows)
    _print(
        "loss: how much of the change to a module's weight the LoRA leaves out, by the Frobenius "
        "norm. bias: how large a change of a module's bias is left out, at most; --bias writes it."
    )


def _print(line: str) -> None:
    results.print(line, markup=False, highlight=False, soft_wrap=True)


def _check_replaced(adapter: Path, out: Path, force: bool, known_by: Sequence[str]) -> None:
    """Refuse a folder that exists, unless what these files tell is to be replaced, or is read."""
    if not holds_nothing(out):
        if not force:
            raise IA3Error(f"{out} exists already: choose another --out, or give --force")
        if not any((out / name).is_file() for name in known_by):
            what = f"{out} holds no {known_by[0]}, and so nothing that --force could replace"
            raise IA3Error(f"{what}: choose another --out")
    _check_apart(out, adapter)
    check_folder(out)


def _check_apart(out: Path, read: Path) -> None:
    """Refuse to write over what is read, or around it."""
    here, there = out.resolve(), read.resolve()
    if here == there or here in there.parents:
        raise IA3Error(f"--out {out} holds {read}, which is read: choose another")
