"""From dialogues to responses: published ones, the user's own, or those of models that are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

import persodpo.completions
import persodpo.own_data
from persodpo.config import AskedModel, Profile, TransformersModel, is_csv
from persodpo.errors import PersodpoError
from persodpo.files import PROJECT, place_of
from persodpo.generation.ask import generate_all
from persodpo.generation.requests import Backend, Job, request_key, requests_for
from persodpo.generation.store import Store
from persodpo.generation.summary import Forecast, Summary, forecast, stored_answers
from persodpo.prompts import answer_keys, load_template
from persodpo.release import published
from persodpo.release.fetch import fetch_release
from persodpo.runfolder import RunFolder, StageReport, Tables
from persodpo.stages import policy
from persodpo.stages.base import Need

SPLITS = ("train", "valid")
#: How long the tables of answers, and small models, wait for another process that works in the run folder.
WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Scope:
    """Which prompts of a run are meant: of which models, which splits, and how many of each from the first on."""

    models: tuple[str, ...]
    splits: tuple[str, ...] = SPLITS
    limit: int | None = None


def needs(profile: Profile) -> list[Need]:
    """Return what responses follow from.

    Raises:
        PersodpoError: The published responses cannot be had for this profile.
    """
    if profile.generation.source == "published":
        published.ranked_sets(profile.generation.models)
        if profile.dialogues.source != "published":
            raise PersodpoError(
                "generation.source published has responses to the published FoCus prompts only; "
                "set dialogues.source=published."
            )
    return [Need("dialogues")]


def make_responses(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the responses tables: train responses to rank, and held-out ones where they are published.

    With ``generation.source: models`` the profile's models are asked what is not stored yet; with a CSV file the user's own
    completions are read.
    """
    profile = run.profile
    if profile.generation.source != "models":
        with run.locked(WAIT_SECONDS):
            return [(_own if is_csv(profile.generation.source) else _published)(run, overwrite)]
    scope = Scope(profile.generation.models, ("train",))
    run.asked |= set(scope.models)
    check_finished(_ask(run, scope), run, "generate")
    answers = _write_answers(run)
    with _store(run) as store:
        frame = stored_answers(store, jobs_of(run, scope, make_policy=False), profile.reading)
    frame = frame.sort_values("dialogue_id", kind="stable", ignore_index=True)
    return [answers, write_answers(run, "responses", frame, overwrite=overwrite)]


def check_finished(summaries: Sequence[Summary], run: RunFolder, command: str) -> None:
    """Refuse to go on where a model has stopped before its end; the error says how to go on."""
    for summary in summaries:
        if summary.stopped:
            raise PersodpoError(
                f"Not every prompt is answered yet ({summary}); run {run.command(command)} again, what is stored is not "
                "asked again."
            )


def _own(run: RunFolder, overwrite: bool) -> StageReport:
    """Read the user's own completions, and say what became of them."""
    profile, path = run.profile, PROJECT / run.profile.generation.source
    if not path.is_file():
        raise PersodpoError(f"{path} is not there; name the CSV file of your completions in generation.source.")
    report = run.stage(
        "generate",
        lambda: {"responses": persodpo.own_data.read_responses(path, run.read("dialogues"), profile.reading)},
        reads=["dialogues"],
        files={"csv": path},
        settings={"source": "csv", "corrections": profile.switches("A18")},
        outputs=["responses"],
        overwrite=overwrite,
    )
    responses = run.read("responses")
    counts = ", ".join(f"{name} {count:,}" for name, count in responses["outcome"].value_counts().items())
    unread = int(responses["response"].isna().sum())
    left = f"; {unread:,} hold no answer at all and enter no pair" if unread else ""
    return replace(report, notes=(f"outcomes: {counts}{left}",))


def _published(run: RunFolder, overwrite: bool) -> StageReport:
    """Read the published completions."""
    profile, files = run.profile, fetch_release(run.release)
    tables = {"responses": published.ranked_sets(profile.generation.models)}
    if profile.evaluation.source == "published":
        tables["evaluation/responses"] = published.VALID_SETS

    def build() -> Tables:
        dialogues = run.read("dialogues")
        return {
            table: published.published_responses(files, sets, dialogues, profile.reading)
            for table, sets in tables.items()
        }

    models, corrections = list(profile.generation.models), profile.switches("A18")
    return run.stage(
        "generate",
        build,
        reads=["dialogues"],
        files=published.set_files(files, [which for sets in tables.values() for which in sets]),
        settings={"source": "published", "models": models, "corrections": corrections},
        outputs=list(tables),
        overwrite=overwrite,
    )


