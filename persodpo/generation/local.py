"""A model of this machine: transformers' ``generate``, many prompts of like length together, or one on a warm model.

Greedy by default: the model's own generation settings without their sampling and beams, as the authors ran it. On CUDA
weights are bfloat16, elsewhere float32. A batch that does not fit the memory is halved.
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
from persodpo.files import place_of
from persodpo.generation.ask import Work
from persodpo.generation.requests import Answer, Backend, ModelStopped, Request, folder_digest

#: Prompts sorted by length together, for each one of a batch.
POOL = 8
#: A text that every model can go on from; where one cannot, the fault is not with its prompts.
HARMLESS = "warm up"
WARM_UP = Request("warm-up", HARMLESS, 8, 0.0, None, "")
#: Entries of a model's generation config that would end answers otherwise than by its end of text.
ENDING = ("forced_eos_token_id", "exponential_decay_length_penalty", "stop_strings", "token_healing")
#: Loads a model and its tokenizer: name or folder; ``dtype`` by keyword.
Loader = Callable[..., tuple[Any, Any]]


class TransformersBackend(Backend):
    """Answers over transformers' ``generate``."""

    def __init__(self, settings: TransformersModel, weights: str | Path, load: Loader) -> None:
        """Name a folder or a model on the Hugging Face Hub; it is loaded when there is something to ask."""
        self.settings = settings
        self.weights = weights
        self.model = settings.model
        self.batch_size = settings.batch_size
        self.concurrency = 1 if settings.batch_size == 1 else settings.batch_size * POOL
        self._load = load

    def identity(self) -> Mapping[str, object]:
        """Name the weights by their content, and whether prompts are answered alone: other times are other measurements."""
        shape = {"kind": "transformers", "alone": self.batch_size == 1, "stop": self.settings.stop_at_json}
        return {**shape, **self._contents}

    @cached_property
    def _contents(self) -> dict[str, object]:
        adapter = self.settings.adapter and Path(place_of(self.settings.adapter))
        return {
            "weights": folder_digest(Path(self.weights)) or str(self.weights),
            "adapter": adapter and (folder_digest(adapter) or str(adapter)),
            "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        }

    async def run(self, work: Work) -> None:
        """Load the model and answer batch by batch, the longest prompts of those that wait first."""
        try:
            decoder = await asyncio.to_thread(Decoder, self.settings, self.weights, self._load)
        except PersodpoError as error:
            raise ModelStopped(str(error)) from error
        except Exception as error:
            raise ModelStopped(
                f"Model {self.model} cannot be loaded ({_said(error)}); check its files, or use a smaller model or a larger "
                "GPU."
            ) from error
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
        """Load the model, and warm it up where prompts are answered one at a time; arguments as of `TransformersBackend`."""
        self.cancelled = threading.Event()
        self._settings = settings
        cuda = torch.cuda.is_available()
        dtype = torch.bfloat16 if cuda else torch.float32
        model, tokenizer = load(weights, dtype=dtype)
        model = _with_adapter(model, Path(place_of(settings.adapter))) if settings.adapter else model
        self._model: Any = model.to("cuda" if cuda else "cpu")
        self._tokenizer = tokenizer
        for name in ENDING:
            setattr(self._model.generation_config, name, None)
        ends = self._model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        if ends is None:
            raise PersodpoError(f"Model {settings.model} has no end-of-text token; use a tokenizer that names one.")
        self._ends = sorted(ends if isinstance(ends, list) else [ends])
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(self._ends[0])
        self._limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
        self.hardware = _hardware(dtype)
        if settings.batch_size == 1:
            self._decode([self._ids(HARMLESS)], [WARM_UP])

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer a batch under the temperature and seed of its first request.

        Raises:
            ModelStopped: Not even a single prompt fits the memory, or no prompt at all can be answered.
        """
        ids: dict[int, list[int]] = {}
        answers: dict[int, Answer] = {}
        for n, request in enumerate(requests):
            try:
                size = len(tokens := self._ids(request.prompt))
            except Exception as error:
                answers[n] = self._rejected(request, error)
                continue
            if size + request.max_new_tokens <= self._limit:
                ids[n] = tokens
                continue
            sentence = (
                f"The prompt of {size} tokens and an answer of {request.max_new_tokens} do not fit the "
                f"{self._limit} tokens that {self._settings.model} takes."
            )
            answers[n] = Answer("failed", failure="context_too_long", error=sentence, prompt_tokens=size)
        answers |= zip(ids, self._halving(list(ids.values()), [requests[n] for n in ids]), strict=True)
        return [replace(answers[n], hardware=self.hardware) for n in range(len(requests))]

    def _halving(self, ids: list[list[int]], requests: list[Request]) -> list[Answer]:
        """Answer a batch, or its halves where it does not fit the memory or the model fails on one of its prompts."""
        if not ids:
            return []
        try:
            return self._decode(ids, requests)
        except Exception as error:
            if len(ids) == 1 and not should_reduce_batch_size(error):
                return [self._rejected(requests[0], error)]
            if len(ids) == 1:
                raise ModelStopped(
                    f"Model {self._settings.model} runs out of memory on a single prompt of {len(ids[0])} tokens; use a "
                    "smaller model or a larger GPU."
                ) from error
        clear_device_cache(garbage_collection=True)  # after the error is gone, which holds the tensors
        half = len(ids) // 2
        return self._halving(ids[:half], requests[:half]) + self._halving(ids[half:], requests[half:])

    def _rejected(self, request: Request, error: Exception) -> Answer:
        """Return the failure of a prompt that cannot be answered, where a harmless one in its place can.

        Raises:
            ModelStopped: That one cannot be answered either.
        """
        name, form, chat = self._settings.model, self._settings.format, request.prompt
        prompt = HARMLESS if isinstance(chat, str) else tuple(turn | {"content": HARMLESS} for turn in chat)
        try:
            ids = self._ids(prompt)
        except Exception as again:
            raise ModelStopped(
                f"The tokenizer of model {name} cannot write format {form} ({_said(again)}); "
                "choose chat (no system message) or raw for it."
            ) from again
        try:
            self._decode([ids], [replace(request, prompt=prompt)])
        except Exception as again:
            raise ModelStopped(f"Model {name} cannot go on from its prompts ({_said(again)}).") from again
        return Answer("failed", failure="rejected", error=_said(error))

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
            rows_out = self._model.generate(
                input_ids=rows, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([stop])
            )  # fmt: skip
        seconds = time.perf_counter() - started
        read = zip(rows_out[:, width:].tolist(), ids, requests, map(stop.closed.get, range(len(ids))), strict=True)
        return [replace(self._read(*row), latency=seconds, batch_size=len(ids)) for row in read]

    def _read(self, tokens: list[int], prompt: list[int], request: Request, closed: int | None) -> Answer:
        """Take one completion out of its row, which goes on with padding after its end."""
        completion = tokens[: min(closed or request.max_new_tokens, request.max_new_tokens)]
        end = next((place for place, token in enumerate(completion) if token in self._ends), None)
        ended = end is not None or len(completion) == closed
        completion = completion[:end]
        return Answer(
            "answered", str(self._tokenizer.decode(completion, skip_special_tokens=True)), "stop" if ended else "length",
            prompt_tokens=len(prompt), completion_tokens=len(completion),
        )  # fmt: skip

    def _config(self, temperature: float | None, max_new_tokens: int) -> Any:
        """Return the model's own generation settings, no beams: greedy, or drawn from the whole softmax at a temperature."""
        config = GenerationConfig.from_dict(self._model.generation_config.to_dict())
        config.update(  # type: ignore[no-untyped-call]
            do_sample=bool(temperature), temperature=temperature or None, top_p=1.0 if temperature else None,
            top_k=0 if temperature else None, max_length=None, max_new_tokens=max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id, eos_token_id=self._ends, num_beams=1, num_return_sequences=1,
            return_dict_in_generate=False, max_time=float("inf"),
        )  # fmt: skip
        return config

    def _ids(self, prompt: str | Sequence[Any]) -> list[int]:
        """Tokenise a prompt, a chat by the tokenizer's own template; a model is not asked after its own end of text."""
        if isinstance(prompt, str):
            ids = list(self._tokenizer(prompt)["input_ids"])
            return ids[:-1] if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id else ids
        text = self._tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        if not text:
            raise ValueError("its template writes nothing")
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


def _said(error: Exception) -> str:
    """Return what an error says, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _hardware(dtype: torch.dtype) -> str:
    """Say what answers are computed on, so that times of different machines are never averaged."""
    kind = str(dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {kind}"
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpus.read_text()) if cpus.is_file() else []
    return f"{[*names, platform.machine()][0]}, {torch.get_num_threads()} threads, {kind}"
