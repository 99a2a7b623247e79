"""One endpoint: its key, its HTTP client, a request in the form in which it is sent, and what came back.

What came is an answer, or a fault that says whose it is and whether the same request may succeed later.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import httpx2

from persodpo.config import OpenAIModel
from persodpo.generation.requests import Answer, ModelStopped, Request

CONNECT_SECONDS = 10.0
#: How many times the longest wait a file of a batch may take.
FILE_TIMES = 60
#: Letters of a secret in a row that are not shown, and that stand in no answer by chance; shorter ones are placeholders.
_PIECE, _NO_CHANCE = 8, 16
#: Letters of a message that are shown.
_SHOWN = 300
#: Headers that are sent; others are of the environment, which may mean them for another endpoint.
_SENT = {
    b"accept", b"accept-encoding", b"authorization", b"connection", b"content-length", b"content-type", b"host",
    b"transfer-encoding", b"user-agent",
}  # fmt: skip
#: Headers that are read; nobody knows how the others are coded.
_READ = (b"location", b"retry-after", b"retry-after-ms")
#: Finish reasons that end an answer, in the words of OpenAI, Anthropic's and text-generation-inference's endpoints.
_ENDS = ("stop", "length", "content_filter", "end_turn", "max_tokens", "stop_sequence", "eos", "eos_token")
_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_TOO_LONG = ("context_length", "context length", "context size", "context window", "context_size", "too many tokens")
#: Statuses of 500 and more that say that nothing was done; after the others a model behind a gateway may have answered.
_UNDONE = {503, 529}
#: HTTP statuses and error codes -> the kind of fault. The first will not pass; of the others, some other statuses will.
_LASTING = {401: "key", 402: "quota", 403: "denied", 404: "unknown_model"}
_PASSING = {
    408: "timeout", 409: "server_error", 429: "rate_limited", "batch_expired": "timeout",
    "rate_limit_exceeded": "rate_limited",
}  # fmt: skip


class Mask:
    """Keeps words that hold a part of a secret, however they write it, out of what is said and stored."""

    def __init__(self, *secrets: str | None) -> None:
        """Remember the secrets; shorter ones are placeholders such as EMPTY."""
        forms: list[str] = []
        for secret in (one for one in secrets if one and len(one) >= _PIECE):
            coded = [base64.b64encode(b"?" * shift + secret.encode()).decode() for shift in range(3)]
            # Letters that hold bits of what stands before or after are left out.
            inner = [text[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6] for shift, text in enumerate(coded)]
            forms += [_folded(form) for form in (secret, secret.encode().hex(), *inner)]
        self._pieces = {
            size: {form[start : start + size] for form in forms for start in range(len(form) - size + 1)}
            for size in (_PIECE, _NO_CHANCE)
        }

    def _holds(self, text: str, size: int) -> bool:
        """Tell whether a text shares so many letters in a row with the secret, as it is or coded."""
        plain = _folded(text) if self._pieces[size] else ""
        return any(plain[start : start + size] in self._pieces[size] for start in range(len(plain) - size + 1))

    def withheld(self, answer: Answer) -> Answer:
        """Return an answer, or a failure in place of one that holds a secret too long to stand there by chance."""
        if not self._holds(answer.completion or "", _NO_CHANCE):
            return answer
        reason = "the answer holds a key or password, so it is not stored"
        return replace(
            answer, outcome="failed", completion=None, finish_reason=None, failure="invalid_body", error=reason
        )

    def line(self, text: str) -> str:
        """Return ``text`` on one line of at most 300 letters that can be shown, or nothing of it but a status."""
        line = " ".join(text.split())
        line = line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
        if self._holds(line, _PIECE):
            status = line[:5] if re.match(r"\d{3}: ", line) else ""
            return f"{status}words that hold a key or password"
        return "".join(char if char.isprintable() else "\ufffd" for char in line)


def _folded(text: str) -> str:
    """Return the letters of a text without its escapes, spaces, case, and the two alphabets of base64."""
    text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda escape: chr(int(escape[1], 16)), unquote(html.unescape(text)))
    return re.sub(r"[\s\\]", "", text).translate({ord("-"): "+", ord("_"): "/"}).lower()


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


def proxy_logins() -> list[str]:
    """Return user names and passwords of the environment's proxies."""
    return [
        unquote(login) for login in re.findall(r"^(?:\w+://)?(.*)@", "\n".join(getproxies().values()), re.MULTILINE)
    ]


