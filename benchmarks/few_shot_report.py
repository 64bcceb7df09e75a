"""What the stored runs of the few-shot benchmark say: tables in Markdown, and what was reached.

A run is what `few_shot.run` returns. A difference is between two methods on the same samples and
test rows, in points of accuracy, with a 95% interval by Student's t.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from few_shot_data import CURVE_SHOTS, TASKS
from few_shot_methods import BEFORE, METHODS, OWN, RIVALS, RIVALS_ON_MPNET, planned
from reporting import digits, table
from scipy.stats import t as student

Run = dict[str, Any]
BINS = 15
# Other work was on the machine where more processes than this were ready to run.
IDLE_LOAD = 1.5


def report(runs: Sequence[Run], times: Sequence[Run]) -> str:
    """All tables of finished runs, and of those that were timed alone."""
    main = [run for run in runs if run["shots"] not in CURVE_SHOTS]
    curve = [run for run in runs if run not in main]
    parts = {
        "Accuracy": accuracy_table(main),
        "Differences": difference_table(main),
        "Calibration": calibration_table(main),
        "Seconds and bytes": times_table(times),
        "More examples": curve_table(curve),
        "What is reached": reach_table(main, times),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items() if text)


# -- accuracy --------------------------------------------------------------------------------------


def accuracy_table(runs: Sequence[Run]) -> str:
    """Mean accuracy by task, examples a class and method, and over tasks where all are there."""
    methods = _methods_of(runs)
    rows = []
    by_task: dict[str, dict[str, list[float]]] = {method: defaultdict(list) for method in methods}
    for task in TASKS:
        for shots in sorted({run["shots"] for run in runs if run["task"] == task}):
            cells = []
            for method in methods:
                found = _accuracies(runs, method, task, shots)
                if found:
                    by_task[method][task].append(statistics.mean(found))
                cells.append(_mean_of_five(found))
            rows.append([task, f"{shots or 'folds'}", *cells])
    means = [
        f"{statistics.mean(map(statistics.mean, by_task[method].values())):.1f}"
        + (" so far" if _missing(runs, (method,), TASKS) else "")
        if len(by_task[method]) == len(TASKS)
        else ""
        for method in methods
    ]
    return table(["task", "a class", *methods], [*rows, ["mean over tasks", "", *means]])


def _mean_of_five(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return ""
    counted = "" if len(accuracies) == 5 else f" ({len(accuracies)})"
    return f"{statistics.mean(accuracies):.1f}{counted}"


def _accuracies(runs: Iterable[Run], method: str, task: str, shots: int) -> list[float]:
    key = (method, task, shots)
    return [100 * r["accuracy"] for r in runs if (r["method"], r["task"], r["shots"]) == key]


def _methods_of(runs: Iterable[Run]) -> list[str]:
    there = {run["method"] for run in runs}
    return [method for method in METHODS if method in there]


# -- differences -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """By how many points a method is ahead of another, and how sure that is."""

    mean: float
    variance: float  # of the mean
    freedom: float  # degrees
    tasks: tuple[str, ...]

    @property
    def half(self) -> float:
        """Half the width of the 95% interval."""
        return float(student.ppf(0.975, self.freedom)) * math.sqrt(self.variance)

    def reaches(self, aim: float) -> bool:
        """Whether the interval does."""
        return self.mean + self.half >= aim

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}"


def difference_on(task: str, runs: Sequence[Run], own: str, rival: str) -> Difference | None:
    """On the samples of a task that both have; `None` if there are none.

    Samples of one seed count as one. Where there is one seed alone, the interval is over the test
    rows: it knows nothing of other samples.
    """
    of_task = [run for run in runs if run["task"] == task]
    of = {
        method: {(r["seed"], r["shots"]): r for r in of_task if r["method"] == method}
        for method in (own, rival)
    }
    by_seed: dict[int, list[list[int]]] = defaultdict(list)
    for key in sorted(of[own].keys() & of[rival].keys()):
        pair = zip(of[own][key]["right"], of[rival][key]["right"], strict=True)
        by_seed[key[0]].append([100 * (int(a) - int(b)) for a, b in pair])
    if not by_seed:
        return None
    if len(by_seed) > 1:
        parts = [statistics.mean(map(statistics.mean, rows)) for rows in by_seed.values()]
    else:
        parts = [float(x) for x in itertools.chain(*next(iter(by_seed.values())))]
    variance = statistics.variance(parts) / len(parts)
    return Difference(statistics.mean(parts), variance, len(parts) - 1, (task,))


def difference(runs: Sequence[Run], own: str, rival: str) -> Difference | None:
    """The mean over tasks, each of the same weight; the samples of different tasks are unrelated.

    The degrees of freedom are Welch's and Satterthwaite's.
    """
    by_task: dict[str, list[Run]] = {task: [] for task in TASKS}
    for run in runs:
        by_task[run["task"]].append(run)
    all_tasks = [difference_on(task, of, own, rival) for task, of in by_task.items()]
    found = [each for each in all_tasks if each is not None]
    if not found:
        return None
    variance = sum(each.variance for each in found)
    spread = sum(each.variance**2 / each.freedom for each in found)
    return Difference(
        statistics.mean(each.mean for each in found),
        variance / len(found) ** 2,
        variance**2 / spread if spread else 1.0,
        tuple(each.tasks[0] for each in found),
    )


def hardest(
    rivals: Sequence[str], differ: Callable[[str], Difference | None]
) -> tuple[str, Difference] | None:
    """The rival that a method is least ahead of, and by how much."""
    found = {rival: differ(rival) for rival in rivals}
    there = [(rival, each) for rival, each in found.items() if each is not None]
    return min(there, key=lambda pair: pair[1].mean, default=None)


def difference_table(runs: Sequence[Run]) -> str:
    """Each of this project's methods against each rival, in the mean over the tasks of both."""
    rows = []
    for own in OWN:
        for rival in (*RIVALS, *RIVALS_ON_MPNET):
            found = difference(runs, own, rival)
            if found is None:
                continue
            without = [task for task in TASKS if task not in found.tasks]
            each = [difference_on(task, runs, own, rival) for task in TASKS]
            rows.append([own, rival, str(found), *(str(x or "") for x in each), ", ".join(without)])
    return table(["method", "against", "mean", *TASKS, "without"], rows) if rows else ""


