"""Every setting's name, type and range, section by section; a profile holds exactly these.

Settings that mend a defect of the released method take one of two words: ``as_released`` keeps what the authors did,
``corrected`` mends it, so that each correction can be measured alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from persodpo.evaluation_settings import Ablation, ArmName, Evaluation
from persodpo.scoring_settings import Compute, MetricValues, Scoring, SmallModel, SmallScorers, SmallVectors
from persodpo.sections import Correction, Count, Fraction, Positive, Section, distinct

# What other modules take from here, wherever it is defined.
__all__ = [
    "Ablation", "ArmName", "AskedModel", "Completions", "Compute", "Correction", "Dialogues", "Engine", "Evaluation",
    "Generation", "MetricValues", "Miniature", "OpenAIModel", "Pairs", "Paths", "Policy", "Prices", "Profile", "Prompts",
    "Scoring", "Section", "ServedModel", "SmallModel", "SmallPolicy", "SmallScorers", "SmallVectors",
    "Training", "TransformersModel",
]  # fmt: skip


class Paths(Section):
    """Folders a run reads and writes; relative ones start at the project's root."""

    runs: Path
    figures: Path
    release: Path


class Engine(Section):
    """Where scorers run; it changes speed and memory, never results."""

    scorers: Literal["local", "ray"]
    ray_workers: Count


class Dialogues(Section):
    """Which persona-grounded dialogues are answered."""

    source: Literal["miniature", "published_focus", "focus_json", "csv"]
    train_file: Path | None
    valid_file: Path | None
    csv_file: Path | None
    train_size: Count | None
    sample_seed: Annotated[int, Field(ge=0)]
    max_reference_words: Count | None

    @model_validator(mode="after")
    def _files_where_needed(self) -> Dialogues:
        if self.source == "focus_json" and not (self.train_file or self.valid_file):
            raise ValueError("source focus_json needs train_file or valid_file")
        if self.source == "csv" and not self.csv_file:
            raise ValueError("source csv needs csv_file, the file of your dialogues")
        return self


class Miniature(Section):
    """The generated world, and the small models made from one of its own.

    Attributes:
        train: Dialogues to answer and rank, for ``dialogues.source: miniature``.
        valid: Held-out dialogues.
        model_dialogues: Dialogues that the models ``miniature/<name>`` learn from; the run shares none with them.
        finish_steps: Steps of each model's own short finish, after the warm-up that ``policy.small`` describes.
        seed: Of the world.
    """

    train: Count
    valid: Count
    model_dialogues: Count
    finish_steps: Count
    seed: Annotated[int, Field(ge=0)]


class Prompts(Section):
    """How a dialogue becomes a prompt."""

    template: str
    system: str
    max_words: Count
    personas: Correction


class Completions(Section):
    """How a completion is read."""

    reading: Literal["as_released", "strict"]


