"""Every setting once, with its default and one comment; profile files and ``--set`` in, frozen settings out.

A profile is a YAML file that holds what differs from the defaults below; its name is the file's unless it says otherwise.
The same code runs under every profile. `persodpo profile` prints all settings as they resolve, with these comments.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AnyHttpUrl, Discriminator, Field, Tag, model_validator

from persodpo.corrections import MENDED, Correction, Corrections, Reranking, in_order
from persodpo.profile_text import (
    Count,
    Name,
    Place,
    Positive,
    Section,
    Seed,
    Several,
    Text,
    distinct,
    read_file,
    resolve,
    setting,
)

PROFILES = Path(__file__).parent / "profiles"
DEFAULT_PROFILE = "mini"

ArmName = Literal["simple", "perso", "perso_weighted", "corrected"]
ScorerName = Literal["coherence", "c_score", "ue_score", "persona_distance"]
PairSet = Literal["simple", "perso"]
ARMS: tuple[ArmName, ...] = ("simple", "perso", "perso_weighted", "corrected")
ENCODER, HUB_ENCODER = "encoder", "sentence-transformers/all-MiniLM-L6-v2"  # as a scorer's model; what is fetched
Variable = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]{0,63}$")]
Format = Literal["raw", "chat", "chat_with_system"]
#: Settings that change where and how fast results come, never which.
NOT_OF_RESULTS: dict[str, Any] = {"home": True, "scoring": {"ray_workers"}}
#: Settings that an ablation may change: none that shapes answers and scores, or that it names by itself.
_RERANKING = re.compile(r"(scoring\.(normalisation|target_words)|pairs\.\w+_quantile|training\.(?!arms\b)\w+)\b")


class Dialogues(Section):
    """Which persona-grounded dialogues are answered."""

    source: Name = setting(
        "miniature (generated) | published | your CSV file | the folder of FoCus's files", "miniature"
    )
    train_size: Count | None = setting("of FoCus's train dialogues, drawn under `seed`; null: all", 1500)


class Miniature(Section):
    """The generated world, for dialogues.source miniature and models called miniature/<name>."""

    train: Count = setting("dialogues to answer and rank", 300)
    valid: Count = setting("held-out dialogues", 150)


class Prompts(Section):
    """How a dialogue becomes a prompt."""

    template: Name = setting("plain | brief | chain_of_thought (reasons first) | the path of a file", "plain")
    max_words: Count = setting("word limit told to the model", 110)


class Prices(Section):
    """Prices of a model's tokens, US dollars a million; 0 for a server of one's own."""

    input_per_million: float = setting("of the prompt, USD", ge=0, le=1e6)
    output_per_million: float = setting("of the answer, USD", ge=0, le=1e6)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the price in US dollars of one answered request."""
        return (prompt_tokens * self.input_per_million + completion_tokens * self.output_per_million) / 1e6