# -- calibration -----------------------------------------------------------------------------------


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """The expected one: bins of equal mass by confidence, the mean distance to accuracy."""
    sure, correct = np.asarray(confidence, float), np.asarray(right, float)
    parts = np.array_split(np.argsort(sure, kind="stable"), min(BINS, len(sure)))
    distances = [len(p) * abs(sure[p].mean() - correct[p].mean()) for p in parts]
    return float(sum(distances) / len(sure))


def error_by_chance(confidence: Sequence[float]) -> float:
    """What a classifier of these confidences shows if each is exact: few rows are never even."""
    sure, generator = np.asarray(confidence, float), np.random.default_rng(0)
    drawn = [generator.random(len(sure)) < sure for _ in range(200)]
    return statistics.mean(calibration_error(confidence, right.tolist()) for right in drawn)


def calibration_of(runs: Iterable[Run], method: str, task: str) -> tuple[float, float] | None:
    """The error on a task, and what would be by chance: rows pooled over seeds."""
    by_shots: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        if (run["method"], run["task"]) == (method, task) and "confidence" in run:
            by_shots[run["shots"]].append(run)
    if not by_shots:
        return None
    found = []
    for pooled in by_shots.values():
        confidence = [each / 1000 for run in pooled for each in run["confidence"]]
        right = [each == "1" for run in pooled for each in run["right"]]
        found.append((calibration_error(confidence, right), error_by_chance(confidence)))
    return statistics.mean(e for e, _ in found), statistics.mean(c for _, c in found)


def calibration_table(runs: Sequence[Run]) -> str:
    """The expected calibration error by task, and in brackets what chance alone would make it."""
    rows = []
    for method in _methods_of(runs):
        found = [calibration_of(runs, method, task) for task in TASKS]
        there = [each for each in found if each]
        if there:
            cells = [f"{each[0]:.3f} ({each[1]:.3f})" if each else "" for each in found]
            mean = f"{statistics.mean(e for e, _ in there):.3f}"
            chance = f"{statistics.mean(c for _, c in there):.3f}"
            rows.append([method, *cells, f"{mean} ({chance})"])
    return table(["method", *TASKS, "mean"], rows) if rows else ""


# -- seconds and bytes -----------------------------------------------------------------------------


def ratio(runs: Sequence[Run], own: str, rival: str, what: str) -> float | None:
    """The median over the samples that both have of one's figure by the other's."""
    of = {
        method: {(r["task"], r["shots"], r["seed"]): r[what] for r in runs if r["method"] == method}
        for method in (own, rival)
    }
    both = of[own].keys() & of[rival].keys()
    return statistics.median(of[own][key] / of[rival][key] for key in both) if both else None


def times_table(times: Sequence[Run]) -> str:
    """Medians of the runs that had the machine to themselves."""
    rows = []
    for method in _methods_of(times):
        for task in TASKS:
            runs = [r for r in times if (r["method"], r["task"]) == (method, task)]
            if runs:
                names = ("train_seconds", "predict_seconds", "stored_bytes")
                figures = [digits(statistics.median(r[name] for r in runs)) for name in names]
                load = max(r["load"] for r in runs)
                busy = "" if load < IDLE_LOAD else f"beside other work (load {load:.1f})"
                rows.append([task, method, f"{len(runs)}", *figures, busy])
    header = ["task", "method", "runs", "seconds to train", "to predict 1,000", "bytes", ""]
    return table(header, rows) if rows else ""


def curve_table(runs: Sequence[Run]) -> str:
    """Accuracy and seconds to train, by task and examples a class."""
    methods = _methods_of(runs)
    rows = []
    for task in TASKS:
        for shots in CURVE_SHOTS:
            cells = []
            for method in methods:
                key = (method, task, shots)
                found = [r for r in runs if (r["method"], r["task"], r["shots"]) == key]
                cells.append(", ".join(map(_curve_cell, found)))
            if any(cells):
                rows.append([task, f"{shots}", *cells])
    return table(["task", "a class", *methods], rows) if rows else ""


