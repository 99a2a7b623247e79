"""Which models a profile names, and whether their weights lie on this machine; only names and small JSON files are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub.constants
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from persodpo.artifacts import PROJECT, read_json
from persodpo.doctor.files import asked
from persodpo.doctor.findings import Finding, gib, missing, ok, unknown
from persodpo.scoring.computed import SMALL
from persodpo.settings import Profile, ServedModel, TransformersModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: One of these holds a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
MINIATURE = "miniature/"
#: What a scorer's own model is fine-tuned on.
FORMATS = {"coherence": "coherence", "c_score": "dialogue_nli", "ue_score": "snli"}


@dataclass(frozen=True)
class Model:
    """A model of this machine that a profile names.

    Attributes:
        name: A folder or a name on the Hugging Face Hub; ``small`` and ``miniature/<name>`` are made on the spot.
        use: What for.
        kind: ``answers`` to prompts, is the ``policy``, or a ``scorer``.
        revision: Of the Hub.
        chat: Whether it is asked in its chat format.
        adapter: Folder of a LoRA adapter.
    """

    name: str
    use: str
    kind: str
    revision: str | None = None
    chat: bool = False
    adapter: Path | None = None

    @property
    def is_made(self) -> bool:
        """Whether the run makes the model itself."""
        return self.name == SMALL or self.name.startswith(MINIATURE)

    @property
    def folder(self) -> Path | None:
        """The folder of the model on this machine, complete or not: its own, or the one in the Hub's cache."""
        places = (PROJECT / self.name, Path(self.name)) if self.kind == "answers" else (Path(self.name),)
        for place in places:
            if place.is_dir():
                return place
        return self._cached[1]

    @property
    def can_be_fetched(self) -> bool:
        """Whether the name could be one on the Hub: at most one slash, no path, and no model that the run makes."""
        return self._cached[0] and not self.is_made and not Path(self.name).exists()

    @property
    def _cached(self) -> tuple[bool, Path | None]:
        """Whether the name could be one on the Hub, and its folder in the Hub's cache."""
        try:
            found = try_to_load_from_cache(
                self.name, "config.json", cache_dir=huggingface_hub.constants.HF_HUB_CACHE, revision=self.revision
            )
        except HFValidationError:
            return False, None
        return True, Path(found).parent if isinstance(found, str) else None

    def lacks(self) -> list[str]:
        """Return what is not in the model's folder, empty if the model can be loaded from it."""
        folder = self.folder
        if folder is None:
            return ["everything"]
        parts = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values())) or [WEIGHTS]
        lost = [name for name in ("config.json", *parts) if not (folder / name).is_file()]
        return lost + ([] if any((folder / name).is_file() for name in TOKENIZERS) else ["its tokenizer"])

    def bytes_to_come(self) -> int | None:
        """Return how much is to be downloaded; 0 if nothing is, None if this machine cannot tell."""
        if self.is_made or not self.lacks():
            return 0
        total = read_json(self.folder / INDEX).get("metadata", {}).get("total_size") if self.folder else None
        return int(total) if total else None


def models(profile: Profile) -> list[Model]:
    """Return every model of this machine that the profile names: those that answer, the scorers, the policy."""
    found = []
    for entry in asked(profile):
        if isinstance(entry, TransformersModel | ServedModel):
            name = profile.policy.model if entry.weights == "policy" else entry.weights
            more = (entry.revision, entry.adapter) if isinstance(entry, TransformersModel) else (None, None)
            found.append(Model(name, entry.model, "answers", more[0], entry.format != "raw", more[1]))
    if profile.scoring.source == "compute":
        names = profile.scoring.compute.models.model_dump()
        found += [Model(name, metric, "scorer") for metric, name in names.items() if not Path(name).is_file()]
    return [*found, Model(profile.policy.model, "the policy", "policy")]


