"""A real OpenAI-compatible server on a loopback port that misbehaves on demand and keeps a log of what it did.

Run as a program it prints its port and serves until it is killed. What it does with a prompt is written in the prompt:
``<<fault=status_429 times=2 after=1>>`` answers its first two requests with 429 and ``Retry-After: 1``, then well; without
``times`` the fault stays. With ``--faults 0.3`` that share of all other requests meets a fault too, drawn from `RANDOM`.
Every line of the log is a JSON object: ``received`` with what was asked, ``delivered`` once the whole answer was handed to
the operating system, ``call`` for what concerns files and batches (`Batches`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import json
import logging
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import uvicorn

MARK = re.compile(r"<<(.*?)>>")
RANDOM = ["status_429", "status_429_after", "status_500", "status_503", "hang", "cut", "invalid", "broken_off", "html"]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


def completion(prompt: str) -> str:
    """Return the answer to a prompt, the same every time."""
    return json.dumps({"response": f"You said {hashlib.sha256(prompt.encode()).hexdigest()[:16]}."})


def body_of(asked: dict[str, Any], prompt: str, **changes: Any) -> dict[str, Any]:
    """Return a well-formed body, with changes to its choice."""
    chat = "messages" in asked
    text = completion(prompt)
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    usage = {"prompt_tokens": len(prompt.encode()) // 4 + 4, "completion_tokens": len(text) // 4}
    return {
        "id": "answer-1", "object": "chat.completion" if chat else "text_completion", "created": 1,
        "model": asked["model"], "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, **said, **changes}],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }  # fmt: skip


class FaultyServer:
    """The ASGI application."""

    def __init__(self, log: Path, latency: float, faults: float, seed: int, batches: Batches) -> None:
        """Open the log."""
        self.log = log.open("a", buffering=1, encoding="utf-8")
        self.latency, self.faults, self.seed, self.batches = latency, faults, seed, batches
        self.seen: Counter[str] = Counter()

    def note(self, event: str, prompt: str, **more: Any) -> None:
        self.log.write(json.dumps({"event": event, "prompt": prompt, "time": time.time(), **more}) + "\n")

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        raw = b""
        while (part := await receive())["type"] == "http.request":
            raw += part.get("body", b"")
            if not part.get("more_body"):
                break
        else:
            return  # its sender was killed between two packets, so nothing was asked
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        key = " ".join(filter(None, map(headers.get, ("authorization", "proxy-authorization"))))
        path = scope["path"].removeprefix("/v1")
        if path.startswith(("/files", "/batches")):
            self.note("call", "", call=f"{scope['method']} {path}", key=key)
            if path.startswith("/batches/") and self.batches.fault == "drip":
                await self.go_on(send, pause=0.1, count=30)
                return
            status, body = await self.batches.reply(scope["method"], path, raw, headers)
            await self.answer(send, "", body, status, content_type="application/json; charset=bogus")
            return
        asked = json.loads(raw)
        prompt = asked["prompt"] if "prompt" in asked else asked["messages"][-1]["content"]
        fields = {name: value for name, value in asked.items() if name not in {"messages", "prompt"}}
        self.note("received", prompt, path=scope["path"], key=key, fields=fields, headers=headers)
        self.seen[prompt] += 1
        await asyncio.sleep(self.latency)
        fault, after = self.choose(prompt)
        if fault is None:
            await self.answer(send, prompt, body_of(asked, prompt))
        else:
            await self.misbehave(fault, after, receive, send, asked=asked, prompt=prompt, key=key)

    def choose(self, prompt: str) -> tuple[str | None, str]:
        """Return the fault that this request meets, and what to say in Retry-After."""
        if marked := MARK.search(prompt):
            words = dict(word.split("=") for word in marked[1].split())
            meets = self.seen[prompt] <= int(words.get("times", 10**9))
            return (words["fault"] if meets else None), words.get("after", "")
        drawn = random.Random(f"{self.seed} {prompt} {self.seen[prompt]}")
        return (drawn.choice(RANDOM) if drawn.random() < self.faults else None), ""

    async def answer(self, send: Send, prompt: str, body: Any, status: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"content-type": "application/json", "content-length": str(len(raw)), **headers}
        lines = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in named.items()]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": raw})
        if status == 200 and prompt:
            self.note("delivered", prompt)

    async def misbehave(
        self, fault: str, after: str, receive: Receive, send: Send, *, asked: dict[str, Any], prompt: str, key: str
    ) -> None:
        """Do what the fault says."""
        told = {"retry_after": after.replace("_", " ")} if after else {}
        if fault == "status_429_after":
            fault, told = "status_429", {"retry_after": "0.2"}
        if fault.startswith("status_"):
            status = int(fault.removeprefix("status_"))
            message = {"message": f"status {status} on demand; you sent Authorization: {key}", "headers": [key]}
            await self.answer(send, prompt, {"error": message}, status, **told)
        elif fault == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
        elif fault == "cut":
            headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"choices": [', "more_body": True})
            raise ConnectionAbortedError("cut on demand")
        elif fault == "endless":
            await self.go_on(send)
        elif fault == "redirect":
            await self.answer(send, prompt, {}, 307, location="/v1/elsewhere")
        elif fault == "bomb":
            packed = gzip.compress(json.dumps(body_of(asked, prompt)).encode() + b" " * 60_000_000)
            await self.answer(send, prompt, packed, content_encoding="gzip")
        elif fault == "html":
            await self.answer(send, prompt, b"<html>Please sign in</html>", content_type="text/html")
        elif fault == "context":
            error = {"message": "This model's maximum context length is 10 tokens.", "code": "context_length_exceeded"}
            await self.answer(send, prompt, {"error": error}, 400)
        elif fault == "quota":
            await self.answer(send, prompt, {"error": {"message": "No credit.", "code": "insufficient_quota"}}, 429)
        else:
            odd = {"set_cookie": "a=\xff", "server": "caf\xe9"} if fault == "odd_header" else {}
            await self.answer(
                send, prompt, self.odd_body(fault, asked, prompt, key), 201 if fault == "created" else 200, **odd
            )

    @staticmethod
    async def go_on(send: Send, pause: float = 0.0, count: int = 100_000) -> None:
        """Send a body without end, until nobody listens."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        with contextlib.suppress(Exception):
            for _ in range(count):
                await asyncio.sleep(pause)
                await send({"type": "http.response.body", "body": b" " * 100_000, "more_body": True})

    @staticmethod
    def odd_body(fault: str, asked: dict[str, Any], prompt: str, key: str) -> Any:
        """Return a body that is sent with status 200 and yet is no plain answer."""
        say = {"role": "assistant", "content": None, "refusal": None}
        thought = {"prompt_tokens": 9, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 9982}}
        bodies: dict[str, Any] = {
            "invalid": b'{"choices": [{"message": ',
            "wrong_shape": {"hello": [1, 2]},
            "list": [],
            "null_message": body_of(asked, prompt, message=None),
            "number": body_of(asked, prompt, message={**say, "content": 7}),
            "empty_choices": {**body_of(asked, prompt), "choices": []},
            "refusal": body_of(asked, prompt, message={**say, "refusal": "I will not say that."}),
            "filter": body_of(asked, prompt, message=say, finish_reason="content_filter"),
            "length": body_of(asked, prompt, finish_reason="length"),
            "no_usage": {**body_of(asked, prompt), "usage": None},
            "zero_usage": {**body_of(asked, prompt), "usage": {"prompt_tokens": 0, "completion_tokens": 0}},
            "total_usage": {
                **body_of(asked, prompt),
                "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 10_000},
            },
            "error_body": {"error": {"message": "Slow down.", "code": 429}},
            "order": {
                "choices": [{"index": 1, "finish_reason": "stop", "text": "x"}, *body_of(asked, prompt)["choices"]]
            },
            "thought": body_of(asked, prompt) | {"usage": thought},
            "thought_total": body_of(asked, prompt)
            | {"usage": thought | {"total_tokens": 18.0, "completion_tokens_details": {"reasoning_tokens": 9982.0}}},
            "surrogate": body_of(asked, prompt, message={**say, "content": "half \ud83d and \x00"}),
            "huge_usage": {**body_of(asked, prompt), "usage": {"prompt_tokens": 10**30, "completion_tokens": -1}},
            "deep": b'{"choices": ' + b"[" * 100_000,
            "broken_off": body_of(asked, prompt, finish_reason="error"),
            "odd_reason": body_of(asked, prompt, finish_reason=["stop"]),
            "odd_type": body_of(asked, prompt, message={**say, "content": [{"type": {}, "text": "x"}]}),
            **dict.fromkeys(("odd_header", "created"), body_of(asked, prompt)),
            "null_part": body_of(asked, prompt, message={**say, "content": [{"type": "text", "text": None}]}),
            "nested": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
            "key_in_shape": {"x": "y" * 185 + key},
            "key_in_reason": body_of(asked, prompt, finish_reason="z" * 25 + key),
            "parts": body_of(
                asked,
                prompt,
                message={
                    **say,
                    "content": [
                        {"type": "thinking", "text": "Hm."},
                        {"type": "text", "text": "one "},
                        {"type": "text", "text": "two"},
                    ],
                },
            ),
            "reasoning": body_of(
                asked, prompt, message={**say, "content": completion(prompt), "reasoning_content": "Let me think."}
            ),
            "odd_parts": body_of(asked, prompt, message={**say, "content": [{"type": "image", "url": "x"}]}),
            "usage": {**body_of(asked, prompt), "usage": {"prompt_tokens": 100_000, "completion_tokens": 5}},
            "echo": body_of(asked, prompt, message={**say, "content": f"Your key is {key}."}),
        }
        return bodies[fault]