class BoundedClient(httpx2.AsyncClient):
    """An HTTP client that follows no redirect and reads no body beyond a length."""

    def __init__(self, settings: OpenAIModel, longest_body: int) -> None:
        """Take timeouts and connections from the settings of an endpoint; bodies are bounded as decoded, bytes."""
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        # Shorter than the whole, so that what was never connected is known from what may have been billed.
        connect = min(CONNECT_SECONDS, 0.4 * settings.timeout_seconds)
        timeout = httpx2.Timeout(settings.timeout_seconds, connect=connect)
        # A server of this machine is not asked through a proxy.
        trusts = urlsplit(settings.base_url).hostname not in {"127.0.0.1", "localhost", "::1"}
        try:
            super().__init__(timeout=timeout, limits=limits, follow_redirects=False, trust_env=trusts)
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            raise ModelStopped(
                f"Model {settings.model} cannot be asked with the proxies and certificates of the environment "
                f"({type(error).__name__}); correct HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE or SSL_CERT_DIR."
            ) from None
        self._longest_body, self._seconds = longest_body, settings.timeout_seconds

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request and read its body, or raise: httpx2.DecodingError for one that is too long."""
        request_sent = httpx2.Request(
            request.method, request.url, stream=request.stream, extensions=request.extensions,
            headers=[(name, value) for name, value in request.headers.raw if name.lower() in _SENT],
        )  # fmt: skip
        longest = self._seconds * (FILE_TIMES if request.url.path.endswith(("/files", "/content")) else 1)
        body, options["stream"] = bytearray(), True
        try:
            async with asyncio.timeout(longest), aclosing(await super().send(request_sent, **options)) as response:
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > self._longest_body:
                        raise httpx2.DecodingError(f"a body of more than {self._longest_body:,} bytes", request=request)
        except TimeoutError:
            raise httpx2.ReadTimeout("no answer in time", request=request) from None
        headers = [(name, value) for name, value in response.headers.raw if name.lower() in _READ]
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=request)


def request_body(settings: OpenAIModel, json_keys: tuple[str, ...], request: Request) -> tuple[str, dict[str, Any]]:
    """Return a request as it is sent: the path and the body, which may ask for a JSON object of texts under these keys."""
    body: dict[str, Any] = {"model": settings.served_as or settings.model}
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.seed is not None:
        body["seed"] = request.seed
    if isinstance(request.prompt, str):
        return "/v1/completions", body | {"prompt": request.prompt, "max_tokens": request.max_new_tokens}
    # OpenAI's newer models know this name alone; many other servers know the old one alone.
    newer = f".{urlsplit(settings.base_url).hostname}".rstrip(".").endswith((".openai.com", ".openai.azure.com"))
    limit = "max_completion_tokens" if newer else "max_tokens"
    body |= {"messages": request.prompt, limit: request.max_new_tokens}
    if json_keys:
        schema = {
            "type": "object", "properties": {key: {"type": "string"} for key in json_keys}, "required": list(json_keys),
            "additionalProperties": False,
        }  # fmt: skip
        form = {"name": "answer", "strict": True, "schema": schema}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return "/v1/chat/completions", body


@dataclass
class CallFault(Exception):  # noqa: N818 - a fault is what it is called throughout
    """One attempt that gave no answer."""

    kind: str  # a failure of an `Answer`, or a key of `persodpo.generation.endpoint.LASTING`: no other request will succeed
    detail: str  # the server's or the system's words, which may hold secrets
    transient: bool = False  # True if the same request may succeed later
    billed: bool = True  # True if the attempt may have been billed
    retry_after: float | None = None  # seconds the server asks to wait


@contextmanager
def shape_faults() -> Iterator[None]:
    """Make a fault of whatever reading one reply stumbles over, so that no server can end more than its own request."""
    try:
        yield
    except CallFault:
        raise
    except Exception as error:
        raise CallFault("invalid_body", f"the body has an unknown shape ({type(error).__name__})") from None


def read_reply(body: object) -> Answer:
    """Read the body of a successful call, as it came (bytes) or decoded.

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
    content = as_object(reply)
    choices = content.get("choices")
    prompt_tokens, completion_tokens = _usage(as_object(content.get("usage")))
    if choices is None and (complaint := content.get("error")):  # some gateways say 200 to everything
        status = as_count(as_object(complaint).get("code")) or 0
        fault = fault_of(status if status >= 400 else None, {}, content)
        fault.billed |= status < 400
        raise fault
    if choices == []:
        empty = "the server answered with an empty list of choices"
        return Answer("failed", None, None, "no_choice", empty, prompt_tokens, completion_tokens)
    entries = [as_object(one) for one in choices] if isinstance(choices, list) else [{}]
    choice = next((one for one in entries if one.get("index") == 0), entries[0])
    message = as_object(choice.get("message")) or choice
    refusal, reason = message.get("refusal"), choice.get("finish_reason")
    text = refusal or _text(message.get("content", message.get("text", 0)))
    if not isinstance(text, str | None):
        raise CallFault("invalid_body", f"the body lacks a choice with text: {as_text(reply)}")
    if not refusal and reason not in _ENDS:
        raise CallFault("invalid_body", f"the answer broke off (finish reason {as_text(reason)})", transient=True)
    completion_tokens = (
        None if text and completion_tokens == 0 else completion_tokens
    )  # no text is written with no token
    return Answer(
        "answered", text or "", "refusal" if refusal else reason, None, None, prompt_tokens, completion_tokens
    )


