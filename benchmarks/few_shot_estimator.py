"""`FewShotClassifier` on one sample, by whichever source folder PYTHONPATH names.

    python few_shot_estimator.py INPUT OUTPUT

Both files are JSON. Another build of this project runs by this program too. Of several classifiers
the mean probabilities count.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the sample, write what was measured; importing is not timed."""
    given = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    import torch

    import ia3

    source = Path(ia3.__file__).resolve().parent.parent
    if source != Path(given["source"]).resolve():
        sys.exit(f"ia3 is imported from {source}, not from {given['source']}")
    classifiers = [ia3.FewShotClassifier(**arguments) for arguments in given["classifiers"]]
    loaded = [base for classifier in classifiers for base in bases_of(classifier)]
    started = time.perf_counter()
    for classifier in classifiers:
        classifier.fit(given["texts"], given["labels"])
    trained = time.perf_counter()
    probabilities = sum(each.predict_proba(given["test_texts"]) for each in classifiers)
    probabilities = probabilities / len(classifiers)
    predicted_at = time.perf_counter()
    best = probabilities.argmax(axis=1)
    result = {
        "predicted": [str(label) for label in classifiers[0].classes_[best]],
        "confidence": [round(1000 * float(p)) for p in probabilities.max(axis=1)],
        "train_seconds": trained - started,
        "predict_seconds": predicted_at - trained,
        "threads": torch.get_num_threads(),
        "models": len(loaded),
        "stored_bytes": sum(map(stored_bytes, classifiers)),
    }
    Path(sys.argv[2]).write_text(json.dumps(result), "utf-8")


def bases_of(classifier: Any) -> list[Any]:
    """The models that a fit may take, loaded; they stay so while something refers to them."""
    if classifier.model != "auto":
        return [classifier.base]
    from ia3 import load_base_model
    from ia3.base.encoders import load_encoder

    return [load_encoder(classifier.encoder), load_base_model(classifier.language_model)]


def stored_bytes(classifier: Any) -> int:
    """Of all files that a classifier is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        classifier.save(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
