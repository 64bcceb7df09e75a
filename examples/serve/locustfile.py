"""Users of a server who classify, complete and chat, each time with another adapter.

    pip install locust
    locust -f examples/serve/locustfile.py --host http://127.0.0.1:8000 \
        --headless --users 32 --spawn-rate 32 --run-time 1m

`IA3_KEY` is the key to send, where the server asks for one. `benchmarks/serving.py` is the measured
load; this one is to look at a server of one's own.
"""

from __future__ import annotations

import os
import random

from locust import HttpUser, between, task
from locust.exception import StopUser

TEXTS = [
    "I was charged twice for the same order this month, please refund one of them.",
    "My parcel has been lost for two weeks and nobody answers.",
    "Your system declined my card, but the money is gone.",
    "The box arrived open and half of the order is missing.",
]


class Caller(HttpUser):
    """Classifies most of the time, and generates where there is a language model."""

    wait_time = between(0.0, 0.1)

    def on_start(self) -> None:
        """Ask which adapters and base models there are."""
        if key := os.environ.get("IA3_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"
        found = self.client.get("/v1/adapters").json()["adapters"]
        self.classifiers = [each for each in found if each["kind"] == "classifier"]
        self.generators = [each["name"] for each in found if each["engine"] == "language-model"]
        if not found:
            print("the server has no adapters")
            raise StopUser

    @task(8)
    def classify(self) -> None:
        """One text by one adapter."""
        if self.classifiers:
            adapter = random.choice(self.classifiers)
            text = random.choice(TEXTS)
            fields = adapter["fields"] or ["text"]
            asked = text if fields == ["text"] else dict.fromkeys(fields, text)
            body = {"texts": [asked], "adapter": adapter["name"]}
            self.client.post("/v1/classify", json=body)

    @task(1)
    def compare(self) -> None:
        """One text with several adapters."""
        names = [each["name"] for each in self.classifiers if each["fields"] in (None, ["text"])]
        if names:
            chosen = random.sample(names, min(8, len(names)))
            body = {"text": random.choice(TEXTS), "adapters": chosen}
            self.client.post("/v1/classify", json=body, name="/v1/classify (one text, several)")

    @task(1)
    def complete(self) -> None:
        """A completion of some words."""
        if self.generators:
            body = {
                "model": random.choice(self.generators),
                "prompt": "Once upon a time,",
                "max_tokens": 24,
            }
            self.client.post("/v1/completions", json=body)

    @task(1)
    def chat(self) -> None:
        """A chat that is streamed."""
        if self.generators:
            body = {
                "model": random.choice(self.generators),
                "messages": [{"role": "user", "content": random.choice(TEXTS)}],
                "max_tokens": 24,
                "stream": True,
            }
            answer = self.client.post("/v1/chat/completions", json=body, stream=True)
            for _ in answer.iter_lines():
                pass
