"""The stages in the order in which text flows, the one loop that runs them, and its skip rule.

A stage reads the tables of earlier ones and makes its own. No stage calls another: the loop does first what a stage needs.
When a step (a stage of a profile, with options) is done, ``runs/<profile>/stages/`` holds a record: its settings, its code,
the sha256 of every file that it read or made, and a digest of the answers that it read. While these are as they were, the
step is not even looked into, so that a run with nothing to do loads no model and no library of models. Where one has
changed, `persodpo.runfolder.RunFolder.stage` asks the tables' own records what there is to do.
"""

from __future__ import annotations

import functools
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.files import DATA, PROJECT, as_json, digest_of, read_json, sha256, write_json
from persodpo.imports import code_of
from persodpo.runfolder import RunFolder, StageReport
from persodpo.stages import ablate, audit, cards, dialogues, evaluate, figures, generate, pairs, score, train
from persodpo.stages.base import Need, Stage, published_at_hand

__all__ = ["STAGES", "make", "plan", "published_at_hand"]

#: Every stage by name, in order.
STAGES: Mapping[str, Stage] = {
    "dialogues": Stage(dialogues.make_dialogues),
    "generate": Stage(generate.make_responses, generate.needs, shared=True),
    "ask": Stage(generate.ask, generate.needs_to_ask, shared=True),
    "score": Stage(score.make_scores, ["generate"]),
    "pairs": Stage(pairs.make_pairs, ["score"], after=cards.after_pairs),
    "train": Stage(train.train_arms, train.needs, after=cards.after_training),
    "evaluate": Stage(evaluate.evaluate, evaluate.needs, after=cards.after_evaluation),
    "ablate": Stage(ablate.ablate, ablate.needs),
    "audit": Stage(audit.judge, ["pairs"], profile=audit.as_released),
    "figures": Stage(figures.draw, ["train", "evaluate", "ablate"]),
}


class Step(NamedTuple):
    """A stage of a profile, with options."""

    profile: Profile
    name: str
    options: Mapping[str, Any]


def plan(profile: Profile, name: str, options: Mapping[str, Any] | None = None) -> list[Step]:
    """Return a stage and all that it needs, in the order in which they run.

    Raises:
        PersodpoError: There is no such stage, or the profile cannot be run; nothing is written.
    """
    if name not in STAGES:
        raise PersodpoError(f"There is no stage '{name}'; there are {', '.join(STAGES)}.")
    stage, options = STAGES[name], options or {}
    profile = stage.profile(profile) if stage.profile else profile
    steps: list[Step] = []
    for need in stage.needs(profile, **options) if callable(stage.needs) else map(Need, stage.needs):
        steps += [step for step in plan(need.profile or profile, need.stage, need.options) if step not in steps]
    return [*steps, Step(profile, name, options)]


def make(profile: Profile, name: str, overwrite: bool = False, **options: Any) -> list[object]:
    """Run a stage, and before it those that it needs where something has changed.

    Args:
        profile: The profile.
        name: One of `STAGES`.
        overwrite: Run the stage even if nothing changed; those before it run only where something has.
        **options: Those of the stage.

    Returns:
        Reports of what was done, in order; each reads as a line.

    Raises:
        PersodpoError: The profile cannot be run, a stage fails, or another process works in the run folder.
    """
    reports: list[object] = []
    steps = plan(profile, name, options)
    wait = generate.WAIT_SECONDS if name == "dialogues" or STAGES[name].shared else 0.0
    with ExitStack() as locks:
        for step in steps:
            run, anew = RunFolder(step.profile), overwrite and step is steps[-1]
            done: Sequence[object] | None = None if anew else _unchanged(run, step)
            if done is None:
                if STAGES[step.name].shared:
                    locks.close()
                else:
                    locks.enter_context(run.locked(wait))
                done = _run(run, step, anew)
            else:
                run.write_settings()
            if run.profile.name != steps[-1].profile.name:  # of another run, that arm ``corrected`` needs
                done = [
                    replace(one, stage=f"{run.profile.name}, {one.stage}") if isinstance(one, StageReport) else one
                    for one in done
                ]
            reports += done
    return reports


