"""What went wrong with a call to an OpenAI-compatible endpoint: whose fault it is, and whether to try again.

Servers echo headers, keys and whole prompts in their error bodies, so every word of theirs passes `Redactor` before it
goes anywhere.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.parse
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from persodpo.generation.requests import Answer

#: As many failures in a row, with no answer between, stop the model: something is wrong that no prompt can help.
FAILURES_IN_A_ROW = 20
#: Why a model is stopped, by the kind of fault.
LASTING = {
    "key": "{url} refuses {key} for model {model} ({detail}); set api_key_env to a variable that holds a valid key.",
    "denied": "{url} denies {key} the model {model} ({detail}); ask for access or choose another model.",
    "quota": "{url} has no credit left for {key} and model {model} ({detail}); top up the account and run again.",
    "unknown_model": (
        "{url} does not know model '{served}' ({detail}); correct served_as, or base_url, which usually ends in /v1."
    ),
    "unreachable": "{url} of model {model} cannot be reached ({detail}); start the server or correct base_url.",
    "wait": "{url} asks to wait {detail} before the next request to model {model}; run again then, answers are kept.",
    "row": (
        "{url} failed for " + str(FAILURES_IN_A_ROW) + " prompts in a row to model {model} (last: {detail}); mend that and "
        "run again, failed prompts with retrying of failures switched on."
    ),
}  # fmt: skip

SHORTEST_SECRET = 8
_SHOWN = 300
_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_TOO_LONG = ("context_length", "context length", "context size", "context window", "context_size", "too many tokens")
#: Causes of a connection error that say that no request got through. They are known by name, because the client's own
#: HTTP library is its affair and has been exchanged before.
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "UnsupportedProtocol", "ProxyError"}


class Redactor:
    """Takes a secret, in the forms in which servers echo it, out of text."""

    def __init__(self, secret: str | None) -> None:
        """Remember the secret; None for none. Shorter ones are placeholders such as EMPTY, which texts may well hold."""
        self._forms: list[str] = []
        if secret and len(secret) >= SHORTEST_SECRET:
            encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
            forms = {secret, urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1], encoded}
            self._forms = sorted(forms, key=len, reverse=True)

    def __repr__(self) -> str:
        """Say nothing about the secret."""
        return "Redactor()"

    def text(self, text: str) -> str:
        """Return ``text`` with ``[key]`` wherever the secret stood."""
        for form in self._forms:
            text = text.replace(form, "[key]")
        return text

    def line(self, text: str) -> str:
        """Return ``text`` without the secret, on one line and at most 300 characters long."""
        line = " ".join(self.text(text).split())
        return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


@dataclass
class CallFault(Exception):  # noqa: N818 - a fault is what it is called throughout
    """One attempt that gave no answer.

    Attributes:
        kind: One of `persodpo.generation.requests.FAILURES`, or why no further request can succeed: ``key``, ``denied``,
            ``unknown_model``, ``quota``, ``unreachable``.
        detail: The server's or the system's words, on one line without secrets.
        transient: True if the same request may succeed later.
        billed: True if the server may have done its work and charged for it.
        retry_after: Seconds the server asks to wait, None if it does not.
    """

    kind: str
    detail: str
    transient: bool = False
    billed: bool = False
    retry_after: float | None = None


def classify(error: Exception, redactor: Redactor) -> CallFault:
    """Say what an exception of the client means.

    Args:
        error: An error of the ``openai`` package, a timeout, or an error of reading the body.
        redactor: Takes secrets out of what the server said.

    Returns:
        The fault.
    """
    if isinstance(error, openai.APIStatusError):
        return _from_status(error, redactor)
    if isinstance(error, openai.APIConnectionError):
        return _from_connection(error, redactor)
    if isinstance(error, TimeoutError):
        return CallFault("timeout", "no answer in time", transient=True, billed=True)
    if isinstance(error, UnicodeEncodeError):
        return CallFault("rejected", "the prompt holds characters that no request can carry")
    return CallFault("invalid_body", redactor.line(f"the body is no answer: {error}"), transient=True, billed=True)


def _from_connection(error: openai.APIConnectionError, redactor: Redactor) -> CallFault:
    """Tell an endpoint that was not reached from one that took the request and did not answer it."""
    cause = error.__cause__
    detail = redactor.line(str(cause or "") or str(error))
    if type(cause).__name__ in _UNREACHABLE:
        return CallFault("unreachable", detail, transient=True)
    if isinstance(error, openai.APITimeoutError):
        return CallFault("timeout", "no answer in time", transient=True, billed=True)
    return CallFault("connection_cut", detail, transient=True, billed=True)


def read_reply(reply: object, redactor: Redactor) -> Answer:
    """Read the body of a successful call; the client does not check it.

    Args:
        reply: The body as it was decoded: JSON, or text if it was none.
        redactor: Takes secrets out of what the server said.

    Returns:
        An answer, or the failure ``no_choice`` if the list of choices is empty. A refusal is an answer too.

    Raises:
        CallFault: The body is no answer.
    """
    body = _object(reply)
    usage, choices = _object(body.get("usage")), body.get("choices")
    prompt_tokens, completion_tokens = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    if choices == []:
        error = "the server answered with an empty list of choices"
        return Answer("failed", None, None, "no_choice", error, prompt_tokens, completion_tokens)
    choice = _object(choices[0] if isinstance(choices, list) else None)
    said = _object(choice.get("message")) or choice
    refusal = said.get("refusal")
    text = refusal or said.get("content", said.get("text", 0))
    reason = "refusal" if refusal else choice.get("finish_reason")
    if not isinstance(text, str | None) or not isinstance(reason, str | None):
        raise CallFault(
            "invalid_body", "the body is no answer: it lacks a choice with text", transient=True, billed=True
        )
    return Answer(
        "answered", redactor.text(text or ""), redactor.line(reason) if reason else None,
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
    )  # fmt: skip


def _object(value: object) -> dict[str, Any]:
    """Return a JSON object, empty if it is none."""
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**53 else None


def _from_status(error: openai.APIStatusError, redactor: Redactor) -> CallFault:
    """Say what an HTTP status and the error's body mean."""
    status = error.status_code
    said = _message(error)
    detail = redactor.line(f"{status}: {said}" if said else str(status))
    code = str(error.code or error.type or "")
    lasting = {401: "key", 402: "quota", 403: "denied", 404: "unknown_model"}.get(status)
    if status == 429 and code in _QUOTA:
        lasting = "quota"
    if lasting:
        return CallFault(lasting, detail)
    if status in {400, 413, 422} and any(sign in f"{code} {said}".lower() for sign in _TOO_LONG):
        return CallFault("context_too_long", detail)
    passing = {408: "timeout", 409: "server_error", 429: "rate_limited"}.get(status)
    if passing or status >= 500:
        return CallFault(passing or "server_error", detail, transient=True, retry_after=_retry_after(error))
    return CallFault("rejected", detail)


def _message(error: openai.APIStatusError) -> str:
    """Return what the body says, from the usual place or whole."""
    body = error.body
    if isinstance(body, dict):
        said = body.get("message") or body.get("detail") or body.get("error") or body
        return said if isinstance(said, str) else json.dumps(said, default=str)
    return str(body) if body else ""


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Return the seconds that the server asks to wait, given as seconds, milliseconds or a date."""
    headers = error.response.headers
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif headers.get("retry-after", "").strip().replace(".", "", 1).isdigit():
            seconds = float(headers["retry-after"])
        else:
            seconds = parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    except (KeyError, ValueError, TypeError):
        return None
    return min(max(0.0, seconds), 1e9)
