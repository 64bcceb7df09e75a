"""The methods of the few-shot benchmark: each learns from texts and label names alone.

No method gets a template, words for its labels, or a setting that fits a task.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from few_shot_data import FOLDS, TASKS
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline, make_union

from ia3.experiments.setfit import SetFit, run_setfit

HERE = Path(__file__).parent
SETFIT_PYTHON = HERE.parent / ".venv-setfit" / "bin" / "python"
SOURCE = HERE.parent / "src"
ENCODER, LANGUAGE_MODEL = "all-minilm-l6-v2", "smollm2-135m-instruct"
# This project's methods, and the arguments of the classifiers that they are; mpnet's folder is an
# option. Nobody can choose the mean of both: it tells what choosing leaves.
OWN: dict[str, list[dict[str, Any]]] = {
    "auto": [{"model": "auto"}],
    "auto-mpnet": [{"model": "auto"}],
    "encoder": [{"model": ENCODER}],
    "language-model": [{"model": LANGUAGE_MODEL}],
    "mean-of-both": [{"model": ENCODER}, {"model": LANGUAGE_MODEL}],
}
BEFORE = "tfew-before"
RIVALS = ("tfidf", "frozen-minilm", "setfit-minilm", BEFORE)
RIVALS_ON_MPNET = ("frozen-mpnet", "setfit-mpnet")
METHODS = (*RIVALS, *RIVALS_ON_MPNET, *OWN)
# All 77 intents take these hours: one sample of 8 a class.
SLOW = ("setfit-minilm", "setfit-mpnet", BEFORE, "language-model", "mean-of-both")
SETFIT_MOST_SECONDS = 30 * 60.0


@dataclass(frozen=True)
class Places:
    """Where the methods that need something else find it."""

    mpnet: Path | None = None  # a folder of sentence-transformers
    before: Path | None = None  # another build's source folder


def planned(method: str, task: str) -> list[dict[str, Any]]:
    """The keys of a method's runs on a task."""
    few = task == "banking77" and method in SLOW
    shots, seeds = ((8,), range(1)) if few else (TASKS[task].shots, range(FOLDS))
    return [
        {"method": method, "task": task, "shots": number, "seed": seed}
        for seed in seeds
        for number in shots
    ]


def is_possible(method: str, places: Places) -> bool:
    """Whether what the method needs was named."""
    if method.endswith("-mpnet"):
        return places.mpnet is not None
    return method != BEFORE or places.before is not None


def run_method(
    method: str,
    texts: Sequence[str],
    labels: Sequence[str],
    test_texts: Sequence[str],
    seed: int,
    places: Places,
    *,
    stops: bool = False,
) -> dict[str, Any]:
    """What a method answers, and what that takes.

    Args:
        method: one of `METHODS`.
        texts: to train on.
        labels: one a text.
        test_texts: to predict.
        seed: of whatever the method draws.
        places: of what it needs.
        stops: end SetFit's training after 30 minutes, whatever it has reached.

    Returns:
        `predicted` labels `[test texts]`, `train_seconds`, `predict_seconds`, `threads`,
        `stored_bytes`; of this project's classifiers `confidence` too: the probability of each
        predicted label in thousandths; of SetFit `was_stopped` if it was.
    """
    sample = {"texts": texts, "labels": labels, "test_texts": test_texts}
    model = str(places.mpnet) if method.endswith("-mpnet") else None
    if method == "tfidf":
        return _tfidf(texts, labels, test_texts, seed)
    if method.startswith("setfit"):
        most_seconds = SETFIT_MOST_SECONDS if stops else None
        return _setfit(sample, seed, SetFit(SETFIT_PYTHON, model, most_seconds))
    if method.startswith("frozen"):
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        program, given = HERE / "few_shot_frozen.py", {"model": model, **sample}
        return _run([str(SETFIT_PYTHON), "-I"], program, given, environment)
    common: dict[str, Any] = {"seed": seed}
    if method != BEFORE:
        common["threads"] = 1
    if method == "auto-mpnet":
        common["encoder"] = model
    classifiers = [each | common for each in OWN["language-model" if method == BEFORE else method]]
    source = str(places.before if method == BEFORE else SOURCE)
    given = {"classifiers": classifiers, "source": source, **sample}
    environment = os.environ | {"PYTHONPATH": source}
    return _run([sys.executable], HERE / "few_shot_estimator.py", given, environment)


def _setfit(sample: Mapping[str, Sequence[str]], seed: int, setfit: SetFit) -> dict[str, Any]:
    found = run_setfit(setfit, **sample, seed=seed, use_gpu=False)
    return {
        "predicted": found.predicted,
        "train_seconds": found.train_seconds,
        "predict_seconds": found.answer_seconds * len(found.predicted),
        "threads": torch.get_num_threads(),
        "stored_bytes": found.stored_bytes,
        **({"was_stopped": True} if found.was_stopped else {}),
    }


def _tfidf(
    texts: Sequence[str], labels: Sequence[str], test_texts: Sequence[str], seed: int
) -> dict[str, Any]:
    """Words and parts of words, the regularisation chosen by cross-validation."""
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2)), TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5))
    )
    pipeline = make_pipeline(features, LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(min(5, *Counter(labels).values()), shuffle=True, random_state=seed)
    regularisation = {"logisticregression__C": [0.1, 1.0, 10.0, 100.0, 1000.0]}
    search = GridSearchCV(pipeline, regularisation, cv=folds)
    started = time.perf_counter()
    search.fit(texts, labels)
    trained = time.perf_counter()
    predicted = search.predict(test_texts).tolist()
    return {
        "predicted": predicted,
        "train_seconds": trained - started,
        "predict_seconds": time.perf_counter() - trained,
        "threads": torch.get_num_threads(),
        "stored_bytes": len(pickle.dumps(search.best_estimator_)),
    }


def _run(
    python: Sequence[str], program: Path, given: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """A program of `INPUT OUTPUT`, both JSON, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        read, written = Path(folder) / "given.json", Path(folder) / "result.json"
        read.write_text(json.dumps(given), "utf-8")
        command = [*python, str(program), str(read), str(written)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{program.name}: {ended.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(written.read_text("utf-8"))
        return result
