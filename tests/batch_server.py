"""A real server of the files and batches of an OpenAI-compatible endpoint, on a loopback port.

Run as a program it prints its port and serves until it is killed. It keeps everything in memory, logs every call as a JSON
line, and calls a batch done after ``--looks`` looks at it. What it does with a prompt is written in the prompt:
``<<error>>`` gives an error line, ``<<error=429>>`` one of that status, ``<<error=code>>`` one of that code,
``<<garbage>>`` a line that is no JSON, ``<<deep>>`` one that nests deeply, ``<<lines>>`` an answer with line separators,
``<<missing>>`` none at all; a prompt with
``<<refused>>`` fails the whole batch, one with ``<<expired>>`` lets it expire. With ``--fault create`` a batch is made, but
the answer to the call that made it never comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import socket
import time
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import uvicorn
from faulty_server import body_of


class BatchServer:
    """The ASGI application."""

    def __init__(self, log: Path, looks: int, fault: str) -> None:
        """Open the log."""
        self.log = log.open("a", buffering=1, encoding="utf-8")
        self.looks, self.fault = looks, fault
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        raw = b""
        while True:
            part = await receive()
            raw += part.get("body", b"")
            if not part.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        path = scope["path"].removeprefix("/v1")
        self.log.write(
            json.dumps({"call": f"{scope['method']} {path}", "key": headers.get("authorization", "")}) + "\n"
        )
        status, body = await self.reply(scope["method"], path, raw, headers)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": content})

    async def reply(self, method: str, path: str, raw: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        if self.fault == "none at all":
            return 404, {"error": {"message": "Not Found"}}
        if (method, path) == ("POST", "/files"):
            return 200, self.file(uploaded(raw, headers["content-type"]))
        if (method, path) == ("POST", "/batches"):
            self.batches.insert(0, self.batch(json.loads(raw)))
            if self.fault == "create":
                await asyncio.sleep(600)
            return 200, shown(self.batches[0])
        if path == "/batches":
            return 200, {"object": "list", "data": [shown(batch) for batch in self.batches], "has_more": False}
        name = path.split("/")[2]
        if path.startswith("/batches/"):
            return 200, self.look(next(batch for batch in self.batches if batch["id"] == name))
        return 200, self.files[name]

    def file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return {
            "id": name, "object": "file", "bytes": len(content), "created_at": 1, "filename": "x", "purpose": "batch",
            "status": "processed",
        }  # fmt: skip

    def batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"batch-{len(self.batches)}", "object": "batch", "created_at": int(time.time()), "looks": 0,
            "status": "validating", "errors": None, **asked,
        }  # fmt: skip

    def look(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["looks"] += 1
        batch["status"] = "in_progress"
        if batch["looks"] > self.looks:
            self.finish(batch)
        return shown(batch)

    def finish(self, batch: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        texts = [line["body"].get("prompt") or line["body"]["messages"][-1]["content"] for line in lines]
        if any("<<refused>>" in text for text in texts):
            error = {"code": "invalid", "message": "a prompt that is refused", "line": 1, "param": None}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
            return
        good, bad = [], []
        for line, text in zip(lines, texts, strict=True):
            answer = {"id": "1", "custom_id": line["custom_id"], "error": None}
            if marked := re.search("<<error=(.*?)>>", text):
                status = int(marked[1]) if marked[1].isdigit() else None
                error = {"message": "no such luck", "code": None if status else marked[1]}
                response = {"status_code": status, "request_id": "1", "body": {"error": error}} if status else None
                bad.append(json.dumps({**answer, "response": response, "error": None if status else error}))
            elif "<<error>>" in text:
                error = {"error": {"message": "no such thing"}}
                bad.append(json.dumps({**answer, "response": {"status_code": 400, "request_id": "1", "body": error}}))
            elif "<<garbage>>" in text:
                good.append("{" * 20)
            elif "<<deep>>" in text:
                good.append(f'{{"custom_id": "{line["custom_id"]}", "response": ' + "[" * 100_000)
            elif "<<missing>>" not in text and "<<expired>>" not in text:
                body = body_of(line["body"], text)
                if "<<lines>>" in text:
                    body["choices"][0]["message"]["content"] = "one\u2028two\x85three"
                response = {"status_code": 200, "request_id": "1", "body": body}
                good.append(json.dumps({**answer, "response": response}, ensure_ascii=False))
        batch |= {"status": "expired" if any("<<expired>>" in text for text in texts) else "completed"}
        batch["completed_at"] = batch["created_at"] + 60
        batch["output_file_id"] = self.file("\n".join(good).encode())["id"]
        batch["error_file_id"] = self.file("\n".join(bad).encode())["id"] if bad else None


def shown(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "looks"}


def uploaded(raw: bytes, content_type: str) -> bytes:
    """Take the file out of a multipart form."""
    message = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + raw)
    parts: list[Message] = message.get_payload()
    return next(part.get_payload(decode=True) for part in parts if part.get_filename())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--looks", type=int, default=1)
    parser.add_argument("--fault", default="")
    asked = parser.parse_args()
    logging.disable()
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    print(listening.getsockname()[1], flush=True)
    app = BatchServer(asked.log, asked.looks, asked.fault)
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")).run(sockets=[listening])


if __name__ == "__main__":
    main()
