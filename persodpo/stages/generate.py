"""From dialogues to responses: published ones, or those of models that are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd

import persodpo.completions
import persodpo.own_data
from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.generation.ask import generate_all
from persodpo.generation.requests import Job, request_key
from persodpo.generation.store import Store
from persodpo.generation.summary import Forecast, Summary, forecast, stored_answers
from persodpo.release import published
from persodpo.release.fetch import fetch_release
from persodpo.runfolder import PROJECT, RunFolder, StageReport, Tables
from persodpo.stages.asking import WAIT_SECONDS, Scope, entry_of, is_small_policy, jobs_of
from persodpo.stages.base import Need

_UNFINISHED = (
    "Not every prompt is answered yet ({summary}); run `persodpo {command} --profile {profile}` again, what is stored is "
    "not asked again."
)


def needs(profile: Profile) -> list[Need]:
    """Return what responses follow from.

    Raises:
        PersodpoError: The published responses cannot be had for this profile.
    """
    if profile.generation.source == "published":
        published.ranked_sets(profile.generation.models)
        if profile.dialogues.source != "published_focus":
            raise PersodpoError(
                "generation.source published has responses to the published FoCus prompts only; "
                "set dialogues.source=published_focus."
            )
    return [Need("dialogues")]


def make_responses(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the responses tables: train responses to rank, and held-out ones where they are published.

    With ``generation.source: models`` the profile's models are asked what is not stored yet; with ``csv`` the user's own
    completions are read.
    """
    profile = run.profile
    if profile.generation.csv_file and profile.generation.source == "csv":
        with run.locked(WAIT_SECONDS):
            return [_own(run, PROJECT / profile.generation.csv_file, overwrite)]
    if profile.generation.source == "published":
        with run.locked(WAIT_SECONDS):
            return [_published(run, overwrite)]
    scope = Scope(profile.generation.models, ("train",))
    run.asked |= set(scope.models)
    summaries = _ask(run, scope, retry_failed=False, progress=True)
    check_finished(summaries, profile, "generate")
    return [_write_answers(run), _asked_responses(run, scope, overwrite)]


def check_finished(summaries: Sequence[Summary], profile: Profile, command: str) -> None:
    """Refuse to go on where a model has stopped before its end.

    Raises:
        PersodpoError: One has; says how to go on.
    """
    for summary in summaries:
        if summary.stopped:
            raise PersodpoError(_UNFINISHED.format(summary=summary, command=command, profile=profile.name))


def _own(run: RunFolder, path: Path, overwrite: bool) -> StageReport:
    """Read the user's own completions."""
    profile = run.profile

    report = run.stage(
        "generate",
        lambda: {"responses": persodpo.own_data.read_responses(path, run.read("dialogues"), profile.reading)},
        reads=["dialogues"],
        files={"csv": path},
        settings={"source": "csv", "corrections": profile.switches("A18")},
        outputs=["responses"],
        overwrite=overwrite,
    )
    return replace(report, notes=(_outcomes(run),))


def _outcomes(run: RunFolder) -> str:
    """Say what became of the completions of a run."""
    responses = run.read("responses")
    counts = ", ".join(f"{name} {count:,}" for name, count in responses["outcome"].value_counts().items())
    lost = int(responses["response"].isna().sum())
    left = f"; {lost:,} hold no answer at all and enter no pair" if lost else ""
    return f"outcomes: {counts}{left}"


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

    return run.stage(
        "generate",
        build,
        reads=["dialogues"],
        files=published.set_files(files, [which for sets in tables.values() for which in sets]),
        settings={
            "source": "published",
            "models": list(profile.generation.models),
            "corrections": profile.switches("A18"),
        },
        outputs=list(tables),
        overwrite=overwrite,
    )


