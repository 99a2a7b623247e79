"""One endpoint: its key, its client, and a request in the form in which it is sent and priced."""

from __future__ import annotations

import os
from typing import Any

import openai
from openai import AsyncOpenAI

from persodpo.config import OpenAIModel
from persodpo.errors import PersodpoError
from persodpo.generation.faults import CallFault
from persodpo.generation.requests import Request

CONNECT_SECONDS = 10.0
#: Tokens that servers add around each message of a chat, at most.
MESSAGE_TOKENS = 16


def api_key(settings: OpenAIModel) -> str | None:
    """Read the key from the environment; None for an endpoint that asks for none.

    Raises:
        PersodpoError: Its variable is not set, or holds what no key is; the variable is named, never its value.
    """
    variable = settings.api_key_env
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise PersodpoError(
            f"Model {settings.model} needs an API key in the environment variable {variable}, which is not set; export it "
            "and run again."
        )
    if not key.isascii() or not key.isprintable():
        raise PersodpoError(
            f"The API key in the environment variable {variable} holds characters that no key has; export it again."
        )
    return key


def client_for(settings: OpenAIModel, key: str | None, retries: int = 0) -> AsyncOpenAI:
    """Return a client for an endpoint; it is to be closed."""
    timeout = openai.Timeout(settings.timeout_seconds, connect=min(CONNECT_SECONDS, settings.timeout_seconds))
    # Without a key of its own the client would send OPENAI_API_KEY to whatever server base_url names.
    return AsyncOpenAI(api_key=key or "none", base_url=settings.base_url, max_retries=retries, timeout=timeout)


def request_body(settings: OpenAIModel, json_keys: tuple[str, ...], request: Request) -> tuple[str, dict[str, Any]]:
    """Return a request as it is sent: the path below ``/v1`` and the body.

    Args:
        settings: Of the endpoint.
        json_keys: Keys, all text, of the JSON object that the endpoint must hold the model to; empty: no such schema.
        request: The request.

    Returns:
        Path and body.

    Raises:
        CallFault: A raw prompt cannot be held to a schema.
    """
    body: dict[str, Any] = {"model": settings.served_as or settings.model}
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.seed is not None:
        body["seed"] = request.seed
    if isinstance(request.prompt, str):
        if json_keys:
            raise CallFault("rejected", "a schema needs a chat prompt, raw text cannot be held to one")
        return "/completions", body | {"prompt": request.prompt, "max_tokens": request.max_new_tokens}
    body |= {"messages": request.prompt, settings.token_limit: request.max_new_tokens}
    if json_keys:
        body["response_format"] = _schema(json_keys)
    return "/chat/completions", body


def highest_cost(settings: OpenAIModel, json_keys: tuple[str, ...], request: Request) -> float:
    """Return the most that one attempt can cost, US dollars: no tokenizer makes more tokens than a text has bytes."""
    if settings.prices is None:
        return 0.0
    around = MESSAGE_TOKENS * (len(request.texts) + 1 + 2 * len(json_keys))
    return settings.prices.cost(request.prompt_bytes + around, request.max_new_tokens)


def _schema(keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the ``response_format`` that asks for one object with these keys, all text."""
    schema = {
        "type": "object", "properties": {key: {"type": "string"} for key in keys}, "required": list(keys),
        "additionalProperties": False,
    }  # fmt: skip
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