class OpenAIModel(Section):
    """A model behind an OpenAI-compatible endpoint: OpenAI, vLLM, Ollama, llama.cpp. Its key is named, never held."""

    kind: ClassVar[str] = "openai"
    model: Text = setting("the name in all tables")
    base_url: Text = setting("address up to /v1, without user name, password or query")
    api_key_env: Variable | None = setting("NAME of the environment variable that holds the key; null: none", None)
    served_as: Text | None = setting("the name at the endpoint; null: the same", None)
    format: Format = setting("raw | chat | chat_with_system", "chat_with_system")
    concurrency: int = setting("requests under way at a time; with batch, requests of a batch", 16, ge=1, le=50_000)
    requests_per_minute: Count | None = setting("the account's limit; null for none", None)
    tokens_per_minute: Count | None = setting("the same, prompts and longest answers together", None)
    timeout_seconds: Positive = setting("longest wait for one attempt, to the last byte", 60.0)
    structured_output: bool = setting("hold the model to a JSON schema of the template's keys", False)
    batch: bool = setting("the Batch API: a day at most, usually at half the price, no response times", False)
    prices: Prices | None = setting("null if unknown, then no budget can be kept", None)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        form = r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[^\s\0-\x1f\x7f@?#]*)?"
        address = None
        with suppress(ValueError):
            address = re.fullmatch(form, self.base_url, re.ASCII) and AnyHttpUrl(self.base_url)
        if not address:
            raise ValueError(f"base_url of model {self.model} must read like http://localhost:8000/v1, without a query")
        if not self.batch and self.concurrency > 500:
            raise ValueError(f"concurrency may be 500 at most without batch, it is {self.concurrency}")
        if self.structured_output and self.format == "raw":
            raise ValueError("structured_output needs format chat or chat_with_system, raw text has no schema")
        return self


class TransformersModel(Section):
    """A model that runs on this machine, in this process or behind a server."""

    kind: ClassVar[str] = "transformers"
    model: Text = setting("the name in all tables")
    weights: Name = setting("a folder, a Hub name (@revision), miniature/<name>, or policy: that of `policy.model`")
    adapter: Place | None = setting("folder of a LoRA adapter", None)
    format: Format = setting("raw | chat (its own template) | chat_with_system", "raw")
    batch_size: int = setting("prompts answered together; 1: one at a time, for response times", 32, ge=1, le=50_000)
    stop_at_json: bool = setting("stop when the JSON object with the response is closed", False)
    served: bool = setting("asked over HTTP: `transformers serve` is started for it, and ended", False)

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if self.served and (self.adapter or self.stop_at_json):
            raise ValueError(f"model {self.model} is served, which knows neither adapter nor stop_at_json")
        return self


def _kind(entry: Any) -> str | None:
    """Tell an endpoint, which has an address, from a model of this machine, which has weights."""
    if not isinstance(entry, dict):
        return getattr(entry, "kind", None)
    at_address, here = "base_url" in entry, "weights" in entry
    return None if at_address == here else OpenAIModel.kind if at_address else TransformersModel.kind


AskedModel = Annotated[
    Annotated[OpenAIModel, Tag(OpenAIModel.kind)] | Annotated[TransformersModel, Tag(TransformersModel.kind)],
    Discriminator(
        _kind,
        custom_error_type="kind",
        custom_error_message="a model has either base_url, its endpoint's address, or weights, to run on this machine",
    ),
]


class Generation(Section):
    """Where responses come from."""

    source: Name = setting("models (asked as in backends) | published | your CSV file, all of its models", "models")
    models: Several[Text] = setting("the models whose responses are ranked", ())
    temperature: float | None = setting("0: greedy; above 0 drawn under `seed`; null: as the server likes", 0.0, ge=0)
    budget_usd: float | None = setting("USD, never passed in a run folder; null: no limit", None, ge=0)
    backends: tuple[AskedModel, ...] = setting("how models are asked", ())

    @model_validator(mode="after")
    def _models_are_known(self) -> Self:
        names = distinct(tuple(backend.model for backend in self.backends))
        unknown = [model for model in self.models if model not in names]
        if self.source == "models" and unknown:
            raise ValueError(f"'{unknown[0]}' has no entry in backends; there are {', '.join(names) or 'none'}")
        if self.source not in {"models", "published"} and not is_csv(self.source):
            raise ValueError("source must be models, published, or a file of your completions that ends in .csv")
        if not is_csv(self.source) and not self.models:
            raise ValueError(f"source {self.source} needs the name of at least one model in models")
        return self


def is_csv(source: str) -> bool:
    """Tell whether the source of dialogues or responses is a file of the user's own."""
    return source.lower().endswith(".csv")


class Models(Section):
    """The model of each scorer: encoder (heads on `scoring.encoder`, its cosine), a folder, or a Hub name (@revision)."""

    coherence: Name = setting("T5 that answers Yes or No; the authors: MingZhong/unieval-dialog", ENCODER)
    c_score: Name = setting("three-way NLI classifier; the authors: BERT fine-tuned on Dialogue NLI", ENCODER)
    ue_score: Name = setting("three-way NLI classifier; the authors: BERT fine-tuned on SNLI", ENCODER)
    persona_distance: Name = setting("word2vec or GloVe file, or a sentence encoder", ENCODER)


class Weights(Section):
    """Weights of the five signals in the quality score; they sum to 1."""

    coherence: float = setting("UniEval coherence", 0.14, ge=0, le=1)
    c_score: float = setting("consistency with the persona (NLI)", 0.20, ge=0, le=1)
    ue_score: float = setting("utterance entailment", 0.18, ge=0, le=1)
    persona_distance: float = setting("cosine with the persona (a similarity, despite its name)", 0.16, ge=0, le=1)
    compliance: float = setting("length and format", 0.32, ge=0, le=1)

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        total = sum((weights := self.model_dump()).values())
        if abs(total - 1.0) > 1e-6:
            shares = ", ".join(f"{name}: {weight / total:.6g}" for name, weight in weights.items()) if total else ""
            remedy = f'; in the same proportion: --set "scoring.weights={{{shares}}}"' if total else ""
            raise ValueError(f"the five weights must sum to 1, they sum to {total:.6g}{remedy}")
        return self


class Scoring(Section):
    """Metric values and the quality score made of them."""

    source: Literal["published", "compute"] = setting("published (the released metric files) | compute", "compute")
    encoder: Name = setting("frozen sentence encoder: the one of `persodpo fetch encoder`, or a folder", HUB_ENCODER)
    models: Models = Models()
    accept_failed_probes: Several[ScorerName] = setting("scorers that count although they fail their probes", ())
    ray_workers: Count | None = setting("scorers run on Ray, each with its model; null: in this process", None)
    weights: Weights = Weights()
    normalisation: Literal["observed", "declared"] = setting("min and max | own range of each metric", "observed")
    target_words: Count | None = setting("length that compliance rewards; null: mean of scored responses", None)


class Pairs(Section):
    """Which responses of a prompt become chosen and rejected."""

    sets: Several[PairSet] = setting("parsed x failed | high x low quality", ("simple", "perso"), min_length=1)
    low_quantile: float = setting("quality at or below this quantile may be rejected", 0.4, ge=0, le=1)
    high_quantile: float = setting("quality at or above this quantile may be chosen", 0.6, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low_quantile > self.high_quantile:
            raise ValueError(f"low_quantile ({self.low_quantile}) is above high_quantile ({self.high_quantile})")
        return self


class PolicySize(Section):
    """Size and warm-up of the small policy and of the miniature models (Qwen2's architecture, `training.max_length`)."""

    vocabulary: int = setting("entries of its byte-level BPE", 8192, ge=300)
    hidden_size: Count = setting("width", 160, multiple_of=4)
    steps: Count = setting("warm-up: causal-LM steps on parsed responses given their prompts", 1000)
    batch_tokens: Count = setting("positions of a warm-up step", 1024)


class Policy(Section):
    """The model that is trained."""

    model: Name = setting("small (made here) | miniature/<name> | a folder | a Hub name (@revision)", "miniature/base")
    small: PolicySize = PolicySize()


class Training(Section):
    """DPO, the same for every arm."""

    arms: Several[ArmName] = setting("those that `train` and `reproduce` train", ARMS, min_length=1)
    epochs: Positive = setting("passes over the pairs (the authors: 3)", 2.0)
    prompts_per_step: Count = setting("prompts of an optimiser step and process, about 7 pairs each", 24)
    learning_rate: Positive = setting("fits the small policy; the authors trained Qwen2-0.5B at 1e-6", 3e-4)
    warmup_steps: int = setting("steps in which the learning rate rises, before it falls to 0 in a line", 4, ge=0)
    beta: Positive = setting("strength of the pull to the reference", 0.1)
    scale_weights: bool = setting("weights of mean 1, so that weighting is no hidden learning rate", True)
    max_length: int = setting("longest prompt and response together, tokens; the response loses its end", 1024, ge=2)
    token_budget: Count = setting("positions of a micro-batch; 12,000 and more fill a GPU", 1024)
    lora_rank: Count | None = setting("LoRA adapters of this rank on every linear layer; null: all weights", None)
    held_out: float = setting("share of the prompts whose pairs are evaluated and never trained on", 0.05, gt=0, lt=1)
    health_tokens: Count = setting("longest answer of a health check, tokens", 110)
    stop_when_collapsed: bool = setting("stop when the parse rate has fallen or answers loop", False)
    report_to: tuple[Text, ...] = setting("trackers that follow: tensorboard, wandb, trackio", ())


class Ablation(Section):
    """One thing that is done otherwise than in the arm that all ablations start from; no model is asked anew."""

    name: str = setting("its name in tables and figures", pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,_.-]*$")
    without: ScorerName | Literal["compliance"] | None = setting("a signal whose weight the others share", None)
    corrections: tuple[Reranking, ...] = setting("switched on besides the profile's", ())
    changes: tuple[str, ...] = setting("settings of scoring, pairs and training, as after --set", ())

    @model_validator(mode="after")
    def _asks_nothing_anew(self) -> Self:
        if not self.changes and not self.corrections and self.without is None:
            raise ValueError(f"'{self.name}' changes nothing; give it without, corrections or changes")
        if anew := [change for change in self.changes if not _RERANKING.match(change)]:
            raise ValueError(f"'{anew[0]}' is no ablation, it asks or scores anew; give it a run of its own with name=")
        return self


class Evaluation(Section):
    """Who answers the held-out dialogues, and what is compared."""

    source: Literal["published", "arms"] = setting("published | arms: base and the trained arms answer", "arms")
    seeds: Several[Seed] = setting("of each arm's trainings; figures show the first", (44, 45, 46), min_length=1)
    timed: Count | None = setting("dialogues that arms answer one at a time, for response times; null: all", None)
    pairs: Several[tuple[Text, Text]] = setting("arm and baseline of each comparison", ())
    ablated: ArmName = setting("the arm that every ablation does one thing otherwise than", "perso_weighted")
    ablations: tuple[Ablation, ...] = setting("each is trained under the first seed", ())

    @model_validator(mode="after")
    def _pairs_are_pairs(self) -> Self:
        if same := next((arm for arm, baseline in self.pairs if arm == baseline), None):
            raise ValueError(f"'{same}' cannot be compared with itself")
        distinct(tuple(ablation.name for ablation in self.ablations))
        return self


class Profile(Section):
    """Every setting of a run."""

    name: str = setting("names runs/<name> and figures/<name>", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: Seed = setting("of everything random but the arms' trainings, which have `evaluation.seeds`", 44)
    corrections: Corrections = setting(MENDED, ("A10b", "A10c"))
    home: Place = setting(
        "where runs/, figures/ and data/release/ lie; relative paths start at the project's root", Path()
    )
    dialogues: Dialogues = Dialogues()
    miniature: Miniature = Miniature()
    prompts: Prompts = Prompts()
    generation: Generation
    scoring: Scoring = Scoring()
    pairs: Pairs = Pairs()
    policy: Policy = Policy()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @property
    def reading(self) -> Literal["as_released", "strict"]:
        """How completions are read, for `persodpo.completions`."""
        return "strict" if self.corrects("A18") else "as_released"

    def corrects(self, correction: Correction) -> bool:
        """Tell whether a correction is switched on."""
        return correction in self.corrections

    def switches(self, *corrections: Correction) -> dict[str, bool]:
        """Return which of some corrections are on, for the provenance of what depends on them."""
        return {correction: self.corrects(correction) for correction in corrections}

    def with_corrections(self, *more: Correction) -> Profile:
        """Return the profile with corrections switched on besides its own."""
        return self.model_copy(update={"corrections": in_order((*self.corrections, *more))})

    def digest(self) -> str:
        """Return the sha256 of all settings that can change a result: folders and Ray are left out."""
        text = json.dumps(self.model_dump(mode="json", exclude=NOT_OF_RESULTS), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def profile_names() -> list[str]:
    """Return the names of the profiles that ship with the package, sorted."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str | Path = DEFAULT_PROFILE, overrides: Sequence[str] = ()) -> Profile:
    """Read a shipped profile or a YAML file, apply overrides ``section.key=value``, and check every value.

    Raises:
        PersodpoError: The file cannot be read, or as `persodpo.profile_text.resolve`.
    """
    path = PROFILES / f"{name}.yaml" if str(name) in profile_names() else Path(name)
    return resolve(Profile, {"name": path.stem} | read_file(path, profile_names()), overrides)


def with_overrides(profile: Profile, overrides: Sequence[str]) -> Profile:
    """Return ``profile`` with some settings changed; overrides, checks and errors as in `load_profile`."""
    return resolve(Profile, profile.model_dump(mode="json"), overrides)
