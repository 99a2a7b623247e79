"""Profile file in, frozen settings out: an unknown key or an impossible value is an error.

A profile is one YAML file that names every setting of a run. The same code runs under every profile; what differs
stands in the profile and nowhere else. Settings that mend a defect of the released method take one of two words:
``as_released`` keeps what the authors did, ``corrected`` mends it, so that each correction can be measured alone.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from persodpo.errors import PersodpoError

PROFILES = Path(__file__).parent / "profiles"
DEFAULT_PROFILE = "release"

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


def profile_names() -> list[str]:
    """Return the names of the profiles that ship with the package, sorted."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str | Path = DEFAULT_PROFILE, overrides: Sequence[str] = ()) -> Profile:
    """Read a profile, apply overrides, and check every value.

    Args:
        name: A shipped profile's name (see `profile_names`) or the path of a YAML file.
        overrides: Assignments such as ``"pairs.low_quantile=0.3"``; the value is read as YAML.

    Returns:
        The frozen profile.

    Raises:
        PersodpoError: The profile does not exist, is not YAML, or holds an unknown key or an impossible value; the
            message names the key's path and what is allowed there.
    """
    path = PROFILES / f"{name}.yaml" if str(name) in profile_names() else Path(name)
    if not path.is_file():
        raise PersodpoError(
            f"Profile '{name}' is neither a shipped profile ({', '.join(profile_names())}) nor a YAML file."
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PersodpoError(f"Profile {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(settings, dict):
        raise PersodpoError(f"Profile {path} must hold sections such as 'dialogues:' and 'pairs:', not a single value.")
    return _resolve(settings, overrides, str(name))


def with_overrides(profile: Profile, overrides: Sequence[str]) -> Profile:
    """Return ``profile`` with some settings changed; overrides, checks and errors as in `load_profile`."""
    return _resolve(profile.model_dump(mode="json"), overrides, profile.name)


def _resolve(settings: dict[str, Any], overrides: Sequence[str], name: str) -> Profile:
    """Apply ``overrides`` to ``settings`` in place and check the outcome."""
    for assignment in overrides:
        _assign(settings, assignment)
    try:
        return Profile.model_validate(settings)
    except ValidationError as error:
        raise PersodpoError(f"Profile '{name}': {_explain(error)}") from error


def _assign(settings: dict[str, Any], assignment: str) -> None:
    """Apply one ``section.key=value`` to the nested ``settings`` in place."""
    key, equals, value = assignment.partition("=")
    *sections, leaf = key.strip().split(".")
    if not equals or not leaf:
        raise PersodpoError(f"Override '{assignment}' must read section.key=value, for example pairs.low_quantile=0.3.")
    node = settings
    for section in sections:
        child = node.get(section)
        if not isinstance(child, dict):
            raise PersodpoError(f"Override '{assignment}': '{section}' is no section; {_allowed(node, section)}")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise PersodpoError(f"Override '{assignment}': the value is not valid YAML.") from error


def _allowed(names: Sequence[str] | dict[str, Any], wrong: str) -> str:
    """Name the allowed keys, the nearest first when there is one."""
    near = difflib.get_close_matches(wrong, list(names), n=1)
    return (f"did you mean '{near[0]}'? " if near else "") + f"Allowed here: {', '.join(names)}."


def _section_at(location: Sequence[Any]) -> type[BaseModel] | None:
    """Return the model class of the section that ``location`` points into."""
    model: type[BaseModel] = Profile
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        candidates = [annotation, *get_args(annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return None
        model = section
    return model


def _explain(error: ValidationError) -> str:
    """Turn pydantic's report into sentences that name each key's path and what is allowed there."""
    sentences = []
    for item in error.errors():
        location = item["loc"]
        path = ".".join(str(part) for part in location) or "the profile"
        if item["type"] == "extra_forbidden":
            section = _section_at(location[:-1])
            allowed = list(section.model_fields) if section else []
            sentences.append(f"{path} is an unknown key; {_allowed(allowed, str(location[-1]))}")
        elif item["type"] == "missing":
            sentences.append(f"{path} is missing; every key must be set.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], (dict, BaseModel)) else f", not {item['input']!r}"
            sentences.append(f"{path}: {message}{given}.")
    return " ".join(sentences)
