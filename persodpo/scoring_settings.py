"""The settings of scoring, a section of `persodpo.settings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from persodpo.sections import Correction, Count, Fraction, Positive, Section, distinct


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
            raise ValueError(
                f"the five weights must sum to 1, they sum to {total:.6g}{_in_proportion(self.model_dump())}"
            )
        return self


def _in_proportion(weights: dict[str, float]) -> str:
    """Return the weights as they are in the same proportion with a sum of 1, to be pasted; nothing where all are 0."""
    total = sum(weights.values())
    if not total:
        return ""
    first, *others = ({name: round(value / total, 4) for name, value in weights.items()}).items()
    shares = dict([(first[0], round(1.0 - sum(value for _, value in others), 4)), *others])
    written = ", ".join(f"{name}: {value:g}" for name, value in shares.items())
    return f'; in the same proportion: --set "scoring.weights={{{written}}}"'


ClassName = Literal["contradiction", "neutral", "entailment"]
ScorerName = Literal["coherence", "c_score", "ue_score", "persona_distance"]


class Models(Section):
    """The model of each scorer: ``small``, a folder, a file of word vectors, or a name on the Hugging Face Hub."""

    coherence: Annotated[str, Field(min_length=1)]
    c_score: Annotated[str, Field(min_length=1)]
    ue_score: Annotated[str, Field(min_length=1)]
    persona_distance: Annotated[str, Field(min_length=1)]


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


class Compute(Section):
    """How scores are computed."""

    models: Models
    c_labels: Annotated[tuple[ClassName, ...], Field(min_length=3, max_length=3), AfterValidator(distinct)] | None
    ue_labels: Annotated[tuple[ClassName, ...], Field(min_length=3, max_length=3), AfterValidator(distinct)] | None
    coherence_tokens: Annotated[int, Field(ge=8)]
    nli_tokens: Annotated[int, Field(ge=8)]
    batch_tokens: Count
    truncation: Correction
    nli: Correction
    words: Correction
    small: SmallScorers
    accept_failed_probes: Annotated[tuple[ScorerName, ...], AfterValidator(distinct)]


class Scoring(Section):
    """Metric values and the quality score made of them."""

    source: Literal["published", "compute"]
    compute: Compute
    weights: Weights
    worst_case: MetricValues
    normalisation: Literal["observed", "declared"]
    target_words: Count | None
    format_bonus: Annotated[float, Field(ge=0)]
    format_check: Correction
    coherence: Correction
