"""How good an adapter is, as `ia3 fit` and `ia3 evaluate` find out and tell it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from warnings import catch_warnings

from ..base.processes import processes
from ..base.progress import working
from ..errors import IA3Error, naming
from ..files.saved import EVALUATION_NAME, FIT_REPORT_NAME, weights_file
from ..files.tables import Row, fields_of
from ..report.console import counting_bar, training_bar
from .options import reason, warn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..classify.estimator import FewShotClassifier
    from ..classify.measure import Measured

NOT_MEASURED = (
    "the trained adapter was not measured: --test FILE measures it on other labelled texts, "
    "--cross-validate by 5 more trainings"
)


@dataclass(frozen=True)
class Labelled:
    """Labelled texts from a source: `places` says where in it each is from."""

    source: str
    texts: list[dict[str, Any]]
    labels: list[Any]
    places: list[str]

    @classmethod
    def of(
        cls, source: str, rows: Sequence[Row], text: Sequence[str], field: str, labels: list[Any]
    ) -> Self:
        """The texts in these columns of rows; of one column alone, in this field."""
        return cls(source, fields_of(rows, text, field), labels, [row.where for row in rows])


def answers_to(
    classifier: FewShotClassifier, examples: Sequence[Mapping[str, Any]], rows: Sequence[Row]
) -> NDArray[np.float64]:
    """The probabilities of each row's classes, `[rows, classes]`, on every process of the job.

    Each process asks for its part of the examples, which are the rows as a classifier reads them.

    Raises:
        IA3Error: the processes have different adapters, or as of `predict_proba`.
    """
    import numpy as np

    from ..core.spread import any_spread

    together = processes()
    if together.count > 1:
        files = classifier.to_files()
        digests = {name: sha256(content).hexdigest() for name, content in files.items()}
        together.check_same({"the adapter's files": digests})
    # Passes through a spread model are made by all processes at once.
    shared = together.count > 1 and not any_spread(classifier.base.model)
    places = together.own(range(len(rows))) if shared else range(len(rows))
    asked = [examples[place] for place in places]
    begin = f"from {rows[places[0]].where} on" if shared and places else ""
    with counting_bar("scoring", len(asked) * len(classifier.templates_)) as progress:
        # An error counts the texts that this process asked.
        with naming(begin) if begin else nullcontext():
            own = classifier.predict_proba(asked, progress=progress)
        return np.concatenate(together.gather(own)) if shared else own


def measure(
    classifier: FewShotClassifier,
    learned: Labelled,
    tested: Labelled | None,
    *,
    cross_validate: bool,
) -> tuple[Measured | None, list[str]]:
    """What can be said of a classifier that was just fitted, and where the texts are from.

    It is asked the texts of a test file, or trained again without some of its own; else there is
    what was seen before training, if anything was. An adapter that is there is worth more than its
    figures: what fails here is a warning.
    """
    from ..classify.measure import (
        has_a_fifth,
        measured_by_training,
        measured_on,
        new_among,
        seen_before_training,
        without_training,
    )

    texts, labels = learned.texts, learned.labels
    # The training has given the same warnings.
    with catch_warnings(action="ignore"):
        try:
            if tested is not None:
                new = new_among(tested.texts, texts)
                if not new:
                    raise IA3Error(f"each text of {tested.source} was trained on")
                known = len(tested.texts) - len(new)
                how = f"on {tested.source}" + (f", but for {known} trained on" if known else "")
                frozen = without_training(classifier).fit(texts, labels)
                with counting_bar(
                    "measuring", len(new) * 2 * len(classifier.templates_)
                ) as progress:
                    measured = measured_on(
                        classifier,
                        [tested.texts[i] for i in new],
                        [tested.labels[i] for i in new],
                        how,
                        rows=new,
                        frozen=frozen,
                        progress=progress,
                    )
                return measured, tested.places
            named = classifier.model != "auto"
            if cross_validate or (named and has_a_fifth(labels)):
                most = 5 if cross_validate else 1
                again = measured_by_training(
                    classifier,
                    *(texts, labels),
                    most=most,
                    shown=lambda number, of: training_bar(
                        classifier.steps, f"measuring, training {number} of {of}"
                    ),
                )
                if again is not None:
                    return again, learned.places
                raise IA3Error(
                    "no text can be held out, as none has another one of its class: label more, or "
                    "give --test FILE"
                )
        except IA3Error as error:
            warn(f"the adapter was not measured: {reason(error)}")
    return seen_before_training(classifier, texts, labels), learned.places


def seen_before(classifier: FewShotClassifier) -> list[tuple[str, str]]:
    """For a page: what was seen of each engine beforehand."""
    return [
        (f"seen of the {each.engine} beforehand", str(each).removeprefix(f"{each.engine} "))
        for each in classifier.candidates_
    ]


def as_values(measured: Measured, places: Sequence[str]) -> dict[str, Any]:
    """For JSON: what was measured, with the place of each text that is wrong."""
    values = measured.to_json()
    for mistake in values["mistakes"]:
        mistake["where"] = places[mistake["row"]]
    return values


def status_of(adapter: Path) -> os.stat_result | None:
    """The status of an adapter's values; `None` where there are none."""
    try:
        return weights_file(adapter).stat()
    except OSError:
        return None  # what reads them says what is missing


def leave_fit_report(
    out: Path,
    values: os.stat_result | None,
    size: int,
    classifier: FewShotClassifier,
    learned: Labelled,
    measured: Measured | None,
    places: Sequence[str],
    seconds: float,
) -> Path | None:
    """Write the page of a training beside the values that were saved; its path, if it could be.

    `values` is their `status_of`, and `size` how many bytes they have with the head.
    """
    from ..report.measured_report import fit_report

    classes = len(classifier.classes_)
    with working("drawing the report"):
        page = fit_report(
            title=f"{out.absolute().name}: a classifier of {classes} classes",
            facts=[
                ("model", classifier.model_),
                *seen_before(classifier),
                ("texts to learn from", f"{len(learned.texts):,}"),
                ("training steps", str(len(classifier.history_))),
                ("adapter", f"{size / 1024:.0f} KiB"),
                ("seconds to train", f"{seconds:.0f}"),
            ],
            measured=measured,
            places=places,
            history=classifier.history_,
            vectors=classifier.adapter_.vectors,
        )
    return _leave(out, FIT_REPORT_NAME, page, values)


def leave_evaluation(
    adapter: Path,
    values: os.stat_result | None,
    classifier: FewShotClassifier,
    source: str,
    measured: Measured,
    places: Sequence[str],
) -> Path | None:
    """Write the page beside the values that were evaluated; its path, if it could be.

    `values` is their `status_of` from before they were read.
    """
    from ..report.measured_report import evaluation_report

    with working("drawing the report"):
        page = evaluation_report(
            title=f"{adapter.absolute().name}, asked {measured.texts:,} texts",
            facts=[
                ("texts from", source),
                ("model", classifier.model_),
                *seen_before(classifier),
            ],
            measured=measured,
            places=places,
        )
    return _leave(adapter, EVALUATION_NAME, page, values)


def _leave(folder: Path, name: str, page: str, values: os.stat_result | None) -> Path | None:
    """Write a page beside values of this status, and of no others; its path, if it could be."""
    from ..adapter.files import write_report

    try:
        if values is not None and write_report(folder, name, page, values):
            return folder / name
        problem = "another program has saved there meanwhile"
    except OSError as error:
        problem = reason(error)
    # What was found out is on the screen.
    warn(f"no report is written: {problem}")
    return None
