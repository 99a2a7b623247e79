"""What a run would take in requests, tokens, money and hours; what rests on an assumption names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import pandas as pd

from persodpo import stages
from persodpo.artifacts import RunFolder
from persodpo.config import with_overrides
from persodpo.doctor import machine
from persodpo.doctor.files import asked, check_published
from persodpo.doctor.sizes import Sizes
from persodpo.errors import PersodpoError
from persodpo.generation.asking import backend_for, job_for
from persodpo.generation.budget import Purse
from persodpo.generation.forecast import Forecast, forecast
from persodpo.generation.requests import Backend, Limits
from persodpo.generation.store import Store
from persodpo.settings import AskedModel, OpenAIModel, Prices, Profile, TransformersModel

#: Tokens a second that one model writes on a GPU, one prompt at a time; and prompts at a time together gain about tenfold.
ALONE, TOGETHER = (15, 60), (150, 600)
#: Operations a second that training reaches on a GPU.
SPEED = (1e13, 1e14)
#: Operations a parameter and token: forward and backward pass.
OPERATIONS = 6


@dataclass(frozen=True)
class _Local:
    """A model of this machine as a backend that is only forecast: its weights are not read, so nothing counts as stored."""

    model: str
    concurrency: int
    prices: Prices | None = None
    limits: Limits = field(default_factory=Limits)
    local: bool = True

    def identity(self) -> dict[str, object]:
        """Return nothing that any stored answer was made with."""
        return {"kind": "forecast"}

    def open(self, purse: Purse) -> NoReturn:
        """Refuse: it cannot answer."""
        raise PersodpoError("A forecast asks nobody; ask the model itself with `persodpo generate`.")


def estimates(profile: Profile) -> Iterator[str]:
    """Yield what the run would take, in sentences, and what cannot be told.

    Args:
        profile: Any profile; its dialogue files are read, in a scratch folder that is removed again.
    """
    try:
        dialogues = _dialogues(profile) if asked(profile) else None
    except PersodpoError as error:
        yield f"Requests, tokens, money and hours: unknown while the dialogues are missing ({error})"
        return
    train = None if dialogues is None else dialogues[dialogues["split"] == "train"]
    found: list[Forecast] = []
    if train is None:
        yield "Asking: no model is asked, responses are read; it costs nothing."
    else:
        for entry in asked(profile):
            try:
                found.append(_forecast(profile, entry, train))
                yield _asking(entry, found[-1])
            except PersodpoError as error:
                yield f"Asking {entry.model}: unknown ({error})"
        yield from _money(profile, found)
    if found and profile.scoring.source == "compute":
        responses = sum(one.requests for one in found)
        yield f"Scoring: at most {responses:,} responses by four scorers; hours unknown until some are scored."
    yield _training(profile, Sizes(profile), found)
    if dialogues is not None and profile.evaluation.source == "arms":
        arms = 1 + len(profile.training.arms) * len(profile.evaluation.seeds)
        held_out = int((dialogues["split"] == "valid").sum())
        yield f"Evaluation: {arms} times {held_out:,} answers on this machine; hours unknown until arms have answered."


@contextmanager
def _store(profile: Profile) -> Iterator[Store]:
    answers = RunFolder(profile).answers
    with Store(answers if answers.exists() else Path(":memory:")) as store:
        yield store


def _dialogues(profile: Profile) -> pd.DataFrame:
    """Return the dialogues table, made in a scratch folder.

    Raises:
        PersodpoError: A file is missing or is no file of dialogues.
    """
    settings = profile.dialogues
    paths = (settings.train_file, settings.valid_file) if settings.source == "focus_json" else ()
    lost = [path for path in paths if path and not path.is_file()]
    if lost:
        raise PersodpoError(f"{lost[0]} is not there; look again when it is.")
    if settings.source == "published_focus":
        check_published(RunFolder(profile).release)  # otherwise the stage would fetch them
    with TemporaryDirectory(prefix="persodpo-doctor-") as scratch:
        shadow = with_overrides(profile, [f"paths.runs={scratch}"])
        stages.run_dialogues(shadow)
        return RunFolder(shadow).read("dialogues")


def _forecast(profile: Profile, entry: AskedModel, dialogues: pd.DataFrame) -> Forecast:
    """Return the forecast of one model.

    Raises:
        PersodpoError: It cannot be asked as it is set.
    """
    with _store(profile) as store:
        backend: Backend
        if isinstance(entry, OpenAIModel):
            backend = backend_for(entry, profile, "", store)
        else:
            together = entry.batch_size if isinstance(entry, TransformersModel) else entry.concurrency
            backend = _Local(entry.model, 1 if _is_alone(entry) else together)
        return forecast(job_for(dialogues, entry, profile, backend).requests, backend, store)


def _is_alone(entry: AskedModel) -> bool:
    return isinstance(entry, TransformersModel) and entry.mode == "latency"


def _asking(entry: AskedModel, one: Forecast) -> str:
    """Say what asking one model takes."""
    if isinstance(entry, OpenAIModel):
        return f"Asking {one}."
    return (
        f"Asking {one.model}: {one.to_ask:,} prompts on this machine, {one.prompt_tokens:,} + at most "
        f"{one.completion_tokens:,} tokens; {_hours_of(one, alone=_is_alone(entry))}."
    )


def _hours_of(one: Forecast, *, alone: bool) -> str:
    """Say how long a model of this machine takes, and what that rests on."""
    if one.seconds is not None:
        return f"{one.seconds / 3600:,.1f} hours, from {one.sample:,} stored answers"
    if machine.gpu_memory() is None:
        return "hours unknown, there is neither a GPU nor a stored answer to tell from"
    slow, fast = ALONE if alone else TOGETHER
    return f"{_hours(one.completion_tokens / fast, one.completion_tokens / slow)}, assuming {slow} to {fast} tokens a second"


def _hours(low: float, high: float) -> str:
    """Return a range of seconds as hours, no finer than a tenth."""
    shown = [f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}" for hours in (low / 3600, high / 3600)]
    return f"{' to '.join(shown)} hours"


def _money(profile: Profile, found: list[Forecast]) -> Iterator[str]:
    """Yield what the answers cost together, beside the budget."""
    priced = {entry.model for entry in asked(profile) if isinstance(entry, OpenAIModel)}
    api = [one for one in found if one.model in priced]
    known = [(one.cost, one.highest_cost) for one in api if one.cost is not None and one.highest_cost is not None]
    expected, most = sum(cost for cost, _ in known), sum(cost for _, cost in known)
    budget = profile.generation.budget_usd
    limit = "no budget is set" if budget is None else f"the budget is ${budget:,.2f}"
    if budget is not None and most > budget:
        limit += ", which may end the run before all is answered"
    lacking = f", {len(api) - len(known)} models without prices" if len(known) < len(api) else ""
    if not api:
        yield "Money: none, all models answer on this machine."
    else:
        yield f"Money: ${expected:,.2f} (at most ${most:,.2f}){lacking}, at the profile's prices; {limit}."
    if "corrected" in profile.training.arms and profile.prompts.personas == "as_released":
        yield (
            "Arm corrected writes its prompts anew, so it asks every model once more, in the run folder "
            f"{profile.name}-corrected: as many requests, and as much money under a budget of its own."
        )


def _training(profile: Profile, sizes: Sizes, found: list[Forecast]) -> str:
    """Say how long training takes, as far as anything on this machine tells."""
    arms = len(profile.training.arms)
    seeds = len(profile.evaluation.seeds) if profile.evaluation.source == "arms" else 1
    what = f"Training: {arms} arms" + (f" under {seeds} seeds" if seeds > 1 else "")
    if machine.gpu_memory() is None or sizes.policy is None or not found:
        return f"{what}; hours unknown without a GPU, the policy's config.json and forecasts of texts to tell from."
    first = max(found, key=lambda one: one.requests)
    longest = sum(one.completion_tokens for one in found)
    tokens = (first.prompt_tokens + longest) * profile.training.epochs * arms * seeds
    operations = OPERATIONS * sizes.policy.parameters * tokens
    return (
        f"{what}, at most {tokens:,.0f} tokens; {_hours(operations / SPEED[1], operations / SPEED[0])}, assuming "
        f"{SPEED[0] / 1e12:.0f} to {SPEED[1] / 1e12:.0f} TFLOP/s, health checks not counted."
    )
