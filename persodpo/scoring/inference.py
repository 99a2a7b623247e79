"""Checkpoints in, numbers out: loading models for scoring, and running them in batches of like length."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from persodpo.errors import PersodpoError
from persodpo.scoring.checkpoints import Checkpoint, device_name, dtype_name
from persodpo.scoring.nli_model import CLASSES, classes

#: Parameters below which one thread is faster than several.
TINY = 5_000_000
#: Tokens of a batch of such a model, so that there is one for every core.
TINY_BATCH = 4096
#: One model input by field: input_ids, and token_type_ids where the model has them.
Row = Mapping[str, Sequence[int]]


class Loaded(NamedTuple):
    """A model ready to score, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_classifier(checkpoint: Checkpoint) -> Loaded:
    """Load a sequence classifier; raises as `load_yes_no`, also where it has no trained head."""
    wanted = "a fine-tuned sequence classifier (persodpo finetune-scorer makes one)"
    return _complete(checkpoint, wanted, *_load(checkpoint, AutoModelForSequenceClassification, wanted))


def load_yes_no(checkpoint: Checkpoint, dtype: str | None = None) -> Loaded:
    """Load an encoder-decoder model.

    Only weights in safetensors are read, and no code that comes with a model is run.

    Args:
        checkpoint: Which one.
        dtype: Type of number of the weights; None is what scorers compute with.

    Returns:
        The model, in evaluation mode where it will run, and its tokenizer.

    Raises:
        PersodpoError: There is no such model, it is damaged, of another kind, not in safetensors, or incomplete.
    """
    wanted = "an encoder-decoder model such as T5"
    return _complete(checkpoint, wanted, *_load(checkpoint, AutoModelForSeq2SeqLM, wanted, dtype))


def load_base_classifier(checkpoint: Checkpoint, dtype: str | None = None) -> Loaded:
    """Load any BERT-like model to fine-tune as a classifier of `persodpo.scoring.nli_model.CLASSES`.

    A model that knows the classes keeps their order; any other gets a new head.

    Args:
        checkpoint: Which one.
        dtype: As in `load_yes_no`.

    Returns:
        Model and tokenizer.

    Raises:
        PersodpoError: As `load_yes_no`.
    """
    wanted = "a BERT-like model"
    try:
        own = AutoConfig.from_pretrained(checkpoint.name, revision=checkpoint.commit or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PersodpoError(_why_not_loaded(checkpoint.name, wanted, error)) from error
    given = [str(name) for _, name in sorted((own.id2label or {}).items())]
    names = dict(enumerate(classes(given) or CLASSES))
    head = {"id2label": names, "label2id": {name: n for n, name in names.items()}, "ignore_mismatched_sizes": True}
    loaded, _ = _load(checkpoint, AutoModelForSequenceClassification, wanted, dtype, **head)
    return loaded


def _complete(checkpoint: Checkpoint, wanted: str, loaded: Loaded, missing: Sequence[str]) -> Loaded:
    if missing:
        raise PersodpoError(
            f"Model '{checkpoint.name}' has no trained weights for {missing[0]}; name the checkpoint of {wanted}."
        )
    return loaded


def _load(
    checkpoint: Checkpoint, auto: Any, wanted: str, dtype: str | None = None, **more: Any
) -> tuple[Loaded, list[str]]:
    """Load model and tokenizer; also return the names of weights that the checkpoint lacks."""
    name, places = checkpoint.name, {"revision": checkpoint.commit or "main", "trust_remote_code": False}
    settings = {"dtype": getattr(torch, dtype or dtype_name()), "use_safetensors": True, "output_loading_info": True}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, **places)
            model, report = auto.from_pretrained(name, **settings, **places, **more)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise PersodpoError(_why_not_loaded(name, wanted, error)) from error
    return Loaded(model.to(device_name()), tokenizer), sorted(report["missing_keys"])


def _why_not_loaded(name: str, wanted: str, error: Exception) -> str:
    """Say what is wrong with a checkpoint and what to do."""
    if isinstance(error, OSError) and ".safetensors" in str(error):
        return (
            f"Model '{name}' has no weights in safetensors, the only format that is read (others can run code); convert "
            "it once with transformers' save_pretrained, or name a revision that has them."
        )
    return (
        f"Model '{name}' cannot be loaded ({type(error).__name__}); name a folder that holds {wanted} with its tokenizer, "
        "or one on the Hugging Face Hub while the network is up."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what transformers says while it loads and saves: what matters of it is raised."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: several only wait for each other where matrices are tiny, and sums come in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield places of inputs of like length, so that little of a batch is padding.

    Args:
        lengths: Tokens of each input.
        batch_tokens: The most tokens of a batch, padding included; a longer input is a batch of its own.

    Yields:
        Places, the longest inputs first: memory runs out at once or never.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def run(
    loaded: Loaded, rows: Sequence[Row], batch_tokens: int, forward: Callable[[dict[str, torch.Tensor]], torch.Tensor]
) -> np.ndarray:
    """Run a model over inputs in batches of like length.

    Args:
        loaded: From `load_classifier` or `load_yes_no`.
        rows: Model inputs.
        batch_tokens: As in `batches`.
        forward: Takes a batch (input_ids, attention_mask and what else the rows have, [rows, tokens], padded on the
            right) and returns logits, [rows, classes].

    Returns:
        The logits in the order of ``rows``, float64, [rows, classes].

    Raises:
        PersodpoError: A logit is not finite.
    """
    small = loaded.model.device.type == "cpu" and loaded.model.num_parameters() < TINY
    lengths = [len(row["input_ids"]) for row in rows]

    def one(places: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = forward(_padded([rows[place] for place in places], loaded)).to(torch.float64).cpu().numpy()
        if not np.isfinite(logits).all():
            raise PersodpoError(
                f"Model '{loaded.model.name_or_path}' gives values that are not finite; its weights are damaged or do not "
                "fit the type of number it runs in."
            )
        return np.asarray(logits)

    if small:
        parts = list(batches(lengths, min(batch_tokens, TINY_BATCH)))
        # Batches side by side, each on one thread: several threads in one batch would only wait for each other.
        with one_thread(), ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(one, parts))
    else:
        parts = list(batches(lengths, batch_tokens))
        found = [one(places) for places in parts]
    back = np.argsort(np.concatenate(parts))
    return np.concatenate(found)[back]


def _padded(rows: Sequence[Row], loaded: Loaded) -> dict[str, torch.Tensor]:
    fill = {"input_ids": loaded.tokenizer.pad_token_id, "token_type_ids": loaded.tokenizer.pad_token_type_id}
    batch = {
        field: pad_sequence([torch.tensor(row[field]) for row in rows], batch_first=True, padding_value=fill[field])
        for field in rows[0]
    }
    ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    batch["attention_mask"] = pad_sequence(ones, batch_first=True)
    return {field: tensor.to(loaded.model.device) for field, tensor in batch.items()}
