"""A model of this machine behind ``transformers serve``, asked over HTTP as any other endpoint is.

The server is started when the model is first asked and ended with the run. It listens on loopback only, on a port that is
free at that moment.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from pathlib import Path

import httpx

from persodpo.config import OpenAIModel, Prices, ServedModel
from persodpo.errors import PersodpoError
from persodpo.generation.budget import Purse
from persodpo.generation.local import folder_digest
from persodpo.generation.openai_api import OpenAIBackend
from persodpo.generation.requests import AnswerRequest, Limits

HOST = "127.0.0.1"
#: Pause between two looks at a server that is starting, seconds; and the longest wait for one that is told to end.
LOOK, END = 0.2, 10.0


class ServedBackend:
    """A backend (`persodpo.generation.requests.Backend`) that starts its own server."""

    def __init__(self, settings: ServedModel, weights: str | Path) -> None:
        """Name the model; nothing is started yet.

        Args:
            settings: How it is served and asked.
            weights: A folder or a name on the Hugging Face Hub.
        """
        self.settings = settings
        self.weights = weights
        self.model = settings.model
        self.concurrency = settings.concurrency
        self.prices: Prices | None = Prices(input_per_million=0, output_per_million=0)
        self.limits = Limits()
        self.local = True

    def identity(self) -> Mapping[str, object]:
        """Name the weights by their content; the port is of no matter."""
        return {"kind": "served", "weights": self._digest}

    @cached_property
    def _digest(self) -> str:
        return folder_digest(Path(self.weights)) or str(self.weights)

    @asynccontextmanager
    async def open(self, purse: Purse) -> AsyncIterator[AnswerRequest]:
        """Start the server and connect.

        Raises:
            PersodpoError: The server cannot be started, ends by itself, or does not answer in time.
        """
        port = _free_port()
        with _started(self.weights, port) as process:
            try:
                await self._wait(process, port)
                endpoint = OpenAIModel(
                    kind="openai", model=self.model, served_as=str(self.weights), base_url=f"http://{HOST}:{port}/v1",
                    format=self.settings.format, concurrency=self.concurrency, prices=self.prices,
                    timeout_seconds=self.settings.timeout_seconds,
                )  # fmt: skip
                async with OpenAIBackend(endpoint).open(purse) as answer:
                    yield answer
            finally:
                process.terminate()
                await asyncio.to_thread(_end, process)

    async def _wait(self, process: subprocess.Popen[bytes], port: int) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + self.settings.startup_seconds
        async with httpx.AsyncClient() as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise PersodpoError(
                        f"transformers serve ended by itself (status {process.returncode}) before it could serve model "
                        f"{self.model}; try it by hand: transformers serve {self.weights} --port {port}."
                    )
                with suppress(httpx.TransportError):
                    if (await client.get(f"http://{HOST}:{port}/health", timeout=5)).status_code == 200:
                        return
                await asyncio.sleep(LOOK)
        raise PersodpoError(
            f"transformers serve did not answer for model {self.model} within {self.settings.startup_seconds:g} s; raise "
            "startup_seconds of its entry in generation.backends."
        )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def _started(weights: str | Path, port: int) -> subprocess.Popen[bytes]:
    """Start the server; a local folder is served without asking the Hub for anything."""
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(weights), "--host", HOST, "--port", str(port)]
    offline = {"HF_HUB_OFFLINE": "1"} if Path(weights).is_dir() else {}
    environment = os.environ | offline | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        return subprocess.Popen(  # noqa: S603 - our own program, no shell
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise PersodpoError(
            f"{program} cannot be started ({error.strerror}); install transformers[serving] into this environment."
        ) from error


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a server that was told to end, and kill it if it will not."""
    try:
        process.wait(END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
