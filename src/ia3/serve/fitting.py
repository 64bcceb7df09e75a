"""A fit in a process of its own: `python -m ia3.serve.fitting`.

It reads one line of JSON, a `Task`, and writes lines of JSON: what it is doing, each step, that the
adapter is saved, and how good it is. It ends with the process that started it, whose end of the
pipe is closed then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..base.embedded import EMBEDDED_ENCODER, EMBEDDED_MODEL
from ..base.progress import shown_by
from ..errors import IA3Error

# Behind the server, which answers meanwhile.
_NICE = 5
# An encoder's fit takes seconds, a language model's a minute and more.
_TRAININGS = {"encoder": 5, "language-model": 1}


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    `model` is a base model's name, or `"auto"`, which chooses between `encoder` and
    `language_model`; `out` is the folder for the adapter.
    """

    texts: list[str]
    labels: list[str]
    model: str
    device: str
    encoder: str | None = None
    language_model: str | None = None
    out: str = ""


def main() -> None:
    """Read a task, and learn it."""
    # What libraries print goes to standard error.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        pipe.write(f"{json.dumps(event)}\n")
        pipe.flush()

    task = Task(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(_NICE)
    warnings.simplefilter("ignore")  # the server has looked at the texts
    try:
        _learn(task, tell)
    except (IA3Error, OSError) as error:
        tell(error=str(error))
    except KeyboardInterrupt:
        tell(error="the training was interrupted")


def _learn(task: Task, tell: Callable[..., None]) -> None:
    tell(doing="loading the model")
    from transformers.utils import logging

    from ..adapter.files import write_saved
    from ..classify.estimator import FewShotClassifier
    from ..classify.measure import measured_by_training
    from ..files.saved import WEIGHTS_NAME

    logging.disable_progress_bar()
    classifier = FewShotClassifier(
        task.model,
        device=task.device,
        encoder=task.encoder or EMBEDDED_ENCODER,
        language_model=task.language_model or EMBEDDED_MODEL,
    )

    @contextmanager
    def show(what: str, parts: int | None) -> Iterator[Callable[[int], None]]:
        tell(doing=what)
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            tell(doing=what, done=done, of=parts)

        yield count

    def on_step(step: Any) -> None:
        tell(step=step.step, steps=step.steps, loss=round(step.loss, 5))

    with shown_by(show):
        classifier.fit(task.texts, task.labels, on_step=on_step)
    found = classifier.to_files()
    write_saved(task.out, found)
    tell(
        saved=task.out,
        engine=classifier.engine_,
        model=classifier.model_,
        bytes=len(found[WEIGHTS_NAME]),
        candidates=[str(each) for each in classifier.candidates_],
    )

    @contextmanager
    def shown(number: int, of: int) -> Iterator[Any]:
        what = f"measuring, training {number} of {of}"
        tell(doing=what, done=number - 1, of=of)
        yield lambda step: tell(doing=what, done=number - 1 + step.step / step.steps, of=of)

    most = _TRAININGS[classifier.engine_]
    measured = measured_by_training(classifier, task.texts, task.labels, most=most, shown=shown)
    tell(measured=None if measured is None else measured.to_json())


def _end_with_parent() -> None:
    while sys.stdin.read(1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
