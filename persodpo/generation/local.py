"""A model of this machine: transformers' ``generate``, many prompts of like length together, or one on a warm model.

Greedy by default: the model's own generation settings without their sampling, as the authors ran it. On CUDA weights are
bfloat16, elsewhere float32. A batch that does not fit the memory is halved.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import platform
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from persodpo.completions import KEY, without_reasoning
from persodpo.config import TransformersModel
from persodpo.errors import PersodpoError
from persodpo.generation.ask import Work
from persodpo.generation.requests import Answer, Backend, ModelStopped, Request, folder_digest

#: Prompts sorted by length together, for each one of a batch.
POOL = 8
WARM_UP = Request("warm-up", "warm up", 8, 0.0, None, "")
#: Loads a model and its tokenizer: name or folder; ``dtype`` and ``revision`` by keyword.
Loader = Callable[..., tuple[Any, Any]]


class TransformersBackend(Backend):
    """Answers over transformers' ``generate``."""

    def __init__(self, settings: TransformersModel, weights: str | Path, load: Loader) -> None:
        """Name a folder or a model on the Hugging Face Hub; it is loaded when there is something to ask."""
        self.settings = settings
        self.weights = weights
        self.model = settings.model
        self.batch_size = 1 if settings.mode == "latency" else settings.batch_size
        self.concurrency = 1 if settings.mode == "latency" else settings.batch_size * POOL
        self._load = load

    def identity(self) -> Mapping[str, object]:
        """Name the weights by their content, and the mode, for times of different modes are different measurements."""
        shape = {"kind": "transformers", "mode": self.settings.mode, "stop": self.settings.stop_at_json}
        return {**shape, **self._contents}

    @cached_property
    def _contents(self) -> dict[str, object]:
        adapter = self.settings.adapter
        return {
            "weights": folder_digest(Path(self.weights)) or [str(self.weights), self.settings.revision],
            "adapter": adapter and (folder_digest(adapter) or str(adapter)),
            "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        }

    async def run(self, work: Work) -> None:
        """Load the model and answer batch by batch, the longest prompts of those that wait first."""
        try:
            decoder = await asyncio.to_thread(Decoder, self.settings, self.weights, self._load)
        except PersodpoError as error:
            raise ModelStopped(str(error)) from error
        try:
            while pool := await work.take(self.concurrency):
                pool.sort(key=lambda item: -item[1].prompt_bytes)
                for start in range(0, len(pool), self.batch_size):
                    batch = pool[start : start + self.batch_size]
                    # Not to the end where the run is interrupted: half a batch is none.
                    answers = await asyncio.to_thread(decoder.answer, [request for _, request in batch])
                    done = zip(batch, answers, strict=True)
                    await asyncio.gather(*(work.done(*item, answer) for item, answer in done))
        finally:
            decoder.cancelled.set()


class Decoder:
    """A loaded model and its tokenizer."""

    def __init__(self, settings: TransformersModel, weights: str | Path, load: Loader) -> None:
        """Load the model, and warm it up for latency mode; arguments as of `TransformersBackend`."""
        self.cancelled = threading.Event()
        self._settings = settings
        cuda = torch.cuda.is_available()
        dtype = torch.bfloat16 if cuda else torch.float32
        model, tokenizer = load(weights, dtype=dtype, revision=settings.revision)
        model = _with_adapter(model, settings.adapter) if settings.adapter else model
        self._model: Any = model.to("cuda" if cuda else "cpu")
        self._tokenizer = tokenizer
        ends = self._model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        if ends is None:
            raise PersodpoError(f"Model {settings.model} has no end-of-text token; use a tokenizer that names one.")
        self._ends = sorted(ends if isinstance(ends, list) else [ends])
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(self._ends[0])
        self._limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
        self.hardware = _hardware(dtype)
        if settings.mode == "latency":
            self._decode([self._ids(WARM_UP.prompt)], [WARM_UP])

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer a batch under the temperature and seed of its first request.

        Raises:
            ModelStopped: Not even a single prompt fits the memory, or the tokenizer cannot write chats.
        """
        ids = [self._ids(request.prompt) for request in requests]
        fits = [n for n, request in enumerate(requests) if len(ids[n]) + request.max_new_tokens <= self._limit]
        answers = dict(zip(fits, self._halving([ids[n] for n in fits], [requests[n] for n in fits]), strict=True))
        for n in set(range(len(ids))) - set(fits):
            said = (
                f"The prompt of {len(ids[n])} tokens and an answer of {requests[n].max_new_tokens} do not fit the "
                f"{self._limit} tokens that {self._settings.model} takes."
            )
            answers[n] = Answer("failed", failure="context_too_long", error=said, prompt_tokens=len(ids[n]))
        return [replace(answers[n], hardware=self.hardware) for n in range(len(ids))]

    def _halving(self, ids: list[list[int]], requests: list[Request]) -> list[Answer]:
        """Answer a batch, or its halves where it does not fit the memory."""
        if not ids:
            return []
        try:
            return self._decode(ids, requests)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                said = str(error).partition("\n")[0][:200]
                raise ModelStopped(f"Model {self._settings.model} cannot go on from its prompts ({said}).") from error
            if len(ids) == 1:
                raise ModelStopped(
                    f"Model {self._settings.model} runs out of memory on a single prompt of {len(ids[0])} tokens; use a "
                    "smaller model or a larger GPU."
                ) from error
        clear_device_cache(garbage_collection=True)  # after the error is gone, which holds the tensors
        half = len(ids) // 2
        return self._halving(ids[:half], requests[:half]) + self._halving(ids[half:], requests[half:])

    def _decode(self, ids: list[list[int]], requests: list[Request]) -> list[Answer]:
        """Let the model go on from prompts that are padded on the left to one length."""
        started = time.perf_counter()
        width = max(map(len, ids))
        padding, device = self._tokenizer.pad_token_id, self._model.device
        rows = torch.tensor([[padding] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        stop = _Stopping(self._tokenizer, width, self.cancelled, at_json=self._settings.stop_at_json)
        with torch.inference_mode(), torch.random.fork_rng(enabled=bool(requests[0].temperature)):
            if requests[0].temperature and requests[0].seed is not None:
                text = f"{requests[0].seed} {[request.prompt for request in requests]!r}".encode("utf-8", "replace")
                torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:4], "big"))
            config = self._config(requests[0].temperature, max(request.max_new_tokens for request in requests))
            made = self._model.generate(
                input_ids=rows, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([stop])
            )  # fmt: skip
        seconds = time.perf_counter() - started
        read = zip(made[:, width:].tolist(), ids, requests, map(stop.closed.get, range(len(ids))), strict=True)
        return [replace(self._read(*row), latency=seconds, batch_size=len(ids)) for row in read]

    def _read(self, tokens: list[int], prompt: list[int], request: Request, closed: int | None) -> Answer:
        """Take one completion out of its row, which goes on with padding after its end."""
        said = tokens[: min(closed or request.max_new_tokens, request.max_new_tokens)]
        end = next((place for place, token in enumerate(said) if token in self._ends), None)
        ended = end is not None or len(said) == closed
        said = said[:end]
        return Answer(
            "answered", str(self._tokenizer.decode(said, skip_special_tokens=True)), "stop" if ended else "length",
            prompt_tokens=len(prompt), completion_tokens=len(said),
        )  # fmt: skip

    def _config(self, temperature: float | None, max_new_tokens: int) -> Any:
        """Return the model's own generation settings: greedy, or drawn from the whole softmax at a temperature."""
        config = GenerationConfig.from_dict(self._model.generation_config.to_dict())
        config.update(  # type: ignore[no-untyped-call]
            do_sample=bool(temperature), temperature=temperature or None, top_p=1.0 if temperature else None,
            top_k=0 if temperature else None, max_length=None, max_new_tokens=max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id, eos_token_id=self._ends,
        )  # fmt: skip
        return config

    def _ids(self, prompt: str | Sequence[Any]) -> list[int]:
        """Tokenise a prompt, a chat by the tokenizer's own template; a model is not asked after its own end of text."""
        if isinstance(prompt, str):
            ids = list(self._tokenizer(prompt)["input_ids"])
            return ids[:-1] if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id else ids
        try:
            text = self._tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
            if not text:
                raise ValueError("its template writes nothing")
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise ModelStopped(
                f"The tokenizer of model {self._settings.model} cannot write format {self._settings.format} ({said}); "
                "choose chat (no system message) or raw for it."
            ) from error
        # The template writes the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class _Stopping(StoppingCriteria):
    """Ends rows at the end of their JSON object, and all of them on an interrupt."""

    def __init__(self, tokenizer: Any, width: int, cancelled: threading.Event, *, at_json: bool) -> None:
        self._tokenizer, self._width, self._cancelled, self._at_json = tokenizer, width, cancelled, at_json
        self.closed: dict[int, int] = {}  # row -> its new tokens up to the end of its object

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for row, ids in enumerate(input_ids if self._at_json else ()):
            if row in self.closed or "}" not in self._tokenizer.decode(ids[-1:]):
                continue
            if is_closed(self._tokenizer.decode(ids[self._width :])):
                self.closed[row] = len(ids) - self._width
        over = self._cancelled.is_set()
        return torch.tensor([over or row in self.closed for row in range(len(input_ids))], device=input_ids.device)


def is_closed(text: str) -> bool:
    """Tell whether the object is closed that the strict reading takes: from the first brace on, after any reasoning."""
    text = without_reasoning(text)
    try:
        return KEY in json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    except (ValueError, RecursionError):
        return False


def _with_adapter(model: Any, folder: Path) -> Any:
    """Put a LoRA adapter on a model; only weights in safetensors are read."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise PersodpoError(
            f"{folder} holds no adapter_model.safetensors; name the folder of a LoRA adapter saved by peft."
        )
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise PersodpoError(
            f"The adapter in {folder} does not fit its model ({type(error).__name__}); name the weights it was trained on."
        ) from error


def _hardware(dtype: torch.dtype) -> str:
    """Say what answers are computed on, so that times of different machines are never averaged."""
    kind = str(dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {kind}"
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpus.read_text()) if cpus.is_file() else []
    return f"{[*names, platform.machine()][0]}, {torch.get_num_threads()} threads, {kind}"
