"""What (IA)³ costs, against the frozen model and beside PEFT and AdapterHub's adapters, in one run.

    python benchmarks/speed.py [--data DIR] [--rows ROW ...] [--repeats 9]

SmolLM2-135M in float32 on the CPU. All that a ratio compares takes turns in one process, with the
same weights in the same place in memory; a ratio is the median over the turns. `adapters` runs in
an environment of its own (`.venv-adapters`, made by `make bench`), so that its ratios are against
its own base model there. A run of all rows writes `benchmarks/results/speed.json` and the table in
`docs/benchmarks.md`; with `--rows` it only prints.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Handling,
    Timings,
    batch_of,
    contestants,
    forward_pass,
    llama,
    on_ia3,
    on_peft,
    same_weights,
    saved_bytes,
    take_turns,
    time_decoding,
    training_step,
)
from reporting import (
    DOCUMENT,
    HERE,
    RESULTS,
    circumstances,
    digits,
    in_words,
    table,
    write_between,
    write_json,
)
from torch import nn

ADAPTERS_PYTHON = HERE.parent / ".venv-adapters" / "bin" / "python"
CONTESTANTS = ("ia3", "ia3 fused", "PEFT", "adapters")
MARK = "written by benchmarks/speed.py"
# Of a training step: rows, tokens of each.
BATCH = (4, 128)
OTHERS = (10, 100)
META_LAYERS = (20, 40, 80, 160)
# What the prompts of Banking77 are, without its labels in them.
BANKING_TEMPLATE = "Customers write to a bank.\nMessage: {{ Query }}\nTopic:"
BANKING_TOKENS = 53
FEW_CHOICES, FEW_TOKENS, FEW_EXAMPLES = 4, 40, 4


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: of the group that `--rows` names.
        measured: in words.
        unit: of `limit` and `values`.
        limit: what the ratios are against.
        against: what that is, in words.
        values: contestant -> value.
        ratios: contestant -> value to `limit`, or empty.
        reach: contestant -> the highest ratio aimed at, or value where there are no ratios.
        peer: what `adapters_peer.py` calls it.
    """

    name: str
    measured: str
    unit: str
    values: dict[str, float]
    reach: dict[str, float]
    against: str = ""
    limit: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    peer: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether all that is aimed at is reached, of what was measured."""
        figures = self.ratios or self.values
        found = [figures[name] <= most for name, most in self.reach.items() if name in figures]
        return all(found) if found else None


def timed_row(
    name: str,
    measured: str,
    timings: Timings,
    names: Mapping[str, str],
    limit: str,
    against: str,
    reach: dict[str, float],
    peer: str = "",
) -> Row:
    """A row in milliseconds, with ratios in the same turn.

    Args:
        names: contestant -> its name in `timings`.
        limit: the name in `timings` of what the ratios are against.
    """
    values = {contestant: 1e3 * timings.median(own) for contestant, own in names.items()}
    ratios = {contestant: timings.ratio(own, limit) for contestant, own in names.items()}
    level = 1e3 * timings.median(limit)
    return Row(name, measured, "ms", values, reach, against, level, ratios, peer)


# -- what is measured on ---------------------------------------------------------------------------


class Bench:
    """The models that take turns, made when first asked for.

    Args:
        base: an `ia3.base.loading.BaseModel`; its model is frozen and stays as it is.
        repeats: turns of most rows.
        data: the folder with `raft/`, or none.
    """

    def __init__(self, base: Any, repeats: int, data: Path | None) -> None:
        self.base = base
        self.repeats = repeats
        self.data = data
        self.frozen: Any = base.model.requires_grad_(False).eval()
        self.vocabulary = int(self.frozen.config.vocab_size)

    @cached_property
    def adapted(self) -> dict[str, Any]:
        """Contestant -> the model with its adapter, in evaluation mode (there is no dropout)."""
        return contestants(self.frozen)


# -- rows ------------------------------------------------------------------------------------------


def saved_row(bench: Bench) -> list[Row]:
    """Activations saved for the backward pass."""
    embeddings, _ = batch_of(bench.frozen, *BATCH)
    sizes = {
        name: saved_bytes(model, forward_pass(model, embeddings)) / 2**20
        for name, model in {"frozen": bench.frozen, **bench.adapted}.items()
    }
    frozen = sizes.pop("frozen")
    return [
        Row(
            "saved",
            f"activations saved for the backward pass, {BATCH[0]} × {BATCH[1]} tokens",
            "MiB",
            sizes,
            {"ia3": 1.03, "ia3 fused": 0.95},
            "frozen model with gradients to its input",
            frozen,
            {name: size / frozen for name, size in sizes.items()},
            peer="saved",
        )
    ]


def step_row(bench: Bench) -> list[Row]:
    """A training step of the language-modelling loss."""
    embeddings, labels = batch_of(bench.frozen, *BATCH)
    models = {"frozen": bench.frozen, **bench.adapted}
    timings = take_turns(
        {name: training_step(model, embeddings, labels) for name, model in models.items()},
        bench.repeats,
    )
    measured = f"training step, {BATCH[0]} × {BATCH[1]} tokens"
    reach = {"ia3": 1.02, "ia3 fused": 1.02}
    names = {name: name for name in bench.adapted}
    return [timed_row("step", measured, timings, names, "frozen", "the same", reach, "step")]


def tfew_rows(bench: Bench) -> list[Row]:
    """T-Few's training step, and scoring, against choices expanded in the batch."""
    import ia3
    from ia3.tfew.scoring.choices import token_scores
    from ia3.tfew.scoring.expanded import expanded_scores
    from ia3.tfew.training.losses import token_loss

    model = same_weights(bench.frozen)
    on_ia3(model)
    base = ia3.load_base_model(model, tokenizer=bench.base.tokenizer)
    parameters = [p for p in base.model.parameters() if p.requires_grad]

    def training(way: Callable[..., Any], examples: Sequence[Any]) -> Callable[[], None]:
        labels = torch.arange(len(examples)) % len(examples[0].choices)

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            token_loss(way(base, examples), labels).total.backward()

        return step

    def scoring(way: Callable[..., Any], examples: Sequence[Any]) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                way(base, examples)

        return step

    many, few = banking_examples(base, bench.data)
    prompt, answers = len(many[0].prompt), sum(map(len, many[0].choices))
    of_many = f"{len(many[0].choices)} choices (Banking77, {prompt} + {answers} tokens)"
    of_few = f"{FEW_EXAMPLES} examples of {FEW_CHOICES} choices, prompts of {FEW_TOKENS} tokens"
    rows = []
    for what, work, examples, reach, repeats in (
        (f"T-Few training step, {of_many}", training, many, 1 / 9, (bench.repeats + 2) // 3),
        (f"T-Few training step, {of_few}", training, few, 1 / 2, (bench.repeats + 1) // 2),
        (f"scoring {of_many}", scoring, many, 1 / 15, (bench.repeats + 1) // 2),
    ):
        steps = {"ia3": work(token_scores, examples), "expanded": work(expanded_scores, examples)}
        # The other one takes half a minute, and its first time is like all others.
        steps["ia3"]()
        timings = take_turns(steps, repeats, warm_up=0)
        names = {"ia3": "ia3"}
        against = "the same with choices expanded in the batch"
        rows.append(timed_row("tfew", what, timings, names, "expanded", against, {"ia3": reach}))
    return rows


def banking_examples(base: Any, data: Path | None) -> tuple[list[Any], list[Any]]:
    """One example of all of Banking77's topics; some with few of them and shorter prompts."""
    from ia3.experiments.raft_data import read_raft
    from ia3.tfew import Encoder
    from ia3.tfew.prompts.encoding import EncodedExample
    from ia3.tfew.prompts.templates import Template

    assert data is not None
    (task,) = read_raft(data / "raft", ["banking_77"])
    encoder = Encoder(base, task.choices, chat=False)
    template = Template(BANKING_TEMPLATE)
    examples = [encoder.encode(task.example(row), template) for row in (*task.train, *task.test)]
    many = min(examples, key=lambda e: abs(len(e.prompt) - BANKING_TOKENS))
    long = [e for e in examples if len(e.prompt) >= FEW_TOKENS][:FEW_EXAMPLES]
    few = [EncodedExample(e.prompt[-FEW_TOKENS:], e.choices[:FEW_CHOICES]) for e in long]
    return [many], few


def decode_rows(bench: Bench) -> list[Row]:
    """One token decoded, unmerged and merged."""
    # Weights of its own: both libraries put other values into them.
    merged = {
        "ia3": on_ia3(copy.deepcopy(bench.frozen)).merge_and_unload(),
        "PEFT": on_peft(copy.deepcopy(bench.frozen)).merge_and_unload(),
    }
    models: dict[str, nn.Module] = {"frozen": bench.frozen, **bench.adapted}
    models |= {f"{name} merged": model for name, model in merged.items()}
    threads = torch.get_num_threads()
    rows = decoded(bench, models, list(merged), "")
    if threads > 1:
        torch.set_num_threads(1)
        try:
            rows += decoded(bench, models, list(merged), ", one thread")
        finally:
            torch.set_num_threads(threads)
    return rows


def decoded(
    bench: Bench, models: Mapping[str, nn.Module], merged: Sequence[str], how: str
) -> list[Row]:
    """One token decoded on as many threads as there are now."""
    timings = time_decoding(models, bench.vocabulary, 8 * bench.repeats)
    return [
        timed_row(
            "decode",
            f"one token decoded, 64 in the cache, {what}{how}",
            timings,
            {name: name + ending for name in names},
            *("frozen", "base model", reach, "" if how else f"decode {what}"),
        )
        for what, names, ending, reach in (
            ("unmerged", bench.adapted, "", {"ia3": 1.03, "ia3 fused": 1.03}),
            ("merged", merged, " merged", {"ia3": 1.005}),
        )
    ]


def attach_rows(bench: Bench) -> list[Row]:
    """Attach to a LLaMA of 70B's shape without weights, of some numbers of layers."""
    with torch.device("meta"):
        full = llama(
            hidden_size=8192,
            intermediate_size=28672,
            layers=max(META_LAYERS),
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        )
    layers = full.model.layers
    milliseconds: dict[str, dict[int, float]] = {"ia3": {}, "PEFT": {}}
    for count in META_LAYERS:
        full.model.layers = layers[:count]
        full.config.num_hidden_layers = count
        attached: dict[str, Any] = {}

        def attach(name: str, on: Callable[[nn.Module], Any], to: Any = attached) -> None:
            to[name] = on(full)

        def detach(name: str, of: Any = attached) -> None:
            of.pop(name).unload()

        ways = {"ia3": on_ia3, "PEFT": on_peft}
        timings = take_turns(
            {name: lambda name=name, on=on: attach(name, on) for name, on in ways.items()},
            max(3, bench.repeats // 2),
            after={name: lambda name=name: detach(name) for name in ways},
        )
        for name in ways:
            milliseconds[name][count] = 1e3 * timings.median(name)
    few, many = min(META_LAYERS), max(META_LAYERS)
    each = {name: {n: ms / n for n, ms in of.items()} for name, of in milliseconds.items()}
    rows = [
        Row(
            "attach",
            f"attach to a LLaMA of 70B's shape on the meta device, {count} layers",
            "ms",
            {name: of[count] for name, of in milliseconds.items()},
            # A 70B model has 80.
            {"ia3": 500.0} if count == 80 else {},
        )
        for count in META_LAYERS
    ]
    rows.append(
        Row(
            "attach",
            f"the same, a layer's part: {many} layers against {few}",
            "",
            {name: of[many] / of[few] for name, of in each.items()},
            {"ia3": 1.2},
        )
    )
    return rows


def adapter_rows(bench: Bench) -> list[Row]:
    """Load, switch and save an adapter on a model that has others."""

    def row(what: str, action: str, times: int, most: float, peer: str) -> Row:
        """What each does again and again, alone."""
        milliseconds = {}
        for name, one in each.items():
            after = {name: one.delete} if action == "load" else None
            timings = take_turns({name: getattr(one, action)}, times, after=after, warm_up=3)
            milliseconds[name] = 1e3 * timings.median(name)
        return Row("adapters", what, "ms", milliseconds, {"ia3": most}, peer=peer)

    rows = []
    with tempfile.TemporaryDirectory() as place:
        each = {
            "ia3": Handling(on_ia3(same_weights(bench.frozen)), Path(place, "ia3")),
            "PEFT": Handling(on_peft(same_weights(bench.frozen)), Path(place, "PEFT")),
        }
        saving = take_turns({name: one.save for name, one in each.items()}, 2 * bench.repeats)
        for others in OTHERS:
            for one in each.values():
                one.fill(1 + others)
            what = f"load an adapter from disk, {others} others on the model"
            rows.append(row(what, "load", bench.repeats, 3.0, f"load {others}"))
        what = f"switch to another adapter, {others} on the model"
        rows.append(row(what, "switch", 8 * bench.repeats, 0.5, "switch"))
    reach = {"ia3": 1 / 5}
    names = {"ia3": "ia3"}
    rows.append(
        timed_row("adapters", "save an adapter", saving, names, "PEFT", "PEFT", reach, "save")
    )
    return rows


def start_rows(bench: Bench) -> list[Row]:
    """Whole processes, the interpreter's own start included."""
    commands = {
        "python": ["-c", "pass"],
        "import ia3": ["-c", "import ia3"],
        "import peft": ["-c", "import peft"],
        "help": ["-m", "ia3", "--help"],
    }
    timings = take_turns(
        {
            name: lambda words=words: subprocess.run(
                [sys.executable, *words], check=True, stdout=subprocess.DEVNULL
            )
            for name, words in commands.items()
        },
        max(3, bench.repeats // 2),
    )
    seconds = {name: timings.median(name) for name in commands}
    return [
        Row(
            "start",
            f"a process that imports it (an empty one: {digits(seconds['python'])} s)",
            "s",
            {"ia3": seconds["import ia3"], "PEFT": seconds["import peft"]},
            {"ia3": 0.1},
        ),
        Row("start", "`ia3 --help`", "s", {"ia3": seconds["help"]}, {"ia3": 0.3}),
    ]


GROUPS: dict[str, Callable[[Bench], list[Row]]] = {
    "saved": saved_row,
    "step": step_row,
    "tfew": tfew_rows,
    "decode": decode_rows,
    "attach": attach_rows,
    "adapters": adapter_rows,
    "start": start_rows,
}


# -- the run ---------------------------------------------------------------------------------------


def measure(
    base: Any, groups: Sequence[str], repeats: int, data: Path | None
) -> tuple[list[Row], dict[str, str]]:
    """The rows of these groups, and of what was left out why."""
    bench = Bench(base, repeats, data)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for name in groups:
        if name == "tfew" and data is None:
            left_out[name] = "T-Few's steps and scoring: they need --data"
            continue
        start = time.perf_counter()
        rows += GROUPS[name](bench)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows, left_out


def add_adapters(rows: Sequence[Row], model: str | Path, repeats: int) -> dict[str, Any]:
    """Have AdapterHub's library measured by its own interpreter, and put it into the rows.

    Args:
        rows: those that it measures too get its figures.
        model: the folder of the model, which it loads by itself.
        repeats: turns.

    Returns:
        Its versions, or `{"left out": why}`.
    """
    if not ADAPTERS_PYTHON.is_file():
        return {"left out": f"adapters: there is no {ADAPTERS_PYTHON.parent.parent.name}"}
    wanted = [row.peer for row in rows if row.peer]
    if not wanted:
        return {}
    command = [str(ADAPTERS_PYTHON), str(HERE / "adapters_peer.py"), "--model", str(model)]
    shape = ["--batch", *map(str, BATCH), "--others", *map(str, OTHERS)]
    ran = subprocess.run(
        [*command, *shape, "--repeats", str(repeats), "--rows", *wanted],
        stdout=subprocess.PIPE,
        text=True,
    )
    if ran.returncode:
        return {"left out": f"adapters: its program ended with {ran.returncode}"}
    answer = json.loads(ran.stdout.strip().splitlines()[-1])
    for row in rows:
        if row.peer in answer["rows"]:
            found = answer["rows"][row.peer]
            row.values["adapters"] = found["value"]
            if found["ratio"] is not None:
                row.ratios["adapters"] = found["ratio"]
    return dict(answer["versions"])


def in_markdown(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """The table, and a line for each thing that is not in it."""
    lines = [
        [
            row.measured,
            f"{row.against}: {digits(row.limit)} {row.unit}" if row.limit is not None else "",
            *(_cell(row, name) for name in CONTESTANTS),
            ", ".join(f"{name} ≤ {_ratio_or(row, most)}" for name, most in row.reach.items()),
            {None: "", True: "yes", False: "no"}[row.reached],
        ]
        for row in rows
    ]
    header = ["measured", "against", *CONTESTANTS, "reach", "reached"]
    notes = [f"Left out: {why}." for why in left_out]
    return "\n\n".join([table(header, lines), *notes])


def _cell(row: Row, name: str) -> str:
    if name not in row.values:
        return ""
    value = f"{digits(row.values[name])} {row.unit}".strip()
    return f"{_ratio_or(row, row.ratios[name])} ({value})" if name in row.ratios else value


def _ratio_or(row: Row, figure: float) -> str:
    """A ratio with as many digits as tell, or a value with its unit."""
    if not row.ratios:
        return f"{figure:g} {row.unit}".strip()
    return f"1/{1 / figure:.3g}" if figure < 0.6 else f"{figure:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what a whole run has found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with raft/, for T-Few's rows")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        help="which to measure; all are also written down",
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    given = parser.parse_args(arguments)
    # PEFT warns at every adapter it attaches again.
    warnings.filterwarnings("ignore", module="peft")
    import ia3
    from ia3.base.embedded import EMBEDDED_MODEL, embedded_model_folder

    base = ia3.load_base_model(EMBEDDED_MODEL, device="cpu", dtype="float32")
    rows, left_out = measure(base, given.rows, given.repeats, given.data)
    peer = add_adapters(rows, embedded_model_folder(), given.repeats)
    if "left out" in peer:
        left_out["adapters"] = peer["left out"]
    where = circumstances() | {f"adapters' {name}": version for name, version in peer.items()}
    text = in_markdown(rows, list(left_out.values()))
    print(text)
    if set(given.rows) != set(GROUPS):
        return
    content = [{**asdict(row), "reached": row.reached} for row in rows]
    write_json(
        RESULTS / "speed.json",
        {"where": where, "repeats": given.repeats, "left out": left_out, "rows": content},
    )
    write_between(DOCUMENT, MARK, f"{in_words(where)}\n\n{text}")


if __name__ == "__main__":
    main()
