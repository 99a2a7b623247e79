"""A backend over the faulty server and prompts for it, for tests and for the processes they start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from persodpo.generation.openai_api import OpenAIBackend
from persodpo.generation.requests import Request
from persodpo.settings import OpenAIModel, Prices

PRICES = Prices(input_per_million=1.0, output_per_million=2.0)


def backend(url: str, json_keys: tuple[str, ...] = (), **changes: Any) -> OpenAIBackend:
    settings: dict[str, Any] = {
        "kind": "openai", "model": "small", "served_as": None, "base_url": url, "api_key_env": None, "concurrency": 8,
        "requests_per_minute": None, "tokens_per_minute": None, "timeout_seconds": 5.0, "attempts": 4,
        "longest_wait_seconds": 0.05, "token_limit": "max_tokens", "prices": PRICES,
    }  # fmt: skip
    return OpenAIBackend(OpenAIModel(**{**settings, **changes}), json_keys)


def chat(text: str) -> Request:
    messages = ({"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": text})
    return Request(text, messages, max_new_tokens=30, temperature=0.0, seed=None, template="plain")


def chats(texts: Iterable[str]) -> list[Request]:
    return [chat(text) for text in texts]
