"""What vLLM raises, as errors of this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...base.loading import first_line
from ...errors import IA3Error, StateError

ENDED = "vLLM has ended, its log says why: the server has to be started again"


@contextmanager
def as_own() -> Iterator[None]:
    """Within the context, what vLLM raises is an error of this project."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (VLLMClientError, ValueError) as error:
        raise IA3Error(f"vLLM refuses this: {first_line(error)}") from error
    except EngineDeadError as error:
        raise StateError(ENDED) from error
    except EngineGenerateError as error:
        said = said_by(error.__cause__ or error)
        raise StateError(f"vLLM could not compute this: {said}") from error


def said_by(error: BaseException) -> str:
    """What was wrong in one of vLLM's processes, without where it was caught."""
    said = str(error)
    _, begin, inner = said.partition("Worker failed with error '")
    return inner.rpartition("', please check the stack trace")[0] if begin else said
