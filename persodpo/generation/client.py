"""One endpoint: its key, its HTTP client, and a request in the form in which it is sent."""

from __future__ import annotations

import base64
import json
import os
import urllib.parse
from dataclasses import replace
from typing import Any

import httpx2

from persodpo.config import OpenAIModel
from persodpo.generation.requests import Answer, ModelStopped, Request

CONNECT_SECONDS = 10.0
_SHORTEST_SECRET = 8
#: From this length on a secret stands in no answer by chance.
_NO_CHANCE = 16
_SHOWN = 300


class Mask:
    """Takes a secret, in the forms in which servers echo it, out of what is said about an endpoint."""

    def __init__(self, secret: str | None) -> None:
        """Remember the secret; shorter ones are placeholders such as EMPTY."""
        self._forms: list[str] = []
        if secret and len(secret) >= _SHORTEST_SECRET:
            encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
            self._forms = [secret, urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1], encoded]

    def withheld(self, answer: Answer) -> Answer:
        """Return an answer, or a failure in place of one that holds a secret too long to stand there by chance."""
        if not any(len(form) >= _NO_CHANCE and form in (answer.completion or "") for form in self._forms):
            return answer
        said = "the answer holds the API key, so it is not stored"
        return replace(
            answer, outcome="failed", completion=None, finish_reason=None, failure="invalid_body", error=said
        )

    def line(self, text: str) -> str:
        """Return ``text`` with ``[key]`` wherever the secret stood, on one line of at most 300 characters."""
        for form in sorted(self._forms, key=len, reverse=True):
            text = text.replace(form, "[key]")
        line = " ".join(text.split())
        return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def api_key(settings: OpenAIModel) -> str | None:
    """Read the key from the environment; None for an endpoint that asks for none.

    Raises:
        ModelStopped: Its variable is not set, or holds what no key is; the variable is named, never its value.
    """
    variable = settings.api_key_env
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ModelStopped(
            f"Model {settings.model} needs an API key in the environment variable {variable}, which is not set; export it "
            "and run again."
        )
    if not key.isascii() or not key.isprintable():
        raise ModelStopped(
            f"The API key in the environment variable {variable} holds characters that no key has; export it again."
        )
    return key


def request_body(settings: OpenAIModel, json_keys: tuple[str, ...], request: Request) -> tuple[str, dict[str, Any]]:
    """Return a request as it is sent: the path and the body, which may ask for a JSON object of texts under these keys."""
    body: dict[str, Any] = {"model": settings.served_as or settings.model}
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.seed is not None:
        body["seed"] = request.seed
    if isinstance(request.prompt, str):
        return "/v1/completions", body | {"prompt": request.prompt, "max_tokens": request.max_new_tokens}
    body |= {"messages": request.prompt, settings.token_limit: request.max_new_tokens}
    if json_keys:
        schema = {
            "type": "object", "properties": {key: {"type": "string"} for key in json_keys}, "required": list(json_keys),
            "additionalProperties": False,
        }  # fmt: skip
        form = {"name": "answer", "strict": True, "schema": schema}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return "/v1/chat/completions", body


class BoundedClient(httpx2.AsyncClient):
    """An HTTP client that follows no redirect and reads no body beyond a length."""

    def __init__(self, settings: OpenAIModel, longest_body: int) -> None:
        """Take timeouts and connections from the settings of an endpoint; bodies are bounded as decoded, bytes."""
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        connect = min(CONNECT_SECONDS, settings.timeout_seconds)
        timeout = httpx2.Timeout(settings.timeout_seconds, connect=connect)
        super().__init__(timeout=timeout, limits=limits, follow_redirects=False)
        self._longest_body = longest_body

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request and read its body; raises httpx2.DecodingError for one that is too long."""
        response = await super().send(request, **{**options, "stream": True})
        body = bytearray()
        try:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > self._longest_body:
                    raise httpx2.DecodingError(f"a body of more than {self._longest_body:,} bytes", request=request)
        finally:
            await response.aclose()
        coded = {"content-encoding", "content-length", "transfer-encoding"}
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in coded]
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=request)
