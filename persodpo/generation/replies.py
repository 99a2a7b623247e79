"""What an OpenAI-compatible endpoint sent: an answer, or whose fault it is that there is none, and whether to try again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from persodpo.generation.requests import Answer

#: Finish reasons that end an answer, in the words of OpenAI, Anthropic's and text-generation-inference's endpoints.
_ENDS = {"stop", "length", "content_filter", "end_turn", "max_tokens", "stop_sequence", "eos", "eos_token"}
_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_TOO_LONG = ("context_length", "context length", "context size", "context window", "context_size", "too many tokens")
#: HTTP statuses and error codes -> the kind of fault. The first will not pass; of the others, some other statuses will.
_LASTING = {401: "key", 402: "quota", 403: "denied", 404: "unknown_model"}
_PASSING = {
    408: "timeout", 409: "server_error", 429: "rate_limited", "batch_expired": "timeout",
    "rate_limit_exceeded": "rate_limited",
}  # fmt: skip


@dataclass
class CallFault(Exception):  # noqa: N818 - a fault is what it is called throughout
    """One attempt that gave no answer."""

    #: One of `persodpo.generation.requests.FAILURES`, or why no further request can succeed: a key of
    #: `persodpo.generation.endpoint.LASTING`.
    kind: str
    detail: str  # the server's or the system's words, which may hold secrets
    transient: bool = False  # True if the same request may succeed later
    billed: bool = True  # True if the attempt may have been billed
    retry_after: float | None = None  # seconds the server asks to wait


def read_reply(body: bytes | dict[str, Any]) -> Answer:
    """Read the body of a successful call.

    Args:
        body: As it came, or decoded.

    Returns:
        An answer, or the failure ``no_choice`` if the list of choices is empty. A refusal is an answer too.

    Raises:
        CallFault: The body is no answer. One that is no JSON, or an answer that broke off, may be whole the next time; a
            shape that is not known stays so.
    """
    try:
        reply: Any = json.loads(body) if isinstance(body, bytes) else body
    except (ValueError, RecursionError) as error:
        raise CallFault("invalid_body", f"the body is no answer: {error}", transient=True) from None
    content = _object(reply)
    usage, choices = _object(content.get("usage")), content.get("choices")
    asked, written = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    if choices == []:
        empty = "the server answered with an empty list of choices"
        return Answer("failed", None, None, "no_choice", empty, asked, written)
    choice = _object(choices[0] if isinstance(choices, list) else None)
    said = _object(choice.get("message")) or choice
    refusal, reason = said.get("refusal"), choice.get("finish_reason")
    text = refusal or _text(said.get("content", said.get("text", 0)))
    if not isinstance(text, str | None):
        raise CallFault("invalid_body", f"the body lacks a choice with text: {str(reply)[:200]}")
    if not refusal and reason not in _ENDS:
        raise CallFault("invalid_body", f"the answer broke off (finish reason {str(reason)[:40]!r})", transient=True)
    return Answer("answered", text or "", "refusal" if refusal else reason, None, None, asked, written)


def _text(content: object) -> object:
    """Join the text parts of a message; parts of another kind, such as reasoning, are not the answer."""
    if not isinstance(content, list) or not content:
        return content
    parts = [_object(part) for part in content]
    texts = [part.get("text") for part in parts if part.get("type") in {"text", "output_text"}]
    return "".join(map(str, texts)) if texts else content


def fault_of(status: int | None, headers: Mapping[str, str], body: bytes | Any) -> CallFault:
    """Say what an HTTP status and the error's body mean.

    Args:
        status: Any but 200; None where there is none, as in the lines of a batch.
        headers: Of the response.
        body: As it came, or decoded.
    """
    try:
        content: Any = json.loads(body) if isinstance(body, bytes) else body
    except (ValueError, RecursionError):
        content = body.decode(errors="replace")
    error = _object(content).get("error", content)
    found = _object(error)
    said = found.get("message") or found.get("detail") or error
    said = said if isinstance(said, str) else json.dumps(said, default=str)
    code = str(found.get("code") or found.get("type") or "")
    fault = CallFault("rejected", f"{status or code}: {said}", billed=False)
    if status is not None and 300 <= status < 400:
        fault.kind, fault.detail = "redirect", f"{status} to {headers.get('location', 'nowhere')}"
    elif status in _LASTING or (status == 429 and code in _QUOTA):
        fault.kind = _LASTING.get(status or 0, "quota")
    elif any(sign in f"{code} {said}".lower() for sign in _TOO_LONG) and status in {None, 400, 413, 422}:
        fault.kind = "context_too_long"
    elif status in _PASSING or code in _PASSING or (status or 0) >= 500:
        fault.kind = _PASSING.get(status or 0) or _PASSING.get(code, "server_error")
        fault.transient, fault.retry_after = True, _seconds(headers)
    return fault


def _object(value: object) -> dict[str, Any]:
    """Return a JSON object, empty if it is none."""
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**53 else None


def _seconds(headers: Mapping[str, str]) -> float | None:
    """Return what the server asks to wait, given as seconds, milliseconds or a date; an odd value asks for nothing."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif headers.get("retry-after", "").strip().replace(".", "", 1).isdigit():
            seconds = float(headers["retry-after"])
        else:
            seconds = parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