def nothing_to_do(profile: Profile) -> bool:
    """Tell whether no stage of a profile would do anything; the audit is left out where nothing published is at hand."""
    names = ["figures", *(["audit"] if published_at_hand(RunFolder(profile)) else [])]
    try:
        steps = [step for name in names for step in plan(profile, name)]
    except PersodpoError:  # there is a stage that this profile has not
        return False
    return all(_unchanged(RunFolder(step.profile), step) is not None for step in steps)


def _run(run: RunFolder, step: Step, overwrite: bool) -> list[object]:
    """Run a stage and write its record, unless it reports more than tables, or an input was edited meanwhile."""
    stage = STAGES[step.name]
    reports = [*stage.run(run, overwrite=overwrite, **step.options)]
    notes = tuple(stage.after(run, **step.options)) if stage.after else ()
    if notes and isinstance(last := reports[-1], StageReport):
        reports[-1] = replace(last, notes=(*last.notes, *notes))
    tables = [report for report in reports if isinstance(report, StageReport)]
    if len(tables) == len(reports):
        records = [asdict(report) | {"notes": report.warnings} for report in tables]
        record = _record(run, stage, run.files, run.asked, as_json({"reports": records})["reports"])
        if all(record["files"].get(str(path)) == digest for path, digest in run.read_as.items()):
            write_json(_place(run, step), record | {"sha256": digest_of(record)})
    return reports


def _unchanged(run: RunFolder, step: Step) -> list[StageReport] | None:
    """Return the reports of a step that has nothing to do, None if there is something, or nothing is known."""
    _data()  # as it is before anything runs
    record = read_json(_place(run, step))
    if record.pop("sha256", None) != digest_of(record):
        return None
    if record != _record(run, STAGES[step.name], record["files"], record["answers"], record["reports"]):
        return None
    return [StageReport(one["stage"], True, one["rows"], 0.0, tuple(one["notes"])) for one in record["reports"]]


def _place(run: RunFolder, step: Step) -> Path:
    options = digest_of({"options": repr(step.options)})[:8] if step.options else ""
    return run.root / "stages" / f"{step.name}{options}.json"


def _record(
    run: RunFolder, stage: Stage, files: Iterable[str | Path], models: Iterable[str], reports: list[Any]
) -> dict[str, Any]:
    """Return what a step follows from, as it is now; that of a copied run folder holds for the original alone."""
    modules = [function.__module__ for function in (stage.run, stage.after) if function]
    settings = _named(run.profile.model_dump(exclude={"home", "name", "evaluation"}))
    return {
        "profile": run.profile.digest(),
        "folders": [str(run.root), str(run.figures)],
        "code": [*map(code_of, modules), _data()],
        "files": {
            str(path): sha256(path) if path.is_file() else None for path in sorted(map(Path, {*files, *settings}))
        },
        "answers": _answers(run, models),
        "reports": reports,
    }


@functools.cache
def _data() -> str:
    """Return a digest of what the package brings besides code: templates, claims, cases, the list of published files."""
    inside = [path for path in (PROJECT / "persodpo").rglob("[!.]*.*") if path.suffix not in {".py", ".pyc"}]
    paths = [path for path in [*inside, DATA / "release_manifest.json"] if path.is_file()]
    return digest_of({str(path.relative_to(PROJECT)): sha256(path) for path in paths})


def _answers(run: RunFolder, models: Iterable[str]) -> dict[str, Any]:
    """Return a digest of the stored answers of each model."""
    if not run.answers.is_file():
        return dict.fromkeys(models)
    query = "SELECT key, outcome, completion, failure, cost, latency, created FROM answers WHERE model = ? ORDER BY key"
    digests = {}
    try:
        with closing(sqlite3.connect(run.answers)) as store:
            for model in models:
                digests[model] = hashlib.sha256(repr(store.execute(query, (model,)).fetchall()).encode()).hexdigest()
    except sqlite3.Error:  # the stage says what is wrong with it
        return {}
    return digests


def _named(value: Any) -> Iterator[Path]:
    """Yield the files that settings name, alone or in a folder, and what says which revision the Hub's cache has."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _named(inner)
    elif isinstance(value, str | Path) and str(value):
        hub = Path(HF_HUB_CACHE) / f"models--{str(value).partition('@')[0].replace('/', '--')}" / "refs"
        for place in (PROJECT / value, Path(value).absolute(), hub):
            with suppress(OSError, ValueError):  # a text that can be no file's name
                inside = [*place.glob("*"), *place.glob("*/config.json")]
                yield from [place] if place.is_file() else (path for path in inside if path.is_file())