def weights(profile: Profile) -> Iterator[Finding]:
    """Yield findings for the weights, the chat template and the adapter of each model, and for a file of word vectors."""
    found = models(profile)
    for model in found:
        same = [other for other in found if _place(other) == _place(model)]
        if same[0] is model:
            yield _weights(replace(model, use=" and ".join(other.use for other in same)))
        if model.chat and not model.is_made:
            yield _chat_template(model)
        if model.adapter is not None:
            yield _adapter(model.use, model.adapter)
    vectors = Path(profile.scoring.compute.models.persona_distance)
    if profile.scoring.source == "compute" and vectors.is_file():
        yield ok(f"Word vectors of persona_distance: {vectors} is there ({gib(vectors.stat().st_size)}).")


def _place(model: Model) -> tuple[str | None, ...]:
    """Return what is the same for models that are there or missing together."""
    return model.name, model.revision, model.kind if model.is_made else None


def _weights(model: Model) -> Finding:
    what = f"Weights of {model.use}"
    if model.name == SMALL and model.kind == "answers":
        return missing(
            f"{what}: the small policy is made from responses that are there already; with generation.source=models name "
            "other weights for it."
        )
    if model.is_made:
        return ok(f"{what}: '{model.name}' is made by the run itself.")
    lost = model.lacks()
    if not lost:
        return ok(f"{what}: {model.name} is on this machine.")
    if not model.can_be_fetched:
        return missing(f"{what}: {_remedy(model, lost)}")
    coming = model.bytes_to_come()
    size = "of unknown size" if coming is None else f"{gib(coming)} at most"
    revision = f" --revision {model.revision}" if model.revision else ""
    if _other_format(model.folder):
        return missing(
            f"{what}: {model.name} is in the Hub's cache, but not in safetensors, the only format that is read; convert it "
            "once with transformers' save_pretrained and name that folder."
        )
    return missing(
        f"{what}: {model.name} is to be downloaded ({size}); get it with `hf download {model.name}{revision}` while the "
        "network is up, after `hf auth login` if its licence is to be accepted, or name a folder."
    )


def _remedy(model: Model, lost: list[str]) -> str:
    """Say what is wrong with a path that holds no whole model."""
    if model.use == "persona_distance" and model.folder is None:
        return (
            f"there is no file of word vectors at {model.name}; put the word2vec or GloVe file there or name another in "
            "scoring.compute.models.persona_distance."
        )
    make = ""
    if model.kind == "scorer" and model.use in FORMATS:
        options = f"--format {FORMATS[model.use]} --base NAME --output {model.name}"
        make = f"make it with `persodpo finetune-scorer FILES {options}` or "
    if model.folder is None:
        return f"there is no folder {model.name}; {make}name a folder, or a name on the Hugging Face Hub."
    if _other_format(model.folder):
        return (
            f"folder {model.name} has no weights in safetensors, the only format that is read; convert them once with "
            "transformers' save_pretrained."
        )
    return (
        f"folder {model.name} lacks {', '.join(lost)}; {make}name a folder that holds a whole model with its tokenizer."
    )


def _other_format(folder: Path | None) -> bool:
    """Tell whether a folder has weights, but none that are read."""
    if folder is None or any(folder.glob("*.safetensors*")):
        return False
    return any(folder.glob("*.bin"))


def _chat_template(model: Model) -> Finding:
    folder, what = model.folder, f"Chat template of {model.use}"
    if folder is None or model.lacks():
        return unknown(f"{what}: it comes with the weights, which are not here; look again when they are.")
    written = (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file()
    if written or "chat_template" in read_json(folder / "tokenizer_config.json"):
        return ok(f"{what}: there is one.")
    return missing(f"{what}: its tokenizer has none; choose format raw for it, or name the instruction-tuned model.")


def _adapter(use: str, folder: Path) -> Finding:
    if (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_config.json").is_file():
        return ok(f"Adapter of {use}: {folder} is there.")
    return missing(
        f"Adapter of {use}: {folder} holds none in safetensors; name the folder of a LoRA adapter saved by peft."
    )
