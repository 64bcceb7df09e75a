"""Logs of the server: a JSON object a line, on standard error."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import traceback

LEVELS = ("debug", "info", "warning", "error")

# What every record has; the rest was given with it.
_USUAL = {*vars(logging.makeLogRecord({})), "message", "taskName", "color_message"}


class Lines(logging.Formatter):
    """A record as a line: `time`, `level`, `event`, and what else was given."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        # Other libraries may give more to each.
        usual = _USUAL | vars(logging.makeLogRecord({})).keys()
        line |= {name: value for name, value in vars(record).items() if name not in usual}
        if record.exc_info:
            line["trace"] = "".join(traceback.format_exception(*record.exc_info))
        text = json.dumps(line, ensure_ascii=False, default=str)
        return text.encode(errors="backslashreplace").decode()


def log_to_stderr(level: str) -> None:
    """Have the server's records of this level and above written."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name, least in (("ia3.serve", level), ("uvicorn.error", "warning")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least.upper())
        logger.propagate = False
