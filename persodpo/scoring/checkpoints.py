"""Which model a scorer runs, and what identifies it: light, so that a scorer can be asked for its identity at no cost.

A checkpoint is a folder or a name on the Hugging Face Hub. Its identity is part of every cached score: for a folder the
hash of all files that shape a score, for a name on the Hub the commit that its revision stands for.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from persodpo.errors import PersodpoError
from persodpo.runfolder import digest_of, sha256

#: What a folder holds besides the model; it shapes no score.
_BESIDE = ("*.md", "*.png", ".*", "scorer.json", "training_args.bin", "trainer_state.json")
#: Without one of these nothing can be on CUDA: they are how a driver shows itself, on Linux and in its subsystem on Windows.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")


@dataclass(frozen=True)
class Checkpoint:
    """A model and where it lies.

    Attributes:
        name: A folder, or a name on the Hugging Face Hub.
        revision: Branch, tag or commit on the Hub; None is its main branch.
    """

    name: str
    revision: str | None = None

    def identity(self) -> dict[str, object]:
        """Return what the model is, JSON-like, and the type of number it computes with.

        Raises:
            PersodpoError: The folder is no model, or the Hub cannot be asked.
        """
        return {**self._content, "dtype": dtype_name()}

    @property
    def commit(self) -> str | None:
        """The commit on the Hub that is scored with, None for a folder; raises as `identity`."""
        found = self._content.get("commit")
        return str(found) if found else None

    @cached_property
    def _content(self) -> dict[str, object]:
        folder = Path(self.name)
        if not folder.is_dir():
            return {"checkpoint": self.name, "commit": _commit(self.name, self.revision)}
        files = {
            path.name: sha256(path)
            for path in sorted(folder.iterdir())
            if path.is_file() and not any(path.match(pattern) for pattern in _BESIDE)
        }
        if "config.json" not in files:
            raise PersodpoError(f"Folder {folder} holds no model (there is no config.json); name a model's own folder.")
        return {"checkpoint": digest_of(files)}


def device_name() -> str:
    """Return ``cuda`` where a GPU can be used, else ``cpu``; torch is loaded only where there may be one."""
    if "torch" not in sys.modules and not any(Path(driver).exists() for driver in _DRIVERS):
        return "cpu"
    import torch  # noqa: PLC0415 - takes seconds

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_name() -> str:
    """Return the type of number that scorers compute with: ``bfloat16`` on CUDA, ``float32`` on a CPU."""
    return "bfloat16" if device_name() == "cuda" else "float32"


def _commit(name: str, revision: str | None) -> str:
    """Return the commit that a revision of a model on the Hub stands for now."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only models on the Hub need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        # The file itself is small; its place in the cache is named after the commit.
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise PersodpoError(
            f"Model '{name}' is neither a folder nor found on the Hugging Face Hub ({type(error).__name__}); name a "
            "folder that holds one, or run again while the network is up."
        ) from error
