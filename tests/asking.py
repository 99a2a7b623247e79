"""The faulty server, a backend over it and prompts for it, for tests and for the processes they start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai._base_client

from persodpo.config import OpenAIModel, Prices
from persodpo.generation.endpoint import OpenAIBackend
from persodpo.generation.requests import Answer, Backend, Request, request_key
from persodpo.generation.store import Store

#: The client's first wait before it tries again, seconds; half a second in earnest.
openai._base_client.INITIAL_RETRY_DELAY = 0.02

PRICES = Prices(input_per_million=1.0, output_per_million=2.0)


def backend(url: str, json_keys: tuple[str, ...] = (), **changes: Any) -> OpenAIBackend:
    settings: dict[str, Any] = {
        "kind": "openai", "model": "small", "served_as": None, "base_url": url, "api_key_env": None, "concurrency": 8,
        "requests_per_minute": None, "tokens_per_minute": None, "timeout_seconds": 5.0, "attempts": 4,
        "token_limit": "max_tokens", "prices": PRICES,
    }  # fmt: skip
    return OpenAIBackend(OpenAIModel(**{**settings, **changes}), json_keys)


def chat(text: str) -> Request:
    messages = ({"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": text})
    return Request(text, messages, max_new_tokens=30, temperature=0.0, seed=None, template="plain")


def chats(texts: Iterable[str]) -> list[Request]:
    return [chat(text) for text in texts]


def answers(store: Store, asked: Iterable[Request], via: Backend) -> list[Answer | None]:
    """Return what is stored of some requests, None where there is nothing."""
    return [entry and entry.answer for _, entry in store.entries([request_key(one, via) for one in asked])]


@dataclass
class Server:
    """The faulty server, in a process of its own."""

    url: str
    log: Path
    process: subprocess.Popen[str]

    def events(self, prompts: Iterable[str] | None = None) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        wanted = None if prompts is None else set(prompts)
        return [line for line in lines if wanted is None or line["prompt"] in wanted]

    def calls(self) -> Counter[str]:
        """Calls of the Batch API."""
        return Counter(event["call"] for event in self.events() if event["event"] == "call")

    def received(self, *prompts: str) -> list[dict[str, Any]]:
        return [event for event in self.events(prompts or None) if event["event"] == "received"]


@contextmanager
def serving(log: Path, *options: str) -> Iterator[Server]:
    log.touch()
    command = [sys.executable, Path(__file__).with_name("faulty_server.py"), "--log", log, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log, process)
        finally:
            process.kill()
