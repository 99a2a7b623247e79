"""Checkpoints in, numbers out: what identifies a model, how it is loaded, and how it runs in batches of like length.

Only weights in safetensors are read, and no code that comes with a model is run. torch is imported on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.runfolder import digest_of, sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Files of a folder that shape no score.
_IRRELEVANT = ("*.md", "*.png", ".*", "training_args.bin", "trainer_state.json")


def device_name() -> str:
    """Return ``cuda`` where a GPU can be used, else ``cpu``."""
    import torch  # noqa: PLC0415 - takes seconds

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_name() -> str:
    """Return the number type that checkpoints score in: ``bfloat16`` on CUDA, ``float32`` on a CPU."""
    return "bfloat16" if device_name() == "cuda" else "float32"


@dataclass(frozen=True)
class Checkpoint:
    """A model: a folder, or a name on the Hugging Face Hub with an optional revision (branch, tag or commit)."""

    name: str
    revision: str | None = None

    @cached_property
    def key(self) -> str:
        """Digest of all files of a folder that shape a score; for a name on the Hub, name and commit.

        Raises:
            PersodpoError: The folder holds no model, or the Hub cannot be reached.
        """
        folder = Path(self.name)
        if not folder.is_dir():
            return f"{self.name}@{self.commit}"
        paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not any(map(path.match, _IRRELEVANT))]
        if not (folder / "config.json").is_file():
            raise PersodpoError(f"Folder {folder} holds no model (there is no config.json); name a model's own folder.")
        return digest_of({path.name: sha256(path) for path in paths})

    @cached_property
    def commit(self) -> str | None:
        """Commit on the Hub that the revision stands for now, None for a folder; raises as `key`."""
        if Path(self.name).is_dir():
            return None
        config = self.file("config.json")
        if config is None:
            raise PersodpoError(
                f"Model '{self.name}' is neither a folder nor reachable on the Hugging Face Hub; name a folder that holds "
                "one, or run again while the network is up."
            )
        return config.parent.name  # the Hub's cache names the folder after the commit

    def file(self, name: str) -> Path | None:
        """Return one file of the model, None where there is none."""
        if Path(self.name).is_dir():
            path = Path(self.name) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only models on the Hub need it
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

        try:
            return Path(hf_hub_download(self.name, name, revision=self.revision))
        except (HfHubHTTPError, HFValidationError, OSError):
            return None


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, and its tokenizer, which pads on the right."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(checkpoint: Checkpoint, auto: str, kind: str, dtype: str | None = None) -> Loaded:
    """Load a model.

    Args:
        checkpoint: Which one.
        auto: Name of the transformers class that loads it, such as ``AutoModel``.
        kind: What the model must be, for messages.
        dtype: Number type of the weights; None is `dtype_name`.

    Raises:
        PersodpoError: There is no such model, it is damaged, of another kind, not in safetensors, incomplete, or its
            tokenizer has neither a padding nor an end token.
    """
    import torch  # noqa: PLC0415 - takes seconds
    import transformers  # noqa: PLC0415 - the same
    from safetensors import SafetensorError  # noqa: PLC0415

    name, place = checkpoint.name, {"revision": checkpoint.commit or "main", "trust_remote_code": False}
    weights = {"dtype": getattr(torch, dtype or dtype_name()), "use_safetensors": True, "output_loading_info": True}
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **place)
            model, report = getattr(transformers, auto).from_pretrained(name, **weights, **place)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and ".safetensors" in str(error):
            why = "has no weights in safetensors, the only format that is read; convert it once with save_pretrained"
        else:
            why = f"cannot be loaded ({type(error).__name__})"
        raise PersodpoError(
            f"Model '{name}' {why}, or name {kind}, a folder with its tokenizer or on the Hub."
        ) from error
    lost = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if lost:
        raise PersodpoError(f"Model '{name}' has no trained weights for {lost[0]}; name the checkpoint of {kind}.")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise PersodpoError(f"The tokenizer of '{name}' has no token to pad with; set its pad_token and save it.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # by which decoders find the end of a text
    tokenizer.padding_side = "right"
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return Loaded(model.to(device_name()), tokenizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers silent while it loads: what matters of it is raised."""
    from transformers.utils import logging  # noqa: PLC0415

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


def tokens(
    loaded: Loaded, inputs: Sequence[tuple[str, ...]], max_length: int
) -> tuple[list[dict[str, list[int]]], np.ndarray]:
    """Tokenise single texts or pairs, all of one kind; of a pair that is too long the longer text loses tokens first.

    Returns:
        One row of model inputs each, and the share of its tokens that was cut, 0..1, [inputs].
    """

    def encoded(given: Sequence[tuple[str, ...]], **limits: Any) -> list[dict[str, list[int]]]:
        # Always lists: a lone pair whose second text is empty would be taken for a single text.
        sides = [list(side) for side in zip(*given, strict=True)]
        fields = loaded.tokenizer(*sides, return_attention_mask=False, verbose=False, **limits)
        return [{name: fields[name][row] for name in fields} for row in range(len(given))]

    rows = encoded(inputs)
    cut = np.array([max(0.0, 1 - max_length / len(row["input_ids"])) for row in rows])
    for row in np.flatnonzero(cut).tolist():
        rows[row] = encoded([inputs[row]], truncation="longest_first", max_length=max_length)[0]
    return rows, cut


def run(
    loaded: Loaded,
    rows: Sequence[Mapping[str, Sequence[int]]],
    batch_tokens: int,
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> np.ndarray:
    """Run a model over inputs in batches of like length, the longest first: memory runs out at once or never.

    Args:
        loaded: From `load`.
        rows: Model inputs, at least one.
        batch_tokens: The most tokens of a batch, padding included; a longer input is a batch of its own.
        forward: Batch of padded inputs, [rows, tokens] each -> outputs, [rows, ...].

    Returns:
        The outputs in the order of ``rows``, float64, [rows, ...].

    Raises:
        PersodpoError: An output is not finite.
    """
    import torch  # noqa: PLC0415

    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = np.argsort(-lengths, kind="stable")
    parts, start = [], 0
    while start < len(order):
        places = order[start : start + max(1, batch_tokens // max(1, lengths[order[start]]))]
        batch = loaded.tokenizer.pad([dict(rows[place]) for place in places], return_tensors="pt")
        with torch.inference_mode():
            parts.append(forward(dict(batch.to(loaded.model.device))).to(torch.float64).cpu().numpy())
        start += len(places)
    outputs = np.concatenate(parts)[np.argsort(order)]
    if not np.isfinite(outputs).all():
        raise PersodpoError(f"Model '{loaded.model.name_or_path}' gives values that are not finite; it is damaged.")
    return np.asarray(outputs)