class Prices(Section):
    """Prices of a model's tokens, US dollars a million; 0 for a server of one's own."""

    input_per_million: float = Field(ge=0)
    output_per_million: float = Field(ge=0)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the price in US dollars of one answered request."""
        return (prompt_tokens * self.input_per_million + completion_tokens * self.output_per_million) / 1e6


class _Model(Section):
    """What all ways of asking a model share.

    Attributes:
        model: The model's name in all tables.
        format: ``raw`` text, a ``chat`` of one user message, or ``chat_with_system`` with the system message before it.
    """

    model: Annotated[str, Field(min_length=1)]
    format: Literal["raw", "chat", "chat_with_system"] = "raw"


class OpenAIModel(_Model):
    """A model behind an OpenAI-compatible endpoint; holds no secret, only the name of the variable that does.

    Attributes:
        kind: ``openai``.
        served_as: The name the endpoint knows the model by; None: the same.
        base_url: Address up to ``/v1``, without user name, password or query.
        api_key_env: Environment variable that holds the key; None for a server that asks for none.
        concurrency: Requests under way at a time; with ``batch``, requests of one batch.
        requests_per_minute: The endpoint's limit, None for none.
        tokens_per_minute: The same, prompts and longest answers together.
        timeout_seconds: Longest wait for one attempt, from sending to the last byte.
        attempts: How often a prompt is sent at most.
        longest_wait_seconds: Longest pause between two attempts; a server that asks for a longer one stops the model.
        token_limit: The field that the endpoint reads the longest answer from; newer OpenAI models want the second.
        structured_output: Whether the endpoint must hold the model to the JSON schema of the template's keys.
        batch: Ask through the Batch API (hours, usually half the price) instead of one request after another.
        poll_seconds: Pause between two looks at a batch.
        prices: Prices of the tokens; None if unknown, then no budget can be kept.
    """

    kind: Literal["openai"]
    format: Literal["raw", "chat", "chat_with_system"] = "chat_with_system"
    served_as: str | None = None
    base_url: str
    api_key_env: str | None = None
    concurrency: Annotated[int, Field(ge=1, le=50_000)] = 16
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    timeout_seconds: Positive = 60.0
    attempts: Count = 6
    longest_wait_seconds: Positive = 60.0
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # noqa: S105 - no password
    structured_output: bool = False
    batch: bool = False
    poll_seconds: Positive = 60.0
    prices: Prices | None = None

    @model_validator(mode="after")
    def _possible(self) -> OpenAIModel:
        if not self.batch and self.concurrency > 500:
            raise ValueError(f"concurrency may be 500 at most without batch, it is {self.concurrency}")
        if self.structured_output and self.format == "raw":
            raise ValueError(
                "structured_output needs format chat or chat_with_system, raw text cannot be held to a schema"
            )
        return self


class TransformersModel(_Model):
    """A model that runs on this machine.

    Attributes:
        kind: ``transformers``.
        weights: ``policy`` for the model that `Policy` names, else a folder or a name on the Hugging Face Hub.
        revision: Commit, tag or branch of the Hub; None for the newest.
        adapter: Folder of a LoRA adapter for these weights; None for none.
        mode: ``latency`` answers one prompt at a time on a warm model, so that response times can be compared;
            ``throughput`` answers many together.
        batch_size: Prompts answered together in throughput mode.
        stop_at_json: Stop a completion when its JSON object with the response is closed.
    """

    kind: Literal["transformers"]
    weights: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    adapter: Path | None = None
    mode: Literal["latency", "throughput"] = "throughput"
    batch_size: Count = 32
    stop_at_json: bool = False


class ServedModel(_Model):
    """A model that ``transformers serve`` serves on this machine while it is asked, through the ``openai`` client.

    Attributes:
        kind: ``served``.
        weights: As for `TransformersModel`.
        concurrency: Requests under way at a time.
        timeout_seconds: Longest wait for one attempt.
        startup_seconds: Longest wait for the server.
    """

    kind: Literal["served"]
    weights: Annotated[str, Field(min_length=1)]
    concurrency: Annotated[int, Field(ge=1, le=500)] = 8
    timeout_seconds: Positive = 60.0
    startup_seconds: Positive = 120.0


AskedModel = Annotated[OpenAIModel | TransformersModel | ServedModel, Field(discriminator="kind")]


class Generation(Section):
    """Where responses come from."""

    source: Literal["published", "models", "csv"]
    csv_file: Path | None
    models: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(distinct)]
    token_budget: Correction
    temperature: Annotated[float, Field(ge=0)] | None
    seed: Annotated[int, Field(ge=0)] | None
    budget_usd: Annotated[float, Field(ge=0)] | None
    backends: tuple[AskedModel, ...]

    @model_validator(mode="after")
    def _models_are_known(self) -> Generation:
        names = distinct(tuple(backend.model for backend in self.backends))
        unknown = [model for model in self.models if model not in names]
        if self.source == "models" and unknown:
            raise ValueError(f"'{unknown[0]}' has no entry in backends; there are {', '.join(names) or 'none'}")
        if self.source == "csv" and not self.csv_file:
            raise ValueError("source csv needs csv_file, the file of your completions")
        return self


class Pairs(Section):
    """Which responses of a prompt become chosen and rejected."""

    sets: Annotated[tuple[Literal["simple", "perso"], ...], Field(min_length=1), AfterValidator(distinct)]
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


class Training(Section):
    """DPO, the same for every arm."""

    arms: Annotated[tuple[ArmName, ...], Field(min_length=1), AfterValidator(distinct)]
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
    report_to: tuple[str, ...]


class Profile(Section):
    """Every setting of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    seed: Annotated[int, Field(ge=0)]
    paths: Paths
    engine: Engine
    dialogues: Dialogues
    miniature: Miniature
    prompts: Prompts
    completions: Completions
    generation: Generation
    scoring: Scoring
    pairs: Pairs
    policy: Policy
    training: Training
    evaluation: Evaluation

    def digest(self) -> str:
        """Return the sha256 of all settings that can change a result.

        Folders and engine limits are left out, so the same run in another place has the same digest.
        """
        settings = self.model_dump(mode="json", exclude={"paths", "engine"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved profile as YAML, in the order of the sections."""
        return _yaml_of(self)


@functools.lru_cache(maxsize=8)
def _yaml_of(profile: Profile) -> str:
    """Return a profile as YAML; every stage asks for it."""
    return yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