def asked_scope(profile: Profile, models: Sequence[str], splits: Sequence[str], limit: int | None) -> Scope:
    """Return a scope of known models and splits; without models, those of the profile.

    Raises:
        PersodpoError: A model has no entry in ``generation.backends``, or none is named and the profile reads published
            responses; a split is unknown.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise PersodpoError(f"There is no split '{unknown[0]}'; name {' or '.join(SPLITS)}.")
    if not models and profile.generation.source != "models":
        names = ", ".join(entry.model for entry in profile.generation.backends)
        raise PersodpoError(
            f"This profile asks no model, its responses are read; name the models to ask with --models ({names})."
        )
    for model in models:
        _entry_of(profile, model)
    return Scope(tuple(models) or profile.generation.models, tuple(splits) or SPLITS, limit)


def needs_to_ask(profile: Profile, scope: Scope, **_: object) -> list[Need]:
    """Return what asking the models of a scope follows from."""
    small = [_is_small_policy(_entry_of(profile, model), profile) for model in scope.models]
    return [Need("generate" if any(small) else "dialogues")]


def ask(
    run: RunFolder, overwrite: bool = False, *, scope: Scope, retry_failed: bool = False, progress: bool = True
) -> list[StageReport | Summary]:
    """Ask models what is not stored yet, and write the table of all answers.

    Several processes may ask in one run folder at the same time.

    Args:
        run: The run folder; ``generation.backends`` of its profile say how each model is asked.
        overwrite: Not used: what is stored is never asked again.
        scope: Which models and dialogues.
        retry_failed: Ask again what has failed in earlier runs.
        progress: Show a bar for each model where somebody watches.

    Returns:
        A summary for each model, and the report of the table.
    """
    return [*_ask(run, scope, retry_failed=retry_failed, progress=progress), _write_answers(run)]


def _ask(run: RunFolder, scope: Scope, *, retry_failed: bool = False, progress: bool = True) -> list[Summary]:
    profile = run.profile
    with Store(run.answers) as store:
        jobs = [job for job, _ in jobs_of(run, scope, make_policy=True)]
        _adopt(run, store, scope)
        return generate_all(
            jobs,
            store,
            budget_usd=profile.generation.budget_usd,
            retry_failed=retry_failed,
            progress=progress,
            reading=profile.reading,
        )


def forecasts(run: RunFolder, scope: Scope, retry_failed: bool = False) -> list[Forecast]:
    """Say what `ask` would take in a run with dialogues; nothing is sent, loaded or stored."""
    with _store(run) as store:
        _adopt(run, store, scope)
        jobs = [job for job, _ in jobs_of(run, scope, make_policy=False)]
        return [forecast(job.requests, job.backend, store, retry_failed=retry_failed) for job in jobs]


def forecast_report(run: RunFolder, scope: Scope, retry_failed: bool = False) -> Iterator[str]:
    """Yield `forecasts` as lines: one a model, then all together beside the budget."""
    by_model = forecasts(run, scope, retry_failed)
    yield from map(str, by_model)
    with _store(run) as store:
        spent = store.spent()
    expected, most = (sum(getattr(one, name) or 0.0 for one in by_model) for name in ("cost", "highest_cost"))
    priceless = sum(one.cost is None for one in by_model)
    unknown = f", {priceless} models without prices" if priceless else ""
    budget = run.profile.generation.budget_usd
    limit = "no budget is set" if budget is None else f"the budget is ${budget:,.2f}"
    yield (
        f"together: {sum(one.to_ask for one in by_model):,} requests, ${expected:,.2f} (at most ${most:,.2f}){unknown}; "
        f"${spent:,.4f} are spent, {limit}"
    )


@contextmanager
def _store(run: RunFolder) -> Iterator[Store]:
    """Give the store, or an empty one, as a copy in memory: what is written there is written nowhere else."""
    with Store(Path(":memory:")) as copy:
        if run.answers.exists() and run.answers.stat().st_size:
            with Store(run.answers, only_read=True) as store:
                store.copy(copy)
        yield copy


def _adopt(run: RunFolder, store: Store, scope: Scope) -> None:
    """Take over what other runs have asked the same models in the same way."""
    stores = sorted(run.root.parent.glob(f"*/{run.answers.name}"))
    # An empty one is just being made.
    others = [path for path in stores if path != run.answers and path.is_file() and path.stat().st_size]
    jobs = jobs_of(run, scope, make_policy=False) if others else []
    keys = [request_key(request, job.backend) for job, _ in jobs for request in job.requests]
    for path in others:
        store.adopt(keys, path)


def _write_answers(run: RunFolder) -> StageReport:
    """Write all that is stored for this run's prompts, whatever models and dialogues were asked last."""
    profile = run.profile
    jobs: list[tuple[Job, list[str]]] = []
    for entry in profile.generation.backends:
        # Under a backend that cannot be made, nothing can have been stored.
        with suppress(PersodpoError):
            jobs += jobs_of(run, Scope((entry.model,)), make_policy=False)
    with _store(run) as store:
        return write_answers(run, "answers", stored_answers(store, jobs, profile.reading))


