"""`ia3 models`: which model for which machine, and what was measured of it or is cited."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..base.embedded import EMBEDDED_ENCODER, EMBEDDED_MODEL, INSTALL, embedded_place
from ..report.console import print_rows, results
from . import options
from .options import print_json

MEASURED = "measured: docs/benchmarks.md, one sample, one thread, beside other work"
LIU = "cited: Liu et al. 2022, arXiv 2205.05638, by T-Few"
TUNSTALL = "cited: Tunstall et al. 2022, arXiv 2209.11055, by SetFit"


@dataclass(frozen=True)
class Recommended:
    """A model for a size of machine.

    Attributes:
        machine: what it takes, at the least.
        model: its name.
        fit_with: what to say to `ia3 fit`.
        when: what it is for.
        accuracy: on what, and how many of a hundred are right.
        training: how long that took.
        source: where both figures are from.
    """

    machine: str
    model: str
    fit_with: str
    when: str
    accuracy: str
    training: str
    source: str


# From the smallest machine to the largest. Of what was measured a test has the figures.
RECOMMENDED = (
    Recommended(
        "1 processor, 2 GB",
        f"{EMBEDDED_ENCODER} (22M parameters)",
        f"--model {EMBEDDED_ENCODER}",
        "labels say what a text is about: topics, intents, queues",
        "16 examples a class: TREC 84.4, 16 of Banking77's intents 89.2",
        "17 s and 39 s",
        MEASURED,
    ),
    Recommended(
        "2 processors, 4 GB",
        f"{EMBEDDED_ENCODER} or {EMBEDDED_MODEL} (135M)",
        "--model auto, the default: it takes the one that promises more",
        "the default; sentiment and other labels whose words a language model knows",
        "16 examples a class: SST-2 83.2",
        "64 s",
        MEASURED,
    ),
    Recommended(
        "4 processors, 8 GB",
        "sentence-transformers/all-mpnet-base-v2 (110M)",
        "--encoder sentence-transformers/all-mpnet-base-v2",
        "a better encoder, some five times as slow",
        "50 examples a task: RAFT 66.9, of paraphrase-mpnet-base-v2",
        "not measured here",
        TUNSTALL,
    ),
    Recommended(
        "GPU of 48 GB",
        "bigscience/T0_3B (3B)",
        "--model bigscience/T0_3B --dtype bfloat16",
        "labels that take reading: inference, questions about the text",
        "32 to 70 examples a task: RTE 78.0, CB 87.5",
        "about an hour on an A6000",
        LIU,
    ),
    Recommended(
        "GPU of 80 GB",
        "bigscience/T0 (11B)",
        "--model bigscience/T0 --dtype bfloat16",
        "the same, with the best accuracy known of this method",
        "50 examples a task: RAFT 75.8, where people have 73.5",
        "about half an hour on an A100",
        LIU,
    ),
)


def models(as_json: options.Json = False) -> None:
    """Show which model is recommended for which machine, with expected accuracy and time.

    Each figure is measured or cited, and says where. Any other folder or hub id may be trained too.
    """
    missing = [name for name in (EMBEDDED_ENCODER, EMBEDDED_MODEL) if embedded_place(name) is None]
    if as_json:
        install = {name: INSTALL[name] for name in missing}
        print_json(recommended=list(map(asdict, RECOMMENDED)), not_installed=install)
        return
    header = ("machine", "model", "fit with", "when", "right of 100", "time to train", "source")
    rows = [[str(value) for value in asdict(each).values()] for each in RECOMMENDED]
    print_rows("", header, rows, names=len(header))
    for name in missing:
        _print(f"{name} is not installed: {INSTALL[name]}")
    _print("Others come from the hub when first named. What this machine has: ia3 doctor")


def _print(line: str) -> None:
    results.print(line, markup=False, highlight=False, soft_wrap=True)
