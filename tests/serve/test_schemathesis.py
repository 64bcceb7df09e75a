"""Requests made from the server's own description: no answer of 500, and none it does not name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from support.http_client import call, save_tiny_base
from support.served import Server, form

from ia3 import FewShotClassifier

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.slow

FILES = ("adapter_config.json", "adapter_model.safetensors", "ia3_task.json")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one adapter, which stays up and logs no exception."""
    root = tmp_path_factory.mktemp("server")
    model = save_tiny_base(root / "model")
    texts, labels = ["late again", "charged twice"], ["delivery", "money"]
    FewShotClassifier(str(model), steps=1).fit(texts, labels).save(root / "saved")
    upload = form({name: (root / "saved" / name).read_bytes() for name in FILES})
    options: list[Any] = ["--model", model, "--adapters", root / "adapters", "--no-train"]
    with Server(*options) as found:
        assert call(found.port, "PUT", "/v1/adapters/tickets", *upload).status < 300
        yield found
        assert call(found.port, "GET", "/healthz").status == 200
        assert "Traceback" not in found.said()


def tried(operation: Any, mode: Any) -> int:
    """How many requests of an operation were tried, of which none had a wrong answer."""
    count = 0
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]

    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal count
        count += 1
        case.call_and_validate(timeout=60, checks=checks)

    # An operation that takes nothing cannot be asked wrongly.
    with suppress(Unsatisfiable):
        ask()
    return count


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_has_an_answer_that_the_description_does_not_allow(
    server: Server, mode: str
) -> None:
    described = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    operations = [each.ok() for each in described.get_all_operations()]
    counts = {o.label: tried(o, schemathesis.GenerationMode[mode]) for o in operations}
    for label in ("POST /v1/classify", "POST /v1/completions", "PUT /v1/adapters/{name}"):
        assert counts[label] >= 5, counts
