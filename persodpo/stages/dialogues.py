"""From a source of dialogues to the dialogues table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from persodpo.config import Profile, is_csv
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
    sampled = settings.source not in {"miniature", "published"} and not is_csv(settings.source)
    seed = {"seed": run.profile.seed} if sampled else {}

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
    if settings.source == "published":
        return published_focus(path, split)
    if settings.source == "miniature":
        return focus_json(path, split).assign(dataset="miniature")
    if is_csv(settings.source):
        return read_dialogues(path)
    sampling: dict[str, Any] = {
        "size": settings.train_size,
        "seed": profile.seed,
        "max_reference_words": 110,
    }  # the authors'
    return focus_json(path, split, **(sampling if split == "train" else {}))


def _files(run: RunFolder) -> dict[str, Path]:
    """Return the files that the dialogues are read from."""
    settings = run.profile.dialogues
    if settings.source == "miniature":
        world = run.profile.miniature
        paths = write_world(run.root / "world", world.train, world.valid, run.profile.seed)
        return dict(zip(("train", "valid"), paths, strict=True))
    if settings.source == "published":
        files = fetch_release(run.release)
        return {name: files[name] for name in (published.prompts_file("train"), published.prompts_file("valid"))}
    if is_csv(settings.source):
        if not (PROJECT / settings.source).is_file():
            raise PersodpoError(f"{PROJECT / settings.source} is not there; name the CSV file of your dialogues.")
        return {"csv": PROJECT / settings.source}
    focus = {split: PROJECT / settings.source / f"{split}_focus.json" for split in ("train", "valid")}
    for path in focus.values():
        if not path.is_file():
            raise PersodpoError(
                f"{path} is not there; dialogues.source is miniature, published, a CSV file of yours, or the folder of the "
                f"files of {FOCUS}."
            )
    return focus
