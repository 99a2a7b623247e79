"""From a source of dialogues to the dialogues table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

import persodpo.dialogues
import persodpo.own_data
from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.miniature.world import write_world
from persodpo.release import published
from persodpo.runfolder import PROJECT, RunFolder, StageReport
from persodpo.stages.base import Need, Targets, published_files
from persodpo.tables import write_table

FOCUS = "https://github.com/pkchat-focus/FoCus"


def needs(_profile: Profile) -> list[Need]:
    """Return nothing: dialogues come first."""
    return []


def make_dialogues(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Make the dialogues table."""
    profile, settings = run.profile, run.profile.dialogues
    inputs = _dialogue_files(run)

    def build(targets: Targets) -> None:
        frames = []
        for key, path in inputs.items():
            split: persodpo.dialogues.Split = "train" if "train" in key else "valid"
            if settings.source == "published_focus":
                frames.append(persodpo.dialogues.published_focus(path, split))
            elif settings.source == "miniature":
                frames.append(persodpo.dialogues.focus_json(path, split).assign(dataset="miniature"))
            elif settings.source == "csv":
                frames.append(persodpo.own_data.read_dialogues(path))
            else:
                drawn: dict[str, Any] = {
                    "size": settings.train_size,
                    "seed": profile.seed,
                    "max_reference_words": settings.max_reference_words,
                }
                frames.append(persodpo.dialogues.focus_json(path, split, **(drawn if split == "train" else {})))
        write_table(targets["dialogues"], "dialogues", pd.concat(frames, ignore_index=True))

    report = run.stage(
        "dialogues",
        inputs=inputs,
        settings=settings.model_dump(mode="json") | ({"seed": profile.seed} if settings.source == "focus_json" else {}),
        outputs=["dialogues"],
        code=__name__,
        build=build,
        overwrite=overwrite,
    )
    return [report]


def _dialogue_files(run: RunFolder) -> dict[str, Path]:
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
    files = published_files(run)
    return {name: files[name] for name in (published.prompts_file("train"), published.prompts_file("valid"))}
