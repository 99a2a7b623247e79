"""How large models are, from their configs alone, and what that means for memory and disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from persodpo.artifacts import read_json
from persodpo.doctor.findings import gib
from persodpo.doctor.weights import Model, models
from persodpo.settings import Profile

#: Bytes a trained parameter takes in memory: weight, gradient and AdamW's two moments, all float32.
TRAINED = 16
#: Bytes a parameter that is only read takes: float32 in training, bfloat16 when it answers on a GPU.
READ, ANSWERS = 4, 2
#: Bytes that activations of one layer take a position and unit of width, in bfloat16 (Korthikanti et al. 2022, eq. 2, with
#: attention that keeps no scores).
ACTIVATIONS = 34
#: Bytes that logits take an entry: the logits, their log-softmax and the gradient, float32.
LOGITS = 12


@dataclass(frozen=True)
class Memory:
    """A range of bytes of memory, None where it cannot be told, and a part of a sentence that says what it rests on."""

    low: float | None
    high: float | None
    sentence: str


@dataclass(frozen=True)
class Config:
    """What a model's ``config.json`` says."""

    parameters: int
    layers: int
    width: int
    vocabulary: int


class Sizes:
    """The sizes of a profile's models; a config is read once, and no weight is."""

    def __init__(self, profile: Profile) -> None:
        """Take the models of ``profile``."""
        found = models(profile)
        self._policy = next(model for model in found if model.kind == "policy")
        self._answering = [model for model in found if model.kind == "answers" and not model.is_made]

    @cached_property
    def policy(self) -> Config | None:
        """The policy's config, None if it is not here or the policy is made by the run."""
        return config_of(self._policy)

    def memory(self, profile: Profile) -> Memory:
        """Return what the largest step takes: training the policy, or the largest model that answers."""
        if self._policy.is_made:
            low, high = 0.0, 0.0
            said = "training the small policy wants below 1 GiB"
        elif self.policy is None:
            return Memory(None, None, "what training the policy wants is unknown until its config.json is here")
        else:
            low, high = _training(self.policy, profile)
            trained = "LoRA adapters" if profile.training.lora_rank else "all weights"
            said = (
                f"training {trained} of {self.policy.parameters / 1e9:,.2f} billion parameters wants {gib(low)}, and up to "
                f"{gib(high)} at full micro-batches"
            )
        answering = [config_of(model) for model in self._answering]
        known = [config.parameters * ANSWERS for config in answering if config]
        if known:
            low, high = max(low, *known), max(high, *known)
            said += f"; the largest model that answers wants {gib(max(known))} in bfloat16"
        if None in answering:
            said += f"; {answering.count(None)} models that answer are of unknown size"
        return Memory(low, high, said)

    def trained(self, profile: Profile) -> float | None:
        """Return the bytes on disk of all trained arms and of one training's two checkpoints, None if unknown."""
        if self._policy.is_made:
            return 0.0
        if self.policy is None:
            return None
        settings = profile.training
        seeds = len(profile.evaluation.seeds) if profile.evaluation.source == "arms" else 1
        share = 0.05 if settings.lora_rank else 1.0
        weights = READ * self.policy.parameters * share
        return len(settings.arms) * seeds * weights + 2 * 3 * weights


def config_of(model: Model) -> Config | None:
    """Read a model's config; None if there is none that transformers knows as a causal language model."""
    folder = None if model.is_made else model.folder
    if folder is None or not (folder / "config.json").is_file():
        return None
    return _read(folder)


def _read(folder: Path) -> Config | None:
    # A model on the meta device has shapes, but no numbers.
    import torch  # noqa: PLC0415 - slow to load
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    if "auto_map" in read_json(folder / "config.json"):
        return None
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            model = auto.from_config(config, trust_remote_code=False)
        text = config.get_text_config()
        return Config(
            int(model.num_parameters()), int(text.num_hidden_layers), int(text.hidden_size), int(text.vocab_size)
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _training(config: Config, profile: Profile) -> tuple[float, float]:
    """Return what training takes without activations, and with those of a full micro-batch."""
    settings = profile.training
    states = config.parameters * (READ if settings.lora_rank else TRAINED)
    kept = 2 if settings.gradient_checkpointing else ACTIVATIONS
    scale = 1 if settings.bf16 else 2
    activations = settings.token_budget * config.width * config.layers * kept * scale
    from persodpo.training.forward import CHUNK  # noqa: PLC0415 - torch is slow to load

    return states, states + activations + CHUNK * config.vocabulary * LOGITS
