"""`POST /v1/classify`: texts of many classifiers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import compress, islice
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...classify.engine import ENCODER
from ...classify.mixed import Classified
from ...errors import IA3Error, UnknownNameError
from ..engine.bases import ServedBase
from ..engine.interface import Classification
from .gate import MOST_JSON, within
from .refused import JSON, RefusedError
from .registry import Served
from .schemas import Classifications, Classify, TextIn
from .serving import Serving, access_of, note, only

Answers = list[Classified | IA3Error]

# Characters of one text, as many times as adapters are asked of it: each reads it by itself, and
# others wait meanwhile. What else a request has is bounded by its body.
MOST_CHARACTERS = MOST_JSON


def classify_router(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["classify"])

    @router.post("/v1/classify", response_model=Classifications)
    async def classify(request: Request, asked: Classify) -> Response:
        """Labels and probabilities of texts, each by its adapter.

        One text may be asked of many adapters at once: what they share is computed once.
        """
        work = _classified(serving, request, asked)
        return JSON(await within(request, serving.limits, work))

    return router


async def _classified(serving: Serving, request: Request, asked: Classify) -> dict[str, Any]:
    texts, served = _texts_and_adapters(serving, request, asked)
    note(request, texts=len(texts), adapters=len({each.name for each in served}))
    if serving.log_texts:
        note(request, asked=list(texts))
    # Twice as many prompts.
    with serving.room(len(texts) * (1 + asked.untuned)):
        failed = await serving.use(served)
        kinds = (False, True) if asked.untuned else (False,)
        found, *others = await asyncio.gather(
            *(_answers(serving, texts, served, failed, untuned=each) for each in kinds)
        )
    untuned = others[0] if others else []
    if asked.adapters == "*":
        # Some may have been deleted since they were listed.
        there = [not isinstance(each, UnknownNameError) for each in found]
        served, found = [*compress(served, there)], [*compress(found, there)]
        untuned = [*compress(untuned, there)]
    serving.metrics.classified(len(texts))
    errors = [each for each in found if isinstance(each, IA3Error)]
    if len(errors) == len(found):
        raise errors[0] if errors else RefusedError(404, "there are no classifiers here any more")
    results = [
        _result(serving, each.name, answer) for each, answer in zip(served, found, strict=True)
    ]
    for result, other in zip(results, untuned, strict=False):
        if isinstance(other, Classified):
            result["untuned"] = _said(other)
    return {"results": results, "usage": {"texts": len(texts)}}


def _texts_and_adapters(
    serving: Serving, request: Request, asked: Classify
) -> tuple[Sequence[TextIn], list[Served]]:
    registry, access = serving.registry, access_of(request)
    if asked.texts is not None:
        names = [asked.adapter or ""] * len(asked.texts)
        names = names if asked.adapters is None else [*asked.adapters]
        texts: Sequence[TextIn] = asked.texts
    else:
        assert asked.text is not None
        if asked.adapters == "*":
            classifiers = (s.name for s in registry.list(access) if s.kind == "classifier")
            names = [*islice(classifiers, asked.limit)]
            if not names:
                raise RefusedError(404, "there are no classifiers here", param="adapters")
        else:
            names = [*asked.adapters] if asked.adapters is not None else [asked.adapter or ""]
        texts = [asked.text] * len(names)
        _check_length(asked.text, len(names))
    for name in names:
        if registry.base_named(name, access) is not None:
            what = f"{name!r} is a base model, which classifies nothing by itself"
            raise RefusedError(
                400, f"{what}: name an adapter that was fitted on it", param="adapter"
            )
    return texts, [registry.find(name, access) for name in names]


def _check_length(text: TextIn, adapters: int) -> None:
    values = [text] if isinstance(text, str) else [v for v in text.values() if isinstance(v, str)]
    count = sum(map(len, values))
    if count * adapters > MOST_CHARACTERS:
        raise RefusedError(
            400,
            f"the text has {count:,} characters, for {adapters:,} adapters: at most "
            f"{MOST_CHARACTERS // adapters:,} are taken for so many",
            param="text",
        )


async def _answers(
    serving: Serving,
    texts: Sequence[TextIn],
    served: Sequence[Served],
    failed: Mapping[str, IA3Error],
    *,
    untuned: bool,
) -> list[Classified | IA3Error | None]:
    """The answer to each text; one engine's request for each base model, all at once."""
    rows: dict[ServedBase, list[int]] = {}
    for row, each in enumerate(served):
        # An encoder cannot say anything without a head, which is of the adapter's vectors.
        if each.name not in failed and not (untuned and each.base.kind == ENCODER):
            rows.setdefault(each.base, []).append(row)
    requests = [
        Classification([texts[row] for row in own], [served[row].name for row in own], untuned)
        for own in rows.values()
    ]
    found: list[Classified | IA3Error | None] = [failed.get(each.name) for each in served]
    answered = await asyncio.gather(*(_engines(serving, each) for each in requests))
    for own, answers in zip(rows.values(), answered, strict=True):
        for row, answer in zip(own, answers, strict=True):
            found[row] = answer
    return found


async def _engines(serving: Serving, asked: Classification) -> Answers:
    """The engine's answers; what it raises is the answer to each text."""
    try:
        return list(await only(serving.engine.submit(asked)))
    except IA3Error as error:
        return [error] * len(asked.texts)


def _result(serving: Serving, name: str, answer: Classified | IA3Error | None) -> dict[str, Any]:
    if isinstance(answer, Classified):
        return {"adapter": name, **_said(answer)}
    assert answer is not None
    return {"adapter": name, **serving.refusal(answer).body()}


def _said(answer: Classified) -> dict[str, Any]:
    return {
        "label": answer.label,
        "probability": answer.probability,
        "probabilities": [
            {"label": label, "probability": p} for label, p in answer.probabilities.items()
        ],
        "labels": answer.labels,
    }
