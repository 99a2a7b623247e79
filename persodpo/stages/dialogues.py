"""From a source of dialogues to the dialogues table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from persodpo.config import Profile
from persodpo.dialogues import Split, focus_json, published_focus
from persodpo.errors import PersodpoError
from persodpo.files import PROJECT
from persodpo.miniature.world import write_world
from persodpo.own_data import read_dialogues
from persodpo.release import published
from persodpo.release.fetch import fetch_release
from persodpo.runfolder import RunFolder, StageReport, Tables

FOCUS = "https://github.com/pkchat-focus/FoCus"


def make_dialogues(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the dialogues table."""
    settings, files = run.profile.dialogues, _files(run)
    seed = {"seed": run.profile.seed} if settings.source == "focus_json" else {}

    def build() -> Tables:
        return {"dialogues": pd.concat([_read(run.profile, *file) for file in files.items()], ignore_index=True)}

    report = run.stage(
        "dialogues", build, files=files, settings=settings.model_dump(mode="json") | seed, outputs=["dialogues"],
        overwrite=overwrite,
    )  # fmt: skip
    return [report]


def _read(profile: Profile, name: str, path: Path) -> pd.DataFrame:
    settings = profile.dialogues
    split: Split = "train" if "train" in name else "valid"
    if settings.source == "published_focus":
        return published_focus(path, split)
    if settings.source == "miniature":
        return focus_json(path, split).assign(dataset="miniature")
    if settings.source == "csv":
        return read_dialogues(path)
    drawn: dict[str, Any] = {
        "size": settings.train_size,
        "seed": profile.seed,
        "max_reference_words": 110,
    }  # the authors'
    return focus_json(path, split, **(drawn if split == "train" else {}))


def _files(run: RunFolder) -> dict[str, Path]:
    """Return the files that the dialogues are read from."""
    settings = run.profile.dialogues
    if settings.source == "miniature":
        world = run.profile.miniature
        paths = write_world(run.root / "world", world.train, world.valid, run.profile.seed)
        return dict(zip(("train", "valid"), paths, strict=True))
    if settings.source == "focus_json":
        given = {"train": settings.train_file, "valid": settings.valid_file}
        lost = [path for path in given.values() if path and not path.is_file()]
        if lost:
            raise PersodpoError(
                f"{lost[0]} is not there; get the FoCus files from {FOCUS}, or name others in dialogues.train_file and "
                "dialogues.valid_file."
            )
        return {split: path for split, path in given.items() if path}
    if settings.source == "csv" and settings.csv_file:
        return {"csv": PROJECT / settings.csv_file}
    files = fetch_release(run.release)
    return {name: files[name] for name in (published.prompts_file("train"), published.prompts_file("valid"))}
