"""Checkpoints in, numbers out: what identifies a model, how it is loaded, and how it runs in batches of like length.

Only weights in safetensors are read, and no code that comes with a model is run. torch is imported on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.runfolder import digest_of, sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: One text, or a premise and a hypothesis.
Input = tuple[str, ...]
#: Files of a folder that shape no score.
_IRRELEVANT = ("*.md", "*.png", ".*", "training_args.bin", "trainer_state.json")


def device_name() -> str:
    """Return ``cuda`` where a GPU can be used, else ``cpu``."""
    import torch  # noqa: PLC0415 - takes seconds

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_name() -> str:
    """Return the number type that checkpoints score in: ``bfloat16`` on CUDA, ``float32`` on a CPU."""
    return "bfloat16" if device_name() == "cuda" else "float32"


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, and its tokenizer, which pads on the right."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class Checkpoint:
    """A model: a folder, or a name on the Hugging Face Hub. It is loaded when it is first run.

    Attributes:
        auto: Name of the transformers class that loads it.
        kind: What the model must be, for messages.
        dtype: Number type of its weights where it is not `dtype_name`.
    """

    auto, kind = "AutoModel", "a model"
    dtype: str | None = None

    def __init__(self, source: str, batch_tokens: int = 8192) -> None:
        """Name the model, and the most tokens of a batch, padding included; a longer input is a batch of its own."""
        self.source, self.batch_tokens = source, batch_tokens

    @cached_property
    def digest(self) -> str:
        """Digest of all files of a folder that shape a score; for a name on the Hub, name and commit."""
        folder = Path(self.source)
        if not folder.is_dir():
            return f"{self.source}@{self.commit}"
        if not (folder / "config.json").is_file():
            raise PersodpoError(f"Folder {folder} holds no model (there is no config.json); name a model's own folder.")
        paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not any(map(path.match, _IRRELEVANT))]
        return digest_of({path.name: sha256(path) for path in paths})

    @cached_property
    def commit(self) -> str | None:
        """Newest commit on the Hub, None for a folder."""
        if Path(self.source).is_dir():
            return None
        config = self.file("config.json")
        if config is None:
            raise PersodpoError(
                f"Model '{self.source}' is neither a folder nor reachable on the Hugging Face Hub; name a folder that holds "
                "one, or run again while the network is up."
            )
        return config.parent.name  # the Hub's cache names the folder after the commit

    def file(self, name: str) -> Path | None:
        """Return one file of the model, None where there is none."""
        if Path(self.source).is_dir():
            path = Path(self.source) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only models on the Hub need it
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

        try:
            return Path(hf_hub_download(self.source, name))
        except (HfHubHTTPError, HFValidationError, OSError):
            return None

    @cached_property
    def loaded(self) -> Loaded:
        """Model and tokenizer.

        Raises:
            PersodpoError: There is no such model, it is damaged, of another kind, not in safetensors, incomplete, or its
                tokenizer has neither a padding nor an end token.
        """
        import torch  # noqa: PLC0415 - takes seconds
        import transformers  # noqa: PLC0415 - the same
        from safetensors import SafetensorError  # noqa: PLC0415
        from transformers.utils import logging  # noqa: PLC0415

        place = {"revision": self.commit or "main", "trust_remote_code": False}
        weights = {"dtype": getattr(torch, self.dtype or dtype_name()), "use_safetensors": True}
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call] # what matters of it is raised
        if not sys.stderr.isatty():
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.source, **place)
            auto = getattr(transformers, self.auto)
            model, report = auto.from_pretrained(self.source, output_loading_info=True, **weights, **place)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            why = f"cannot be loaded ({type(error).__name__})"
            if isinstance(error, OSError) and ".safetensors" in str(error):
                why = (
                    "has no weights in safetensors, the only format that is read; convert it once with save_pretrained"
                )
            raise PersodpoError(
                f"Model '{self.source}' {why}, or name {self.kind}, a folder with its tokenizer or on the Hub."
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        lost = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if lost:
            raise PersodpoError(
                f"Model '{self.source}' has no trained weights for {lost[0]}; name the checkpoint of {self.kind}."
            )
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise PersodpoError(
                f"The tokenizer of '{self.source}' has no token to pad with; set its pad_token and save it."
            )
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id  # by which decoders find the end of a text
        tokenizer.padding_side = "right"
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        return Loaded(model.to(device_name()), tokenizer)

    def tokens(self, inputs: Sequence[Input], max_length: int) -> tuple[list[dict[str, list[int]]], np.ndarray]:
        """Tokenise texts or pairs, all of one kind; of a pair that is too long the longer text loses tokens first.

        Returns:
            One row of model inputs each, and the share of its tokens that was cut, 0..1, [inputs].
        """
        # Always lists: a lone pair whose second text is empty would be taken for a single text.
        sides = [list(side) for side in zip(*inputs, strict=True)]
        plain = {"return_attention_mask": False, "verbose": False}
        lengths = [len(ids) for ids in self.loaded.tokenizer(*sides, **plain)["input_ids"]]
        fields = self.loaded.tokenizer(*sides, truncation="longest_first", max_length=max_length, **plain)
        rows = [{name: fields[name][row] for name in fields} for row in range(len(inputs))]
        return rows, np.maximum(0.0, 1 - max_length / np.array(lengths))

    def run(
        self,
        rows: Sequence[Mapping[str, Sequence[int]]],
        forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    ) -> np.ndarray:
        """Run the model in batches of like length, the longest first: memory runs out at once or never.

        Args:
            rows: Model inputs, at least one.
            forward: Batch of padded inputs, [rows, tokens] each -> outputs, [rows, ...].

        Returns:
            The outputs in the order of ``rows``, float64, [rows, ...]; outputs that are not finite are refused.
        """
        import torch  # noqa: PLC0415

        lengths = np.array([len(row["input_ids"]) for row in rows])
        order = np.argsort(-lengths, kind="stable")
        parts, start = [], 0
        while start < len(order):
            places = order[start : start + max(1, self.batch_tokens // max(1, lengths[order[start]]))]
            batch = self.loaded.tokenizer.pad([dict(rows[place]) for place in places], return_tensors="pt")
            with torch.inference_mode():
                parts.append(forward(dict(batch.to(self.loaded.model.device))).to(torch.float64).cpu().numpy())
            start += len(places)
        outputs = np.concatenate(parts)[np.argsort(order)]
        if not np.isfinite(outputs).all():
            raise PersodpoError(f"Model '{self.source}' gives values that are not finite; it is damaged.")
        return np.asarray(outputs)
