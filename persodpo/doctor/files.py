"""The files that a profile reads: dialogues, published files, templates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persodpo.artifacts import DATA, PROJECT, RunFolder, read_json, sha256
from persodpo.dialogues import Split, focus_json
from persodpo.doctor.findings import Finding, missing, ok
from persodpo.errors import PersodpoError
from persodpo.own_data import read_dialogues, read_responses
from persodpo.prompts import load_system, load_template
from persodpo.release.fetch import release_files
from persodpo.settings import AskedModel, Profile

FOCUS = "https://github.com/pkchat-focus/FoCus"


def asked(profile: Profile) -> list[AskedModel]:
    """Return how the models that are ranked are asked, none where responses are read."""
    if profile.generation.source != "models":
        return []
    return [entry for entry in profile.generation.backends if entry.model in profile.generation.models]


def files(profile: Profile) -> Iterator[Finding]:
    """Yield a finding for each file that the profile reads; weights and word vectors are looked at apart."""
    yield from _dialogues(profile)
    if uses := needs_published(profile):
        yield _published(RunFolder(profile).release, uses)
    yield from _templates(profile)


def _dialogues(profile: Profile) -> Iterator[Finding]:
    settings = profile.dialogues
    if settings.source == "miniature":
        yield ok("Dialogues: the miniature world is generated, it needs no file.")
    if settings.source == "csv" and settings.csv_file:
        yield from _own(profile, PROJECT / settings.csv_file)
    if settings.source != "focus_json":
        return
    if settings.train_file:
        drawn = {"size": settings.train_size, "seed": settings.sample_seed}
        yield _focus("train", settings.train_file, max_reference_words=settings.max_reference_words, **drawn)
    if settings.valid_file:
        yield _focus("valid", settings.valid_file)


def _own(profile: Profile, path: Path) -> Iterator[Finding]:
    """Read the user's own files."""
    try:
        dialogues = read_dialogues(path)
        yield ok(f"Dialogues: {path} gives {len(dialogues):,} dialogues.")
        if profile.generation.source == "csv" and profile.generation.csv_file:
            answers = PROJECT / profile.generation.csv_file
            own = read_responses(answers, dialogues, profile.completions)
            yield ok(f"Completions: {answers} gives {len(own):,} of {own['model'].nunique()} models.")
    except PersodpoError as error:
        yield missing(f"Own data: {error}")


def _focus(split: Split, path: Path, **drawn: Any) -> Finding:
    if not path.is_file():
        return missing(
            f"Dialogues: {path} is not there; get the FoCus files from {FOCUS}, or name another file in "
            f"dialogues.{split}_file."
        )
    try:
        found = focus_json(path, split, **drawn)
    except PersodpoError as error:
        return missing(f"Dialogues: {error}")
    return ok(f"Dialogues: {path} gives {len(found):,} {split} dialogues.")


def needs_published(profile: Profile) -> list[str]:
    """Return the settings under which the profile reads published files."""
    sources = {
        "dialogues": profile.dialogues.source == "published_focus",
        "generation": profile.generation.source == "published",
        "scoring": profile.scoring.source == "published",
        "evaluation": profile.evaluation.source == "published",
    }
    return [f"{section}.source" for section, reads in sources.items() if reads]


def check_published(folder: Path) -> int:
    """Check the published files by their sha256, without fetching any; return how many there are.

    Raises:
        PersodpoError: One is missing or is not the published one.
    """
    found = release_files(folder)
    listed = read_json(DATA / "release_manifest.json")["files"]
    damaged = [file["path"] for file in listed if sha256(found[file["path"]]) != file["sha256"]]
    if damaged:
        raise PersodpoError(
            f"'{damaged[0]}' in {folder} is not the published file ({len(damaged)} such files); get the published files "
            "with `persodpo fetch release`."
        )
    return len(found)


def _published(folder: Path, uses: list[str]) -> Finding:
    names = ", ".join(uses)
    try:
        count = check_published(folder)
    except PersodpoError as error:
        return missing(f"Published files ({names}): {error}")
    return ok(f"Published files ({names}): all {count} are in {folder}, byte for byte.")


def _templates(profile: Profile) -> Iterator[Finding]:
    try:
        load_template(profile.prompts.template)
        if any(entry.format == "chat_with_system" for entry in asked(profile)):
            load_system(profile.prompts.system, profile.prompts)
    except PersodpoError as error:
        yield missing(f"Prompts: {error}")
