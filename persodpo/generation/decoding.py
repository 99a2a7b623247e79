"""Prompts of one batch in, their answers out: loading a causal language model, and decoding with transformers' ``generate``.

Greedy decoding is the model's own generation settings without their sampling, as the authors ran it. On CUDA weights are
bfloat16, elsewhere float32.
"""

from __future__ import annotations

import hashlib
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from persodpo.config import TransformersModel
from persodpo.errors import PersodpoError
from persodpo.generation.requests import Answer, ModelStopped, Request
from persodpo.generation.stopping import ObjectEnd
from persodpo.training.policy import load_policy

WARM_UP_TOKENS = 8
#: Positions, padding included, of the prompts that are read at a time.
PREFILL_POSITIONS = 2048


class Decoder:
    """A loaded model and its tokenizer."""

    def __init__(self, settings: TransformersModel, weights: str | Path) -> None:
        """Load the model, and warm it up for latency mode.

        Args:
            settings: How the model is asked.
            weights: A folder or a name on the Hugging Face Hub.

        Raises:
            PersodpoError: The model or its adapter cannot be loaded, or it has no chat template where it needs one.
        """
        self._settings = settings
        self._cancelled = threading.Event()
        cuda = torch.cuda.is_available()
        dtype = torch.bfloat16 if cuda else torch.float32
        model: Any
        self._tokenizer: Any
        model, self._tokenizer = load_policy(weights, dtype=dtype, revision=settings.revision)
        if settings.adapter is not None:
            model = _with_adapter(model, settings.adapter)
        self._model: Any = model.to("cuda" if cuda else "cpu")
        self._check_tokenizer()
        self._limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self.hardware = _hardware(dtype)
        if settings.mode == "latency":
            self._decode([self._ids("warm up")], [Request("warm-up", "warm up", WARM_UP_TOKENS, 0.0, None, "")])

    def cancel(self) -> None:
        """Let a batch that is being decoded end at its next token."""
        self._cancelled.set()

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer a batch; one that does not fit the memory is halved.

        Args:
            requests: The batch; temperature is the first one's.

        Returns:
            An answer for each, in their order. A prompt that leaves no room for its longest answer fails.

        Raises:
            ModelStopped: Not even a single prompt fits the memory.
        """
        ids = [self._ids(request.prompt) for request in requests]
        room = float("inf") if self._limit is None else self._limit
        places = [p for p, request in enumerate(requests) if len(ids[p]) + request.max_new_tokens <= room]
        found = dict(zip(places, self._halving([ids[p] for p in places], [requests[p] for p in places]), strict=True))
        return [found.get(place) or self._too_long(ids[place], request) for place, request in enumerate(requests)]

    def _too_long(self, ids: list[int], request: Request) -> Answer:
        error = (
            f"The prompt of {len(ids)} tokens and an answer of {request.max_new_tokens} do not fit the {self._limit} tokens "
            f"that {self._settings.model} takes."
        )
        return Answer("failed", failure="context_too_long", error=error, prompt_tokens=len(ids), hardware=self.hardware)

    def _halving(self, ids: list[list[int]], requests: list[Request]) -> list[Answer]:
        if not requests:
            return []
        try:
            return self._decode(ids, requests)
        except torch.OutOfMemoryError as error:
            if len(requests) == 1:
                raise ModelStopped(
                    f"Model {self._settings.model} runs out of GPU memory on a single prompt of {len(ids[0])} tokens; use a "
                    "smaller model or a larger GPU."
                ) from error
        torch.cuda.empty_cache()
        half = len(requests) // 2
        return self._halving(ids[:half], requests[:half]) + self._halving(ids[half:], requests[half:])

    def _decode(self, ids: list[list[int]], requests: list[Request]) -> list[Answer]:
        """Decode one batch and time it."""
        started = time.perf_counter()
        width = max(map(len, ids))
        padding = self._tokenizer.pad_token_id
        rows = torch.tensor([[padding] * (width - len(row)) + row for row in ids], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self._model.device)
        watch = _Watch(self._tokenizer, requests, width, self._cancelled, stop_at_json=self._settings.stop_at_json)
        drawing = _Drawing.of(requests)
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=rows,
                attention_mask=mask,
                past_key_values=self._prefill(ids, width),
                generation_config=self._greedy(max(request.max_new_tokens for request in requests)),
                stopping_criteria=StoppingCriteriaList([watch]),
                logits_processor=LogitsProcessorList([drawing] if drawing else []),
            )
        tokens = made[:, width:].tolist()
        seconds = time.perf_counter() - started
        return [
            self._read(row, len(prompt), request, seconds=seconds, batch_size=len(requests), closed=closed)
            for row, prompt, request, closed in zip(tokens, ids, requests, watch.closed, strict=True)
        ]

    def _prefill(self, ids: list[list[int]], width: int) -> DynamicCache | None:
        """Read all of the prompts but their last tokens, few of like length at a time, so that little is padding.

        Returns:
            Their keys and values, padded on the left to ``width`` less one; None where a single token is all there is, or
            the model keeps something else than every key and value.
        """
        cache = DynamicCache(config=self._model.config)
        if width < 2 or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        device = self._model.device
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        states: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in cache.layers]
        for group in _groups([len(ids[row]) - 1 for row in order], PREFILL_POSITIONS):
            read = [ids[order[place]][:-1] for place in group]
            longest = max(1, *map(len, read))
            tokens = torch.tensor([[0] * (longest - len(row)) + row for row in read], device=device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in read], device=device)
            kept = self._model(
                input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=DynamicCache(config=self._model.config), logits_to_keep=1, use_cache=True,
            ).past_key_values  # fmt: skip
            for found, layer in zip(states, kept.layers, strict=True):
                found.append(tuple(pad(part, (0, 0, width - 1 - longest, 0)) for part in (layer.keys, layer.values)))
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)
        for number, found in enumerate(states):
            keys, values = (torch.cat(parts)[back] for parts in zip(*found, strict=True))
            found.clear()
            cache.update(keys, values, number)
        return cache

    def _read(
        self,
        tokens: list[int],
        prompt_tokens: int,
        request: Request,
        *,
        seconds: float,
        batch_size: int,
        closed: int | None,
    ) -> Answer:
        """Take one completion out of its row, which goes on with padding after its end."""
        ends = self._end_tokens()
        length = closed or request.max_new_tokens
        said = tokens[:length]
        end = next((place for place, token in enumerate(said) if token in ends), None)
        said = said if end is None else said[:end]
        return Answer(
            "answered",
            str(self._tokenizer.decode(said, skip_special_tokens=True)),
            "length" if end is None and closed is None else "stop",
            prompt_tokens=prompt_tokens, completion_tokens=len(said), latency=seconds, batch_size=batch_size,
            hardware=self.hardware,
        )  # fmt: skip

    def _end_tokens(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        return set(ends if isinstance(ends, list) else [ends])

    def _greedy(self, max_new_tokens: int) -> GenerationConfig:
        """Return the model's own generation settings without sampling."""
        config = GenerationConfig.from_dict(self._model.generation_config.to_dict())
        config.update(  # type: ignore[no-untyped-call]
            do_sample=False, temperature=None, top_p=None, top_k=None, max_length=None, max_new_tokens=max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=sorted(self._end_tokens()),
        )  # fmt: skip
        return config

    def _ids(self, prompt: str | Sequence[Any]) -> list[int]:
        """Tokenise a prompt, a chat by the tokenizer's own template."""
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        text = self._tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer that cannot do what the settings ask for, before anything is answered."""
        settings, tokenizer = self._settings, self._tokenizer
        if tokenizer.eos_token_id is None and self._model.generation_config.eos_token_id is None:
            raise PersodpoError(f"Model {settings.model} has no end-of-text token; use a tokenizer that names one.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(min(self._end_tokens()))
        if settings.format == "raw":
            return
        system = [{"role": "system", "content": "x"}] if settings.format == "chat_with_system" else []
        try:
            tokenizer.apply_chat_template([*system, {"role": "user", "content": "x"}], tokenize=False)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise PersodpoError(
                f"The tokenizer of model {settings.model} cannot write format {settings.format} ({said}); choose chat (no "
                "system message) or raw for it."
            ) from error


def _groups(lengths: Sequence[int], positions: int) -> Iterator[list[int]]:
    """Part ascending lengths into runs that hold at most so many positions once padded; at least one each."""
    group: list[int] = []
    for place, length in enumerate(lengths):
        if group and length * (len(group) + 1) > positions:
            yield group
            group = []
        group.append(place)
    yield group


class _Watch(StoppingCriteria):
    """Ends rows at their own longest length or at the end of their JSON object, and all of them on an interrupt."""

    def __init__(
        self, tokenizer: Any, requests: Sequence[Request], width: int, cancelled: threading.Event, *, stop_at_json: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._width = width
        self._cancelled = cancelled
        self._longest = [request.max_new_tokens for request in requests]
        self._ends = [ObjectEnd() for _ in requests] if stop_at_json else []
        #: Tokens of each row up to the end of its object, None while it is open.
        self.closed: list[int | None] = [None] * len(requests)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        length = input_ids.shape[1] - self._width
        for row, end in enumerate(self._ends):
            if self.closed[row] is None and end.feed(self._tokenizer.decode(input_ids[row, -1:])):
                self.closed[row] = length
        over = self._cancelled.is_set()
        rows = zip(self.closed, self._longest, strict=True)
        done = [over or closed is not None or length >= longest for closed, longest in rows]
        return torch.tensor(done, device=input_ids.device)


class _Drawing(LogitsProcessor):
    """Draws tokens: the largest of the logits over the temperature plus Gumbel noise is a sample of their softmax."""

    def __init__(self, temperature: float, generators: list[torch.Generator]) -> None:
        self._temperature = temperature
        self._generators = generators

    @classmethod
    def of(cls, requests: Sequence[Request]) -> _Drawing | None:
        """Return the drawing that a batch asks for, None for a greedy one."""
        temperature = requests[0].temperature
        if not temperature:
            return None
        generators = [torch.Generator() for _ in requests]
        for generator, request in zip(generators, requests, strict=True):
            if request.seed is None:
                generator.seed()
            else:
                text = f"{request.seed} {request.prompt!r}".encode("utf-8", "replace")
                generator.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:4], "big"))
        return cls(temperature, generators)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = scores.shape[1]
        noise = torch.stack([torch.empty(width).exponential_(generator=generator) for generator in self._generators])
        return scores.float() / self._temperature - torch.log(noise).to(scores.device)


def _with_adapter(model: Any, folder: Path) -> Any:
    """Put a LoRA adapter on a model; only weights in safetensors are read."""
    from peft import PeftModel  # noqa: PLC0415 - only needed with an adapter

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
    return f"{_processor()}, {torch.get_num_threads()} threads, {kind}"


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
