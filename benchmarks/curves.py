"""How costs grow with tokens, layers, adapters, choices and prompts: pictures and JSON.

    python benchmarks/curves.py [--curves CURVE ...] [--repeats 5]

Time and memory are those of a training step of a small LLaMA of random weights (but for scoring,
which is SmolLM2-135M), float32, on the CPU; what shares a panel takes turns. A run of all curves
writes `benchmarks/results/curves.json`, `docs/pictures/curves-*.png` and the table in
`docs/benchmarks.md`; with `--curves` it only prints.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Handling,
    batch_of,
    contestants,
    forward_pass,
    llama,
    on_ia3,
    on_peft,
    same_weights,
    saved_bytes,
    take_turns,
    training_step,
)
from reporting import (
    DOCUMENT,
    PICTURES,
    RESULTS,
    circumstances,
    digits,
    in_words,
    table,
    write_between,
    write_json,
)
from torch import nn

MARK = "written by benchmarks/curves.py"
ROW = 64
ROWS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
LAYERS = (2, 4, 8, 16, 32, 64)
ADAPTERS = (1, 10, 100, 1000)
# PEFT takes a time for each adapter that grows with those that are there: minutes to 1,000.
MOST_PEFT_ADAPTERS = 100
CHOICES = (1, 4, 16, 77, 200)
CHOICE_TOKENS = 3
PROMPTS = (16, 64, 256, 1024)
# Scoring with choices expanded takes minutes beyond so many tokens.
MOST_EXPANDED = 5000
# A cost that grows by more than this power of its cause, at the end of a curve, bends upward.
UPWARD = 1.1
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
COLOURS = {
    "frozen": "#6b6b6b",
    "ia3": "#d55e00",
    "ia3 fused": "#cc79a7",
    "PEFT": "#0072b2",
    "expanded": "#0072b2",
}


@dataclass
class Curve:
    """One panel.

    Attributes:
        name: of the picture it is in.
        cause: what is on the horizontal axis.
        cost: what is on the vertical one, with its unit.
        points: contestant -> (cause, cost), rising.
    """

    name: str
    cause: str
    cost: str
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, contestant: str, cause: float, cost: float) -> None:
        """Put a point at the end of a contestant's line."""
        self.points.setdefault(contestant, []).append((cause, cost))

    def last_power(self, contestant: str) -> float:
        """p where the cost grows as causeᵖ between the last two points; NaN with one point."""
        if len(self.points[contestant]) < 2:
            return math.nan
        (x0, y0), (x1, y1) = self.points[contestant][-2:]
        return math.log(y1 / y0) / math.log(x1 / x0)


def small(layers: int = 8) -> Any:
    """The model of the training curves."""
    return llama(**SHAPE, layers=layers)


def with_adapters(frozen: Any) -> dict[str, Any]:
    """The frozen model, and the same with adapters."""
    return {"frozen": frozen, **contestants(frozen)}


def training_costs(
    models: dict[str, nn.Module], batch: tuple[int, int], repeats: int
) -> dict[str, tuple[float, float]]:
    """Contestant -> (milliseconds of a training step, MiB saved for the backward pass)."""
    embeddings, labels = batch_of(models["frozen"], *batch)
    timings = take_turns(
        {name: training_step(model, embeddings, labels) for name, model in models.items()}, repeats
    )
    return {
        name: (
            1e3 * timings.median(name),
            saved_bytes(model, forward_pass(model, embeddings)) / 2**20,
        )
        for name, model in models.items()
    }


# -- curves ----------------------------------------------------------------------------------------


def _training_curves(
    name: str, cause: str, costs: Iterable[tuple[float, dict[str, tuple[float, float]]]]
) -> list[Curve]:
    seconds = Curve(name, cause, "training step, ms")
    memory = Curve(name, cause, "saved for backward, MiB")
    for at, of_each in costs:
        for contestant, (milliseconds, mebibytes) in of_each.items():
            seconds.add(contestant, at, milliseconds)
            memory.add(contestant, at, mebibytes)
    return [seconds, memory]


def token_curves(repeats: int) -> list[Curve]:
    """Tokens of a batch: more rows, and longer ones."""
    models = with_adapters(small())
    rows = ((ROW * n, training_costs(models, (n, ROW), repeats)) for n in ROWS)
    length = ((n, training_costs(models, (1, n), repeats)) for n in LENGTHS)
    return [
        *_training_curves("tokens", f"tokens, in rows of {ROW}", rows),
        *_training_curves("tokens", "tokens, in one row", length),
    ]


def layer_curves(repeats: int) -> list[Curve]:
    """Layers of the model."""
    costs = ((n, training_costs(with_adapters(small(n)), (4, ROW), repeats)) for n in LAYERS)
    return _training_curves("layers", "layers", costs)


