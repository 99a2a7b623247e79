"""A model of this machine behind ``transformers serve``, asked over HTTP as any other endpoint is.

The server listens on loopback only, on a port that is free at that moment, and ends with the run, or with this process
however that ends.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import httpx2

from persodpo.config import OpenAIModel, Prices, TransformersModel
from persodpo.generation.ask import Work
from persodpo.generation.endpoint import OpenAIBackend
from persodpo.generation.requests import ModelStopped, folder_digest

HOST = "127.0.0.1"
#: Longest wait for one answer, seconds.
ANSWER_SECONDS = 600.0
#: Runs a program until it ends or its standard input does, which is when the parent dies or lets go of it. Where there is
#: Linux's prctl, the program is killed when this one is.
_LEASH = """
import ctypes, os, signal, subprocess, sys, threading
leash, prctl = os.getpid(), getattr(ctypes.CDLL(None), "prctl", None)
def tie():
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != leash:
        os._exit(1)
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=tie if prctl else None)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
def watch():
    sys.stdin.read()
    server.terminate()
    threading.Timer(10, server.kill).start()
threading.Thread(target=watch, daemon=True).start()
sys.exit(server.wait())
"""


class ServedBackend(OpenAIBackend):
    """Answers of an endpoint that is started for them."""

    local = True
    startup_seconds = 120.0  # longest wait for the server

    def __init__(self, settings: TransformersModel, weights: str | Path) -> None:
        """Name the weights, a folder or a name on the Hub; nothing is started yet."""
        super().__init__(OpenAIModel(
            model=settings.model, served_as=str(weights), base_url=f"http://{HOST}/v1", format=settings.format,
            concurrency=min(settings.batch_size, 500), timeout_seconds=ANSWER_SECONDS,
            prices=Prices(input_per_million=0, output_per_million=0),
        ))  # fmt: skip
        self._weights = str(weights)
        self._digest = folder_digest(Path(weights)) or str(weights)

    def identity(self) -> Mapping[str, object]:
        """Name the weights by their content, and whether one request is under way at a time; the port is of no matter."""
        return {"kind": "served", "weights": self._digest, "alone": self.concurrency == 1}

    async def run(self, work: Work) -> None:
        """Start the server, ask it, and end it; a local folder is served without asking the Hub for anything."""
        program = Path(sys.executable).with_name("transformers")
        if not program.is_file():
            raise ModelStopped(f"{program} is not there; install transformers[serving] into this environment.")
        if Path(self._weights).is_dir() and ("@" in self._weights or not folder_digest(Path(self._weights))):
            raise ModelStopped(
                f"{self._weights} cannot be served: it must hold weights in safetensors and have no @ in its path, of which "
                "the server takes the rest for a revision."
            )
        with socket.socket() as free:
            free.bind((HOST, 0))
            address = f"http://{HOST}:{free.getsockname()[1]}"
        self.settings = self.settings.model_copy(update={"base_url": f"{address}/v1"})
        command = [str(program), "serve", self._weights, "--host", HOST, "--port", address.rpartition(":")[2]]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
        offline = {"HF_HUB_OFFLINE": "1"} if Path(self._weights).is_dir() else {}
        with subprocess.Popen(  # noqa: S603 - our own program, no shell
            [sys.executable, "-c", _LEASH, *command], env=environment | offline | {"HF_HUB_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as server:  # fmt: skip
            await self._wait(server, f"{address}/health")
            await super().run(work)

    async def _wait(self, server: subprocess.Popen[bytes], health: str) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + self.startup_seconds
        async with httpx2.AsyncClient(trust_env=False) as client:
            while server.poll() is None and time.monotonic() < deadline:
                with suppress(httpx2.TransportError):
                    if (await client.get(health, timeout=5)).status_code == 200:
                        return
                await asyncio.sleep(0.2)
        ended = server.poll()
        did = f"did not answer within {self.startup_seconds:g} s" if ended is None else f"ended with status {ended}"
        raise ModelStopped(
            f"transformers serve {did} for model {self.model}; try it by hand: transformers serve {self._weights}."
        )