def write_answers(run: RunFolder, name: str, frame: pd.DataFrame, *, overwrite: bool = False) -> StageReport:
    """Write a table of answers, unless it is written already."""
    settings = {
        "generation": run.profile.generation.model_dump(mode="json", exclude={"budget_usd"}),
        "answers": hashlib.sha256(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()).hexdigest(),
        "corrections": run.profile.switches("A5", "A10a", "A18"),
    }
    with run.locked(WAIT_SECONDS):
        return run.stage(
            name,
            lambda: {name: frame},
            reads=["dialogues"],
            settings=settings,
            outputs=[name],
            overwrite=overwrite,
        )


def jobs_of(run: RunFolder, scope: Scope, *, make_policy: bool) -> list[tuple[Job, list[str]]]:
    """Return what each model of the scope is to answer, with the splits of its dialogues."""
    table = run.read("dialogues")
    parts = [table[table["split"] == split] for split in scope.splits]
    dialogues = pd.concat([part if scope.limit is None else part.head(scope.limit) for part in parts])
    jobs = []
    for model in dict.fromkeys(scope.models):
        entry = _entry_of(run.profile, model)
        weights = _weights(run, entry, make_policy=make_policy)
        jobs.append((job_for(dialogues, entry, run.profile, weights), dialogues["split"].tolist()))
    return jobs


def job_for(dialogues: pd.DataFrame, entry: AskedModel, profile: Profile, weights: str | Path) -> Job:
    """Return what one model is to answer; nothing is connected or loaded yet.

    Args:
        dialogues: Rows of the dialogues table.
        entry: How the model is asked.
        profile: Template, word limit, token budget and sampling.
        weights: Folder or Hub name of a model of this machine.

    Raises:
        PersodpoError: A template is wrong, or a dialogue has no context.
    """
    return Job(requests_for(dialogues, entry, profile), _backend(entry, profile, weights), len(dialogues))


def _backend(entry: AskedModel, profile: Profile, weights: str | Path) -> Backend:
    """Return the backend that a model is asked through; each loads only what it needs."""
    if isinstance(entry, TransformersModel) and entry.served:
        from persodpo.generation.serving import ServedBackend

        return ServedBackend(entry, weights)
    if isinstance(entry, TransformersModel):
        from persodpo.generation.local import TransformersBackend
        from persodpo.training.policy import load_policy

        return TransformersBackend(entry, weights, load_policy)
    from persodpo.generation.batch import BatchBackend
    from persodpo.generation.endpoint import OpenAIBackend

    keys = answer_keys(load_template(profile.prompts.template)) if entry.structured_output else ()
    return (BatchBackend if entry.batch else OpenAIBackend)(entry, keys)


def _entry_of(profile: Profile, model: str) -> AskedModel:
    """Return how a model is asked."""
    entries = {entry.model: entry for entry in profile.generation.backends}
    if model not in entries:
        names = ", ".join(entries) or "none"
        raise PersodpoError(f"Model '{model}' has no entry in generation.backends; there are: {names}.")
    return entries[model]


def _is_small_policy(entry: AskedModel, profile: Profile) -> bool:
    """Tell whether a model is the small policy, which is made from a run's responses; an error where these are its own."""
    weights = entry.weights if isinstance(entry, TransformersModel) else ""
    is_policy = weights == "policy" and profile.policy.model == "small"
    if is_policy and profile.generation.source == "models":
        raise PersodpoError(
            f"Model {entry.model} is the small policy, which is made from responses that are there already; with "
            "generation.source=models name other weights for it."
        )
    return is_policy


def _weights(run: RunFolder, entry: AskedModel, *, make_policy: bool) -> str | Path:
    """Return the weights of a model of this machine, as a folder or a name on the Hub."""
    if not isinstance(entry, TransformersModel):
        return ""
    small = _is_small_policy(entry, run.profile)
    name = run.profile.policy.model if entry.weights == "policy" else entry.weights
    if (small or name.startswith(policy.PREFIX)) and not make_policy:
        return policy.model_folder(run, name)
    if small or name.startswith(policy.PREFIX):
        with run.locked(WAIT_SECONDS):
            return policy.made_model(run, name)
    return place_of(name)