def adapter_curves(repeats: int) -> list[Curve]:
    """Adapters loaded, one of them active."""
    frozen = small()
    loading = Curve("adapters", "adapters on the model", "load one more, ms")
    switching = Curve("adapters", "adapters on the model", "switch, ms")
    costs = []
    with tempfile.TemporaryDirectory() as place:
        each = {
            "ia3": Handling(on_ia3(same_weights(frozen)), Path(place, "ia3")),
            "PEFT": Handling(on_peft(same_weights(frozen)), Path(place, "PEFT")),
        }
        for count in ADAPTERS:
            if count > MOST_PEFT_ADAPTERS:
                each.pop("PEFT", None)
            for one in each.values():
                one.fill(count)
                one.model.set_adapter("default")
            models = {"frozen": frozen, **{name: one.model for name, one in each.items()}}
            costs.append((count, training_costs(models, (4, ROW), repeats)))
            deleting = {name: one.delete for name, one in each.items()}
            loads = take_turns({n: one.load for n, one in each.items()}, repeats, after=deleting)
            # Switching takes two.
            for one in each.values():
                one.fill(2)
            switches = take_turns({name: one.switch for name, one in each.items()}, 4 * repeats)
            for name in each:
                loading.add(name, count, 1e3 * loads.median(name))
                switching.add(name, count, 1e3 * switches.median(name))
    return [*_training_curves("adapters", "adapters on the model", costs), loading, switching]


def scoring_curves(repeats: int) -> list[Curve]:
    """Choices of an example, and tokens of its prompt."""
    import ia3
    from ia3.base.embedded import EMBEDDED_MODEL

    loaded = ia3.load_base_model(EMBEDDED_MODEL, device="cpu", dtype="float32")
    return scoring_curves_of(loaded, repeats)


def scoring_curves_of(loaded: Any, repeats: int) -> list[Curve]:
    """The same of a model (an `ia3.base.loading.BaseModel`), which stays as it is."""
    import ia3
    from ia3.tfew.prompts.encoding import EncodedExample
    from ia3.tfew.scoring.choices import token_scores
    from ia3.tfew.scoring.expanded import expanded_scores

    model = same_weights(loaded.model)
    on_ia3(model)
    base = ia3.load_base_model(model, tokenizer=loaded.tokenizer)

    def example(choices: int, prompt: int) -> Any:
        generator = torch.Generator().manual_seed(choices + prompt)
        length = prompt + choices * CHOICE_TOKENS
        ids = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
        start, rest = ids[:prompt].tolist(), ids[prompt:].view(choices, CHOICE_TOKENS).tolist()
        return EncodedExample(tuple(start), tuple(map(tuple, rest)))

    def curve(cause: str, cases: Sequence[tuple[int, int, int]]) -> Curve:
        result = Curve("scoring", cause, "scoring, ms")
        for at, choices, prompt in cases:
            one = [example(choices, prompt)]

            def scored(way: Callable[..., Any], one: list[Any] = one) -> None:
                with torch.no_grad():
                    way(base, one)

            steps = {"ia3": lambda scored=scored: scored(token_scores)}
            if choices * (prompt + CHOICE_TOKENS) <= MOST_EXPANDED:
                steps["expanded"] = lambda scored=scored: scored(expanded_scores)
            # The other one may take half a minute, and its first time is like all others.
            steps["ia3"]()
            timings = take_turns(steps, repeats, warm_up=0)
            for name in steps:
                result.add(name, at, 1e3 * timings.median(name))
        return result

    return [
        curve("choices, a prompt of 53 tokens", [(n, n, 53) for n in CHOICES]),
        curve("tokens of the prompt, 16 choices", [(n, 16, n) for n in PROMPTS]),
    ]


GROUPS: dict[str, Callable[[int], list[Curve]]] = {
    "tokens": token_curves,
    "layers": layer_curves,
    "adapters": adapter_curves,
    "scoring": scoring_curves,
}


# -- pictures and table ----------------------------------------------------------------------------


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Panels side by side, both axes logarithmic: a line of slope one is a cost in proportion."""
    from matplotlib.figure import Figure

    across = 2
    down = math.ceil(len(curves) / across)
    figure = Figure(figsize=(8, 2.9 * down), layout="constrained", dpi=100)
    for axes, curve in zip(figure.subplots(down, across, squeeze=False).flat, curves, strict=False):
        for contestant, points in curve.points.items():
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", ms=3.5, lw=1.3, color=COLOURS[contestant], label=contestant)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(curve.cause)
        axes.set_ylabel(curve.cost)
        axes.grid(color="#e2e2e2", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def in_markdown(curves: Sequence[Curve]) -> str:
    """Where each line begins and ends, and how it grows at its end."""
    lines = []
    for curve in curves:
        for contestant, points in curve.points.items():
            (x0, y0), (x1, y1) = points[0], points[-1]
            power = curve.last_power(contestant)
            lines.append(
                [
                    curve.cost,
                    curve.cause,
                    contestant,
                    f"{digits(y0)} at {x0:,g}",
                    f"{digits(y1)} at {x1:,g}",
                    f"{power:.2f}{' (upward)' if power > UPWARD else ''}",
                ]
            )
    return table(["cost", "against", "", "begins with", "ends with", "power at the end"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what a whole run has found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--curves", nargs="+", choices=GROUPS, default=list(GROUPS), help="which to draw"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="peft")
    curves: list[Curve] = []
    for name in given.curves:
        start = time.perf_counter()
        curves += GROUPS[name](given.repeats)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    text = in_markdown(curves)
    print(text)
    if set(given.curves) != set(GROUPS):
        return
    where = circumstances()
    content = {"where": where, "repeats": given.repeats, "curves": [asdict(c) for c in curves]}
    write_json(RESULTS / "curves.json", content)
    pictures = []
    for name in GROUPS:
        draw([c for c in curves if c.name == name], PICTURES / f"curves-{name}.png")
        pictures.append(f"![costs against {name}](pictures/curves-{name}.png)")
    write_between(DOCUMENT, MARK, "\n\n".join([in_words(where), *pictures, text]))


if __name__ == "__main__":
    main()
