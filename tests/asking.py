"""The faulty server, a backend over it and prompts for it; run as a program it asks, for tests that kill it."""

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
from faulty_server import body_of

from persodpo.config import OpenAIModel, Prices
from persodpo.generation.ask import generate
from persodpo.generation.batch import BatchBackend
from persodpo.generation.endpoint import OpenAIBackend
from persodpo.generation.requests import Answer, Backend, Request, request_key
from persodpo.generation.store import Store

#: The client's first wait before it tries again, seconds; half a second in earnest.
openai._base_client.INITIAL_RETRY_DELAY = 0.02

PRICES = Prices(input_per_million=1.0, output_per_million=2.0)


def backend(url: str, json_keys: tuple[str, ...] = (), attempts: int = 4, **changes: Any) -> OpenAIBackend:
    settings = {
        "model": "small", "base_url": url, "concurrency": 8, "timeout_seconds": 5.0, "prices": PRICES, **changes,
    }  # fmt: skip
    made = (BatchBackend if changes.get("batch") else OpenAIBackend)(OpenAIModel(**settings), json_keys)
    made.attempts, made.poll_seconds = attempts, 0.05
    return made


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

    def events(self, kind: str, *prompts: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == kind and (not prompts or line["prompt"] in prompts)]

    def received(self, *prompts: str) -> list[dict[str, Any]]:
        return self.events("received", *prompts)

    def calls(self) -> Counter[str]:
        """Calls of the Batch API."""
        return Counter(event["call"] for event in self.events("call"))

    def billed(self) -> float:
        """What its answers cost, those included that reached nobody."""
        bodies = [body_of({"model": "", "messages": ()}, event["prompt"]) for event in self.events("delivered")]
        counted = [body["usage"] for body in bodies]
        return sum(PRICES.cost(one["prompt_tokens"], one["completion_tokens"]) for one in counted)


@contextmanager
def serving(log: Path, *options: str) -> Iterator[Server]:
    log.touch()
    command = [sys.executable, Path(__file__).with_name("faulty_server.py"), "--log", log, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log, process)
        finally:
            process.kill()


class Telling(Store):
    """A store that prints the keys of what is on the disk."""

    def write(self, entries, run=None):
        super().write(entries, run)
        print(*(entry.key for entry in entries), sep="\n", flush=True)


def child(server: Server, path: Path, prompts: int, **settings: Any) -> subprocess.Popen[str]:
    """Ask in a process of its own, perhaps under a ``budget``; it prints keys, and at its end what came of it."""
    command = [sys.executable, __file__, server.url, path, str(prompts), json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main() -> None:
    url, path, prompts, changes = sys.argv[1:]
    settings = {"concurrency": 16, "timeout_seconds": 1.0, **json.loads(changes)}
    budget = settings.pop("budget", None)
    with Telling(Path(path)) as store:
        print("open", flush=True)
        asked = chats(f"prompt {number}" for number in range(int(prompts)))
        found = generate(asked, backend(url, **settings), store, budget_usd=budget)
        print(f"asked {found.asked} left {found.left} {found.stopped}")


if __name__ == "__main__":
    main()
