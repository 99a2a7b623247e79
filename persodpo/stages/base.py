"""What a stage is, and what several of them share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from persodpo.config import Profile
from persodpo.errors import PersodpoError
from persodpo.files import RELEASE_VARIABLE
from persodpo.release.fetch import release_files
from persodpo.runfolder import RunFolder


@dataclass(frozen=True)
class Need:
    """A stage that must be done before another, under the same profile unless there is one here."""

    stage: str
    profile: Profile | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A step of the way from dialogues to figures.

    Attributes:
        run: Called with the run folder, whether to run even if nothing changed, and the options; makes tables from those of
            earlier stages, and returns reports.
        needs: What must be done first: stages, or what says so of the profile and the options, before anything runs, and
            raises if the profile cannot be run.
        after: Called with the run folder and the options, whether the tables were made anew or not; returns lines to show.
        shared: Other processes may work in the run folder meanwhile, for models take hours to answer.
        profile: Given the run's profile, the one under which the stage is done.
    """

    run: Callable[..., Sequence[object]]
    needs: Callable[..., Sequence[Need]] | Sequence[str] = ()
    after: Callable[..., Sequence[str]] | None = None
    shared: bool = False
    profile: Callable[[Profile], Profile] | None = None


def published_at_hand(run: RunFolder) -> bool:
    """Tell whether the published files are on this machine, so that nothing has to be downloaded for them."""
    if os.environ.get(RELEASE_VARIABLE):
        return True
    try:
        release_files(run.release)
    except PersodpoError:
        return False
    return True
