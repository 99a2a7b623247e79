"""What all stages share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from persodpo.artifacts import RELEASE_VARIABLE, RunFolder, StageReport
from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.release.fetch import fetch_release, release_files

Reports = list[StageReport]
Targets = Mapping[str, Path]
P = ParamSpec("P")
R = TypeVar("R")


def alone(stage: Callable[P, R]) -> Callable[P, R]:
    """Let a stage, with the stages before it, have its run folder to itself."""

    @wraps(stage)
    def run_alone(*args: P.args, **kwargs: P.kwargs) -> R:
        profile = args[0] if args else kwargs["profile"]
        with RunFolder(cast(Profile, profile)).locked():
            return stage(*args, **kwargs)

    return run_alone


def published_at_hand(run: RunFolder) -> bool:
    """Tell whether the published files are on this machine, so that nothing has to be downloaded for them."""
    if os.environ.get(RELEASE_VARIABLE):
        return True
    try:
        release_files(run.release)
    except PersodpoError:
        return False
    return True


def published_files(run: RunFolder) -> dict[str, Path]:
    """Return the published files by manifest path, fetching them first if any is missing."""
    fetch_release(run.release)
    return release_files(run.release)