def needs_to_ask(profile: Profile, scope: Scope, **_: object) -> list[Need]:
    """Return what asking the models of a scope follows from.

    Raises:
        PersodpoError: A model is unknown.
    """
    small = [is_small_policy(entry_of(profile, model), profile) for model in scope.models]
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
        progress: Show a bar for each model on a terminal.

    Returns:
        A summary for each model, and the report of the table.

    Raises:
        PersodpoError: The store or the disk fails; what had been stored is safe.
    """
    summaries = _ask(run, scope, retry_failed=retry_failed, progress=progress)
    return [*summaries, _write_answers(run)]


def forecasts(run: RunFolder, scope: Scope, retry_failed: bool = False) -> list[Forecast]:
    """Say what `ask` would take in a run with dialogues; nothing is sent or loaded."""
    with _store(run) as store:
        _adopt(run, store, scope)
        jobs = [job for job, _ in jobs_of(run, scope, make_policy=False)]
        return [forecast(job.requests, job.backend, store, retry_failed=retry_failed) for job in jobs]


def forecast_report(run: RunFolder, scope: Scope, retry_failed: bool = False) -> Iterator[str]:
    """Yield `forecasts` as lines: one a model, then all together beside the budget."""
    found = forecasts(run, scope, retry_failed)
    yield from map(str, found)
    with _store(run) as store:
        spent = store.spent()
    known = [one for one in found if one.cost is not None and one.highest_cost is not None]
    expected, most = (sum(getattr(one, name) for one in known) for name in ("cost", "highest_cost"))
    unknown = f", {len(found) - len(known)} models without prices" if len(known) < len(found) else ""
    budget = run.profile.generation.budget_usd
    limit = "no budget is set" if budget is None else f"the budget is ${budget:,.2f}"
    yield (
        f"together: {sum(one.to_ask for one in found):,} requests, ${expected:,.2f} (at most ${most:,.2f}){unknown}; "
        f"${spent:,.4f} are spent, {limit}"
    )


@contextmanager
def _store(run: RunFolder) -> Iterator[Store]:
    """Open the store to look things up; where there is none, an empty one that leaves no file."""
    with Store(run.answers if run.answers.exists() else Path(":memory:")) as store:
        yield store


def _adopt(run: RunFolder, store: Store, scope: Scope) -> None:
    """Take over what other runs have asked the same models in the same way."""
    others = [path for path in sorted(run.root.parent.glob(f"*/{run.answers.name}")) if path != run.answers]
    jobs = jobs_of(run, scope, make_policy=False) if others else []
    keys = [request_key(request, job.backend) for job, _ in jobs for request in job.requests]
    for path in others:
        with suppress(PersodpoError):  # it is damaged or of another version; what it holds is asked again
            store.adopt(keys, path)


def _ask(run: RunFolder, scope: Scope, *, retry_failed: bool, progress: bool) -> list[Summary]:
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


def _write_answers(run: RunFolder) -> StageReport:
    """Write all that is stored for this run's prompts, whatever models and dialogues were asked last."""
    profile = run.profile
    with _store(run) as store:
        jobs: list[tuple[Job, list[str]]] = []
        for entry in profile.generation.backends:
            # Under a backend that cannot be made, nothing can have been stored.
            with suppress(PersodpoError):
                jobs += jobs_of(run, Scope((entry.model,)), make_policy=False)
        frame = stored_answers(store, jobs, profile.reading)
    return write_answers(run, "answers", frame)


def _asked_responses(run: RunFolder, scope: Scope, overwrite: bool) -> StageReport:
    """Write the responses of the models that are ranked."""
    with _store(run) as store:
        frame = stored_answers(store, jobs_of(run, scope, make_policy=False), run.profile.reading)
    frame = frame.sort_values("dialogue_id", kind="stable", ignore_index=True)
    return write_answers(run, "responses", frame, overwrite=overwrite)


def write_answers(run: RunFolder, name: str, frame: pd.DataFrame, *, overwrite: bool = False) -> StageReport:
    """Write a table of answers, unless it is written already."""
    content = hashlib.sha256(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()).hexdigest()
    generation = run.profile.generation.model_dump(mode="json", exclude={"budget_usd"})
    with run.locked(WAIT_SECONDS):
        return run.stage(
            name,
            lambda: {name: frame},
            reads=["dialogues"],
            settings={
                "generation": generation,
                "answers": content,
                "corrections": run.profile.switches("A5", "A10a", "A18"),
            },
            outputs=[name],
            overwrite=overwrite,
        )