class Batches:
    """The files and batches of an endpoint, kept in memory.

    What is done with a prompt is written in it: ``<<error>>`` gives an error line, ``<<error=429>>`` one of that status,
    ``<<error=code>>`` one of that code, ``<<garbage>>`` a line that is no JSON, ``<<deep>>`` one that nests deeply,
    ``<<status>>`` and ``<<reason>>`` an odd status and finish reason, ``<<twice>>`` an answer and an error, ``<<lines>>`` an
    answer with line separators, ``<<echo>>`` the key that came with the batch, ``<<use>>`` more use than was allowed,
    ``<<missing>>`` none at all; ``<<refused>>`` fails the whole batch, ``<<expired>>`` lets it expire.
    """

    def __init__(self, looks: int, fault: str) -> None:
        """Call a batch done after so many looks.

        Faults: ``none`` knows no batches; ``create`` never says that it made one, ``unmade`` makes none and lists one
        page for ever; ``same`` makes none either and names files by content; ``no_list`` makes none at first, lists
        none; ``named`` puts the key into its name; ``drip`` sends it slowly; ``gone`` forgets a batch, ``no_errors``
        its errors; ``failed`` ends it in the middle; ``times`` says no times, ``words`` its status otherwise;
        ``no_output``, ``no_file``, ``half_file``, ``html_file`` and ``html_state`` show it wrongly at first. A batch is
        known to the key that it was made with.
        """
        self.looks, self.fault = looks, fault
        self.first = fault in {"no_output", "no_file", "half_file", "html_file", "html_state", "no_list"}
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []

    async def reply(  # noqa: PLR0911, PLR0912
        self, method: str, path: str, raw: bytes, headers: dict[str, str]
    ) -> tuple[int, Any]:
        if self.fault == "none":
            return 404, {"error": {"message": "Not Found"}}
        if (method, path) == ("POST", "/files"):
            return 200, self.file(uploaded(raw, headers["content-type"]))
        if (method, path) == ("POST", "/batches"):
            batch = {
                "id": f"batch-{len(self.batches)}", "object": "batch", "created_at": int(time.time()), "looks": 0,
                "status": "validating", "errors": None, "key": headers.get("authorization"), **json.loads(raw),
            }  # fmt: skip
            if self.fault in {"unmade", "same"} or (self.fault == "no_list" and self.first):
                self.first = False
                return 504, {"error": {"message": "no answer in time"}}
            self.batches.insert(0, batch)
            if self.fault == "create":
                await asyncio.sleep(600)
            return 200, batch | ({"id": batch["key"]} if self.fault == "named" else {})
        if path == "/batches" and self.fault == "no_list":
            return 405, {"error": {"message": "Method Not Allowed"}}
        if path == "/batches":
            other = [{"id": "other", "metadata": "x"}] if self.fault == "unmade" else []
            return 200, {"object": "list", "data": [*other, *self.batches], "has_more": bool(other)}
        name = path.split("/")[2]
        if path.startswith("/files"):
            content = self.files.get(name)
            if content is None or (self.first and self.fault == "no_file"):
                self.first = False
                return 404, {"error": {"message": "No such file"}}
            if self.first and self.fault in {"half_file", "html_file"}:
                self.first = False
                content = b"<html>Sign in</html>" if self.fault == "html_file" else content[: len(content) // 2]
            return 200, content
        batch = next(batch for batch in self.batches if batch["id"] == name)
        if self.fault == "gone" or batch["key"] != headers.get("authorization"):
            return 404, {"error": {"message": "No such batch"}}
        batch["looks"] += 1
        batch["status"] = "in_progress"
        if batch["looks"] > self.looks:
            self.finish(batch)
            if self.first and self.fault in {"no_output", "html_state"}:
                self.first = False
                return 200, b"<html>Sign in</html>" if self.fault == "html_state" else {**batch, "output_file_id": None}
        return 200, batch

    def file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{hashlib.sha256(content).hexdigest() if self.fault == 'same' else len(self.files)}"
        self.files[name] = content
        return {
            "id": name, "object": "file", "bytes": len(content), "created_at": 1, "filename": "x", "purpose": "batch",
            "status": "processed",
        }  # fmt: skip

    def finish(self, batch: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        texts = [line["body"].get("prompt") or line["body"]["messages"][-1]["content"] for line in lines]
        if any("<<refused>>" in text for text in texts):
            error = {"code": "invalid", "message": "a prompt that is refused", "line": 1, "param": None}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
            return
        good = [self.good(line, text, batch["key"]) for line, text in zip(lines, texts, strict=True)]
        bad = [self.bad(line, text) for line, text in zip(lines, texts, strict=True) if "<<error" in text]
        batch |= {"status": "expired" if any("<<expired>>" in text for text in texts) else "completed"}
        batch["completed_at"] = batch["created_at"] + 60
        batch["request_counts"] = {"total": len(lines), "completed": sum(line is not None for line in good)}
        if self.fault == "words":
            batch["status"] = "Succeeded"
        if self.fault == "times":
            batch |= {"created_at": None, "completed_at": float("nan")}
        if self.fault == "failed":
            batch |= {"status": "failed", "errors": ["the node died"]}
        batch["output_file_id"] = self.file("\n".join(filter(None, good)).encode())["id"]
        batch["error_file_id"] = self.file("\n".join(bad).encode())["id"] if bad else None
        if self.fault == "no_errors":
            batch["error_file_id"] = "forgotten"

    @staticmethod
    def bad(line: dict[str, Any], text: str) -> str:
        found = re.search("<<error=(.*?)>>", text)
        code = found[1] if found else "400"
        error = {"message": "no such thing", "code": None if code.isdigit() else code}
        response = {"status_code": int(code), "body": {"error": error}} if code.isdigit() else None
        return json.dumps({"custom_id": line["custom_id"], "response": response, "error": None if response else error})

    @staticmethod
    def good(line: dict[str, Any], text: str, key: str | None) -> str | None:
        if re.search("<<(error|missing|expired)", text):
            return None
        if "<<garbage>>" in text:
            return "{" * 20
        if "<<deep>>" in text:
            return f'{{"custom_id": "{line["custom_id"]}", "response": ' + "[" * 100_000
        body = body_of(line["body"], text)
        said = body["choices"][0]["message"]
        if "<<lines>>" in text:
            said["content"] = "one\u2028two\x85three"
        if "<<echo>>" in text:
            said["content"] = f"Your key is {key}."
        if "<<reason>>" in text:
            body["choices"][0]["finish_reason"] = ["stop"]
        if "<<use>>" in text:
            body["usage"]["prompt_tokens"] = 100_000
        response = {"status_code": [500] if "<<status>>" in text else "200", "request_id": "1", "body": body}
        said = {"custom_id": line["custom_id"], "error": None, "response": response}
        again = "\n" + json.dumps({**said, "response": {"status_code": 500}}) if "<<twice>>" in text else ""
        return json.dumps(said, ensure_ascii=False) + again


def uploaded(raw: bytes, content_type: str) -> bytes:
    """Take the file out of a multipart form."""
    message = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + raw)
    parts: list[Message] = message.get_payload()
    return next(part.get_payload(decode=True) for part in parts if part.get_filename())


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before anything is answered")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--looks", type=int, default=1, help="at a batch before it is done")
    parser.add_argument("--batch-fault", default="")
    asked = parser.parse_args()
    logging.disable()  # cut connections are wanted here
    # Only for a socket that names TCP does asyncio turn off the delay that joins small packets, here 40 ms an answer.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(512)
    print(listening.getsockname()[1], flush=True)
    batches = Batches(asked.looks, asked.batch_fault)
    app = FaultyServer(asked.log, asked.latency, asked.faults, asked.seed, batches)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=60)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