def _usage(usage: Mapping[str, object]) -> tuple[int | None, int | None]:
    """Return tokens of the prompt and of the answer, None where they are not counted.

    Some endpoints leave what a model thinks out of its answer's tokens, but not out of the total or what they say of it.
    """
    prompt, completion = as_count(usage.get("prompt_tokens")) or None, as_count(usage.get("completion_tokens"))
    total = as_count(usage.get("total_tokens"))
    reasoning = as_count(as_object(usage.get("completion_tokens_details")).get("reasoning_tokens")) or 0
    if completion is not None and reasoning > completion:
        completion += reasoning
    if prompt is not None and completion is not None and total is not None:
        completion = max(completion, total - prompt)
    return prompt, completion


def _text(content: object) -> object:
    """Join the text parts of a message; parts of another kind, such as reasoning, are not the answer."""
    parts = [as_object(part) for part in content] if isinstance(content, list) else []
    texts: list[Any] = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else content


def fault_of(status: object, headers: Mapping[str, str], body: object) -> CallFault:
    """Say what an HTTP status (any but 200) and the error's body mean, as it came or decoded.

    The lines of a batch may have no status.
    """
    try:
        content: Any = json.loads(body) if isinstance(body, bytes) else body
    except (ValueError, RecursionError):
        content = body.decode(errors="replace") if isinstance(body, bytes) else body
    error = as_object(content).get("error", content)
    details = as_object(error)
    text = as_text(details.get("message") or details.get("detail") or error)
    code = as_text(details.get("code") or details.get("type") or "")
    number = status if isinstance(status, int) else 0
    billed = number in {408, 499} or (number >= 500 and number not in _UNDONE)
    fault = CallFault("rejected", f"{number or code or 'error'}: {text}", billed=billed)
    if 300 <= number < 400:
        fault.kind, fault.detail = "redirect", f"{number} to {headers.get('location', 'nowhere')}"
    elif number in _LASTING or (number == 429 and code in _QUOTA):
        fault.kind = _LASTING.get(number, "quota")
    elif any(sign in f"{code} {text}".lower() for sign in _TOO_LONG) and number in {0, 400, 413, 422}:
        fault.kind = "context_too_long"
    elif number in _PASSING or code in _PASSING or number >= 500:
        fault.kind = _PASSING.get(number) or _PASSING.get(code, "server_error")
        fault.transient, fault.retry_after = True, _seconds(headers)
    return fault


def as_object(value: object) -> dict[str, Any]:
    """Return a JSON object, empty if it is none."""
    return value if isinstance(value, dict) else {}


def as_count(value: Any) -> int | None:
    """Return a whole number, None for anything else."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and not isinstance(value, bool) and 0 <= value < 2**53 else None


def as_text(value: object) -> str:
    """Return text as it is and other content as JSON."""
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        return "too deeply nested"


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
