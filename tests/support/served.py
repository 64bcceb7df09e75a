"""`ia3 serve` as a process, with small random models and classifiers of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import ia3
from support.paths import REPOSITORY
from support.tfew import child_environment, tiny_llama, word_tokenizer

WORDS = ("billing", "delivery", "the", "parcel", "invoice", "twice", "late", "was", "I", "charged")
TEXTS = ["charged twice", "the invoice was late", "the parcel was late", "the parcel the parcel"]
LABELS = ["billing", "billing", "delivery", "delivery"]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}the"


def save_language_model(folder: Path, seed: int = 0, **settings: Any) -> str:
    """A small random LLaMA whose tokens are words, with a template for chats."""
    words = word_tokenizer([*WORDS, "user", "assistant", "system"])
    words.chat_template = CHAT
    settings = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0, **settings}
    model = tiny_llama(seed, vocabulary=len(words), **settings)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def save_classifier(model: str, folder: Path, **settings: Any) -> None:
    """A classifier of two labels after a few steps."""
    ia3.FewShotClassifier(model, steps=2, **settings).fit(TEXTS, LABELS).save(folder)


@dataclass(frozen=True)
class Said:
    """An answer: its status, headers (lower case), and body, parsed where it is JSON."""

    status: int
    headers: Mapping[str, str]
    body: Any


class Client:
    """Asks a server at an address."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def address(self) -> tuple[str, int]:
        """Its host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    @property
    def port(self) -> int:
        return self.address[1]

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Said:
        """What it answers; a body that is no bytes is sent as JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(
            f"{self.url}{path}", data=body, method=method, headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return _said(answer)
        except urllib.error.HTTPError as error:
            with error:
                return _said(error)

    def get(self, path: str) -> Said:
        return self.ask("GET", path)

    def post(self, path: str, body: Any) -> Said:
        return self.ask("POST", path, body)


class Server(Client):
    """`ia3 serve` in a process of its own, which is ready; use it as a context.

    Attributes:
        url: where it is.
        lines: what it has written to standard error.
    """

    def __init__(self, *options: Any) -> None:
        super().__init__("")
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ia3", "serve", "--port", "0", *map(str, options)],
            cwd=REPOSITORY,
            env={**child_environment(), "HF_HUB_OFFLINE": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # A start imports torch and loads the models.
        if not self._ready.wait(180) or not self.url:
            self.process.kill()
            raise AssertionError(self.said())

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if found := re.search(r" at (http://\S+)$", line.rstrip("\n")):
                self.url = found[1]
            if line.startswith("curl "):
                self._ready.set()
        self._ready.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self, by: int = signal.SIGTERM) -> int:
        """End it, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(10)
        return code

    def log(self, event: str = "request") -> list[dict[str, Any]]:
        """Its log's records of an event so far."""
        read = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [record for record in read if record["event"] == event]

    def logged(self, event: str, **values: Any) -> dict[str, Any]:
        """The first record of an event with these values; it is waited for."""
        for _ in range(1000):
            for record in self.log(event):
                if values.items() <= record.items():
                    return record
            time.sleep(0.01)
        raise AssertionError(f"no {event} {values} in {self.lines}")

    def said(self) -> str:
        """What it has written so far."""
        return "\n".join(self.lines)

    def resident_bytes(self) -> int:
        """Of its memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _said(answer: Any) -> Said:
    content = answer.read()
    headers = {name.lower(): value for name, value in answer.headers.items()}
    is_json = headers.get("content-type", "").startswith("application/json")
    return Said(answer.status, headers, json.loads(content) if is_json else content)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of an adapter's folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def form(
    files: Mapping[str, bytes], fields: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, str]]:
    """A multipart body and its headers."""
    boundary, parts = "a-boundary-of-a-form", []
    for name, value in (fields or {}).items():
        head = f'Content-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(head.encode() + value.encode())
    for name, content in files.items():
        head = f'Content-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + content)
    body = b"".join(b"--" + boundary.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    body += b"--" + boundary.encode() + b"--\r\n"
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