def _curve_cell(run: Run) -> str:
    stopped = ", stopped" if run.get("was_stopped") else ""
    return f"{100 * run['accuracy']:.1f} ({run['train_seconds']:.0f} s{stopped})"


# -- what is reached -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """One aim and what was found; `missing` are runs that it still needs."""

    what: str
    aim: str
    found: str
    holds: bool | None
    missing: int = 0

    @property
    def in_words(self) -> str:
        """Whether it is reached."""
        if self.holds is None:
            return "no runs"
        said = "yes" if self.holds else "no"
        return f"{said}, so far: {self.missing} runs are missing" if self.missing else said


def reaches(runs: Sequence[Run], times: Sequence[Run]) -> list[Reach]:
    """The aims of the benchmark, in their order."""
    found = []
    for own, rivals, ones in (
        ("auto", RIVALS, "rivals on MiniLM or smaller"),
        ("auto-mpnet", RIVALS_ON_MPNET, "rivals on mpnet"),
    ):
        best = hardest(rivals, lambda rival, own=own: difference(runs, own, rival))
        what = f"{own}, mean over tasks, against the best single one of {ones}"
        found.append(_ahead(what, best, 5.0, _missing(runs, (own, *rivals), TASKS)))
        for task in TASKS:
            best = hardest(
                rivals, lambda rival, own=own, task=task: difference_on(task, runs, own, rival)
            )
            missing = _missing(runs, (own, *rivals), [task])
            found.append(_ahead(f"{own} on {task}, against the best there", best, -1.0, missing))
    for own, rival, points in (
        ("encoder", "setfit-minilm", 0.0),
        ("language-model", BEFORE, -0.5),
    ):
        paired = difference(runs, own, rival)
        missing = _missing(runs, (own, rival), TASKS)
        best = (rival, paired) if paired else None
        found.append(_ahead(f"{own}, mean over tasks, against {rival}", best, points, missing))
    for own, rival, what, words, aim in (
        ("encoder", "setfit-minilm", "train_seconds", "time to train", 1 / 8),
        ("encoder", "setfit-minilm", "stored_bytes", "bytes stored", 1 / 100),
        ("encoder", "setfit-minilm", "predict_seconds", "time to predict 1,000 texts", 1.05),
        ("language-model", BEFORE, "train_seconds", "time to train", 1 / 2),
        ("auto", BEFORE, "train_seconds", "time to train, choosing included", 1.0),
    ):
        found.append(_smaller(times, own, rival, what, f"{own} by {rival}: {words}", aim))
    errors = [calibration_of(runs, "auto", task) for task in TASKS]
    there = [each for each in errors if each]
    if there:
        error, chance = (statistics.mean(each[i] for each in there) for i in (0, 1))
        said, holds = f"{error:.3f}, of which by chance {chance:.3f}", error <= 0.06
    else:
        said, holds = "", None
    missing = _missing(runs, ("auto",), TASKS)
    found.append(Reach("auto, expected calibration error", "≤ 0.06", said, holds, missing))
    tickets = _accuracies(runs, "auto", "tickets", 8)
    mean = statistics.mean(tickets) if tickets else None
    said, holds = ("", None) if mean is None else (f"{mean:.1f}", mean >= 84)
    missing = _missing(runs, ("auto",), ["tickets"])
    return [*found, Reach("auto on the tickets, 8 a class", "≥ 84", said, holds, missing)]


def reach_table(runs: Sequence[Run], times: Sequence[Run]) -> str:
    """Which aims are reached, which are not, and which lack runs."""
    rows = [[each.what, each.aim, each.found, each.in_words] for each in reaches(runs, times)]
    return table(["", "reach", "found", "reached"], rows)


def _ahead(what: str, best: tuple[str, Difference] | None, aim: float, missing: int) -> Reach:
    if best is None:
        return Reach(what, f"≥ {aim:+.1f}", "", None, missing)
    rival, found = best
    return Reach(what, f"≥ {aim:+.1f}", f"{found} ({rival})", found.reaches(aim), missing)


def _smaller(
    times: Sequence[Run], own: str, rival: str, figure: str, what: str, aim: float
) -> Reach:
    found = ratio(times, own, rival, figure)
    said = f"≤ {aim:g}" if aim >= 1 else f"≤ 1/{1 / aim:.0f}"
    if found is None:
        return Reach(what, said, "", None)
    reached = f"{found:.2f}" if found > 0.67 else f"1/{1 / found:.1f}"
    busy = any(r["load"] >= IDLE_LOAD for r in times if r["method"] in (own, rival))
    reached += " (beside other work)" if busy else ""
    return Reach(what, said, reached, found <= aim)


def _missing(runs: Sequence[Run], methods: Sequence[str], tasks: Iterable[str]) -> int:
    names = ("method", "task", "shots", "seed")
    there = {tuple(run[name] for name in names) for run in runs}
    keys = [key for method in methods for task in tasks for key in planned(method, task)]
    return sum(tuple(key[name] for name in names) not in there for key in keys)
