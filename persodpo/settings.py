"""Every setting's name, type and range, section by section; a profile holds exactly these.

Settings that mend a defect of the released method take one of two words: ``as_released`` keeps what the authors did,
``corrected`` mends it, so that each correction can be measured alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Correction = Literal["as_released", "corrected"]
ArmName = Literal["simple", "perso", "perso_weighted", "corrected"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"'{twice[0]}' stands twice; name each once")
    return values


class Section(BaseModel):
    """Base of all profile sections: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Paths(Section):
    """Folders a run reads and writes; relative ones start at the project's root."""

    runs: Path
    figures: Path
    release: Path


class Engine(Section):
    """Limits of the table engine (DuckDB); they change speed and memory, never results."""

    threads: Count | None
    memory_gib: Positive


class Dialogues(Section):
    """Which persona-grounded dialogues are answered."""

    source: Literal["published_focus", "focus_json", "blended_skill_talk", "it_convai2"]
    train_file: Path | None
    valid_file: Path | None
    train_size: Count | None
    sample_seed: Annotated[int, Field(ge=0)]
    max_reference_words: Count | None

    @model_validator(mode="after")
    def _files_where_needed(self) -> Dialogues:
        if self.source == "focus_json" and not (self.train_file or self.valid_file):
            raise ValueError("source focus_json needs train_file or valid_file")
        return self


class Prompts(Section):
    """How a dialogue becomes a prompt."""

    template: str
    max_words: Count
    personas: Correction


class Completions(Section):
    """How a completion is read."""

    reading: Literal["as_released", "strict"]


class Generation(Section):
    """Where responses come from."""

    source: Literal["published"]
    models: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)]


class MetricValues(Section):
    """One number for each of the four text metrics."""

    coherence: float
    c_score: float
    ue_score: float
    persona_distance: float


class Weights(Section):
    """Weights of the five signals in the quality score; they sum to 1."""

    coherence: Fraction
    c_score: Fraction
    ue_score: Fraction
    persona_distance: Fraction
    compliance: Fraction

    @model_validator(mode="after")
    def _sum_to_one(self) -> Weights:
        total = sum(self.model_dump().values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the five weights must sum to 1, they sum to {total:.6g}")
        return self


class Scoring(Section):
    """Metric values and the quality score made of them."""

    source: Literal["published"]
    weights: Weights
    worst_case: MetricValues
    normalisation: Literal["observed", "declared"]
    target_words: Count | None
    format_bonus: Annotated[float, Field(ge=0)]
    format_check: Correction
    coherence: Correction


class Pairs(Section):
    """Which responses of a prompt become chosen and rejected."""

    sets: Annotated[tuple[Literal["simple", "perso"], ...], Field(min_length=1), AfterValidator(_distinct)]
    low_quantile: Fraction
    high_quantile: Fraction
    serialisation: Correction
    split_overlap: Correction

    @model_validator(mode="after")
    def _ordered(self) -> Pairs:
        if self.low_quantile > self.high_quantile:
            raise ValueError(
                f"low_quantile ({self.low_quantile}) must not be above high_quantile ({self.high_quantile})"
            )
        return self


class SmallPolicy(Section):
    """Size and warm-up of the small policy."""

    vocabulary: Annotated[int, Field(ge=300)]
    hidden_size: Count
    layers: Count
    heads: Count
    key_value_heads: Count
    intermediate_size: Count
    max_length: Annotated[int, Field(ge=2)]
    steps: Count
    batch_tokens: Count
    learning_rate: Positive
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _heads_fit(self) -> SmallPolicy:
        if self.hidden_size % (2 * self.heads) or self.heads % self.key_value_heads:
            raise ValueError("hidden_size must be an even multiple of heads, and heads a multiple of key_value_heads")
        return self


class Policy(Section):
    """The model that is trained."""

    model: Annotated[str, Field(min_length=1)]
    small: SmallPolicy


class SmallModel(Section):
    """Size and fine-tuning of a small scorer's transformer."""

    vocabulary: Annotated[int, Field(ge=300)]
    hidden_size: Annotated[int, Field(ge=16, multiple_of=4)]
    intermediate_size: Count
    max_length: Annotated[int, Field(ge=16)]
    examples: Annotated[int, Field(ge=8)]
    batch_size: Count
    learning_rate: Positive


class SmallVectors(Section):
    """Size and training of the small word vectors."""

    size: Count
    epochs: Count
    minimum_count: Count


class SmallScorers(Section):
    """The scorers of machines without downloads, made on the spot from the run's dialogues."""

    coherence: SmallModel
    nli: SmallModel
    vectors: SmallVectors
    held_out: Annotated[float, Field(gt=0, lt=1)]
    seed: Annotated[int, Field(ge=0)]


class Training(Section):
    """DPO, the same for every arm."""

    arms: Annotated[tuple[ArmName, ...], Field(min_length=1), AfterValidator(_distinct)]
    epochs: Positive
    prompts_per_step: Count
    learning_rate: Positive
    warmup_steps: Annotated[int, Field(ge=0)]
    beta: Positive
    scale_weights: bool
    max_length: Annotated[int, Field(ge=2)]
    token_budget: Count
    bf16: bool
    gradient_checkpointing: bool
    lora_rank: Count | None
    held_out: Annotated[float, Field(gt=0, lt=1)]
    logging_steps: Count
    evaluation_steps: Count
    health_prompts: Count
    health_tokens: Count
    stop_when_collapsed: bool


class Profile(Section):
    """Every setting of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    seed: Annotated[int, Field(ge=0)]
    paths: Paths
    engine: Engine
    dialogues: Dialogues
    prompts: Prompts
    completions: Completions
    generation: Generation
    scoring: Scoring
    pairs: Pairs
    policy: Policy
    training: Training

    def digest(self) -> str:
        """Return the sha256 of all settings that can change a result.

        Folders and engine limits are left out, so the same run in another place has the same digest.
        """
        settings = self.model_dump(mode="json", exclude={"paths", "engine"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved profile as YAML, in the order of the sections."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
