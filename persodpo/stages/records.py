"""The skip rule for a stage as a whole: while all that it read and made is as it was, it is not even looked into.

A step is a stage of a profile with its options. When it is done, ``runs/<profile>/stages/`` holds a record of its settings,
its code, the sha256 of every file that it read and made, and a digest of the answers that it read. What the tables'
own records say in detail (`persodpo.runfolder.RunFolder.stage`) is asked only where this has changed, so that a run with
nothing to do loads no model and no library of models.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persodpo.imports import ROOT, code_of
from persodpo.runfolder import DATA, PROJECT, RunFolder, StageReport, as_json, digest_of, read_json, sha256, write_json
from persodpo.stages.base import Stage


def unchanged(run: RunFolder, name: str, stage: Stage, options: Mapping[str, Any]) -> list[StageReport] | None:
    """Return the reports of a step that has nothing to do, None if there is something, or nothing is known."""
    _data()  # as it is before anything runs
    record = read_json(_place(run, name, options))
    if record.pop("sha256", None) != digest_of(record):
        return None
    if record != _record(run, stage, record["files"], record["answers"], record["reports"]):
        return None
    return [StageReport(one["stage"], True, one["rows"], 0.0, tuple(one["notes"])) for one in record["reports"]]


def remember(run: RunFolder, name: str, stage: Stage, options: Mapping[str, Any], reports: Sequence[object]) -> None:
    """Write the record of a step that is done, unless it reports more than tables, or an input was edited meanwhile."""
    if not all(isinstance(report, StageReport) for report in reports):
        return
    told = [asdict(report) | {"notes": report.warnings} for report in reports if isinstance(report, StageReport)]
    files = [_relative(path, run) for path in run.files]
    record = _record(run, stage, files, run.asked, as_json({"reports": told})["reports"])
    if any(record["files"].get(_relative(path, run)) != digest for path, digest in run.read_as.items()):
        return
    record["sha256"] = digest_of(record)
    place = _place(run, name, options)
    if read_json(place) != record:
        write_json(place, record)


def _place(run: RunFolder, name: str, options: Mapping[str, Any]) -> Path:
    return run.root / "stages" / f"{name}{digest_of({'options': repr(options)})[:8] if options else ''}.json"


def _record(
    run: RunFolder, stage: Stage, files: Iterable[str], models: Iterable[str], reports: list[Any]
) -> dict[str, Any]:
    """Return what a step follows from, as it is now."""
    modules = [function.__module__ for function in (stage.run, stage.after) if function]
    named = _named(run.profile.model_dump(exclude={"paths", "name", "evaluation"}))
    root = Path(os.path.realpath(run.root))
    paths = {name: root / name for name in sorted({*files, *(_relative(path, run) for path in named)})}
    return {
        "profile": run.profile.digest(),
        "figures": _relative(run.figures, run),
        "code": [*map(code_of, modules), _data()],
        "files": {name: sha256(path) if path.is_file() else None for name, path in paths.items()},
        "answers": _answers(run, models),
        "reports": reports,
    }


def _relative(path: Path, run: RunFolder) -> str:
    """Return where a file lies, seen from the run folder, whatever links lead to their folders."""
    return os.path.relpath(Path(os.path.realpath(path.parent), path.name), os.path.realpath(run.root))


@functools.cache
def _data() -> str:
    """Return a digest of what the package brings besides code: templates, claims, cases, the list of published files."""
    inside = [path for path in (ROOT / "persodpo").rglob("[!.]*.*") if path.suffix not in {".py", ".pyc"}]
    paths = [path for path in [*inside, DATA / "release_manifest.json"] if path.is_file()]
    return digest_of({str(path.relative_to(ROOT)): sha256(path) for path in paths})


def _answers(run: RunFolder, models: Iterable[str]) -> dict[str, Any]:
    """Return a digest of the stored answers of each model."""
    if not run.answers.is_file():
        return dict.fromkeys(models)
    query = "SELECT key, outcome, completion, failure, cost, latency, created FROM answers WHERE model = ? ORDER BY key"
    digests = {}
    try:
        with closing(sqlite3.connect(run.answers)) as store:
            for model in models:
                digest = hashlib.sha256()
                for row in store.execute(query, (model,)):
                    digest.update(repr(row).encode())
                digests[model] = digest.hexdigest()
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
        hub = Path(HF_HUB_CACHE) / f"models--{str(value).replace('/', '--')}" / "refs"
        for place in (PROJECT / value, Path(value).absolute(), hub):
            with suppress(OSError, ValueError):  # a text that can be no file's name
                inside = [*place.glob("*"), *place.glob("*/config.json")]
                yield from [place] if place.is_file() else (path for path in inside if path.is_file())
