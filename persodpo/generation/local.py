"""A model of this machine as a backend: greedy by default, many prompts together or one at a time on a warm model.

Prompts wait in a pool as the engine hands them in; the longest waiting ones are answered together, so that little is
padding. Sampling draws each token with a generator of the prompt's own, so a seed gives the same text whatever else is in
the batch. A batch that does not fit the memory is halved.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from persodpo.config import Prices, TransformersModel
from persodpo.generation.budget import Purse
from persodpo.generation.requests import Answer, AnswerRequest, Limits, Request
from persodpo.generation.writing import in_thread
from persodpo.runfolder import sha256

if TYPE_CHECKING:
    from persodpo.generation.decoding import Decoder

#: Prompts in the pool for each one of a batch, so that a batch can be made of prompts of like length.
POOL = 8


class TransformersBackend:
    """A backend (`persodpo.generation.requests.Backend`) over transformers' ``generate``."""

    def __init__(self, settings: TransformersModel, weights: str | Path) -> None:
        """Name the model; nothing is loaded yet.

        Args:
            settings: How it is asked.
            weights: A folder or a name on the Hugging Face Hub.
        """
        self.settings = settings
        self.weights = weights
        self.model = settings.model
        self.batch_size = 1 if settings.mode == "latency" else settings.batch_size
        self.concurrency = 1 if settings.mode == "latency" else settings.batch_size * POOL
        self.prices = Prices(input_per_million=0, output_per_million=0)
        self.limits = Limits()
        self.local = True

    def identity(self) -> Mapping[str, object]:
        """Name the weights by their content, and the mode, for times of different modes are different measurements."""
        return {
            "kind": "transformers",
            "mode": self.settings.mode,
            "stop": self.settings.stop_at_json,
            **self._contents,
        }

    @cached_property
    def _contents(self) -> dict[str, object]:
        import torch  # noqa: PLC0415 - slow to load

        adapter = self.settings.adapter
        return {
            "weights": folder_digest(Path(self.weights)) or [str(self.weights), self.settings.revision],
            "adapter": adapter and (folder_digest(adapter) or str(adapter)),
            "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        }

    @asynccontextmanager
    async def open(self, purse: Purse) -> AsyncIterator[AnswerRequest]:
        """Load the model; ``purse`` is not touched.

        Raises:
            PersodpoError: The model or its adapter cannot be loaded, or it has no chat template where it needs one.
        """
        from persodpo.generation.decoding import Decoder  # noqa: PLC0415 - slow to load

        decoder = await in_thread(Decoder, self.settings, self.weights)
        session = _Session(decoder, self.batch_size)
        try:
            yield session.answer
        finally:
            decoder.cancel()
            await session.close()


class _Session:
    """Prompts that wait, and the one task that answers them batch by batch."""

    def __init__(self, decoder: Decoder, batch_size: int) -> None:
        self._decoder = decoder
        self._batch_size = batch_size
        self._pool: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._task: asyncio.Task[None] | None = None

    async def answer(self, request: Request) -> Answer:
        """Answer one request; see `persodpo.generation.requests.Backend.open`."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pool.append((request, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await future

    async def close(self) -> None:
        """End the task that answers."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        """Answer what waits until nothing does."""
        # All that ask at this moment are in the pool before the first batch is made.
        await asyncio.sleep(0)
        while self._pool:
            self._pool.sort(key=lambda waiting: waiting[0].prompt_bytes)
            batch, self._pool = self._pool[-self._batch_size :], self._pool[: -self._batch_size]
            try:
                answers = await in_thread(self._decoder.answer, [request for request, _ in batch])
            except Exception as error:
                for _, future in (*batch, *self._pool):
                    if not future.done():
                        future.set_exception(error)
                self._pool.clear()
                return
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
            # Those that were answered hand in their next prompts.
            await asyncio.sleep(0)


def folder_digest(folder: Path) -> str | None:
    """Return the hex sha256 of a model's or adapter's files, None if there is no such folder.

    Pictures, cards and records beside the model shape no answer and are left out.
    """
    files = sorted(
        path for path in folder.glob("*") if path.suffix in {".safetensors", ".json", ".txt", ".model", ".jinja"}
    )
    files = [path for path in files if path.name not in {"policy.json", "arm.json", "trainer_state.json"}]
    if not any(path.suffix == ".safetensors" for path in files):
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()
