"""A run: a profile, its folder, and the stages that fill it. The one object that a notebook needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from persodpo.config import DEFAULT_PROFILE, Profile, load_profile
from persodpo.runfolder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run(RunFolder):
    """A profile's run folder, its stages and its figures.

    Example:
        >>> run = Run("mini", overrides=["pairs.high_quantile=0.7"])
        >>> run.make("pairs")
        >>> run.table("pairs/perso")
        >>> run.figure("quality")
    """

    def __init__(
        self,
        profile: str | Path | Profile = DEFAULT_PROFILE,
        overrides: Sequence[str] = (),
        seed: int | None = None,
    ) -> None:
        """Load a profile; nothing is written.

        Args:
            profile: A shipped profile's name, the path of a YAML file, or settings as they are.
            overrides: Settings to change, ``section.key=value``.
            seed: Another seed than the profile's.
        """
        overridden = [*overrides, *([] if seed is None else [f"seed={seed}"])]
        super().__init__(profile if isinstance(profile, Profile) else load_profile(profile, overridden))

    @property
    def settings(self) -> Profile:
        """The resolved settings."""
        return self.profile

    def make(self, stage: str, overwrite: bool = False, **options: Any) -> list[object]:
        """Run a stage, and before it those that it needs where something has changed.

        Args:
            stage: dialogues, generate, ask, score, pairs, train, evaluate, ablate, audit or figures.
            overwrite: Run it even if nothing changed.
            **options: Those of the stage: ``arms`` and ``seeds`` of train; ``scope`` and ``retry_failed`` of ask.

        Returns:
            A report of each table, which prints as a line; errors as `persodpo.stages.make`.
        """
        from persodpo import stages  # noqa: PLC0415 - slow to load, and not needed to read tables

        return stages.make(self.profile, stage, overwrite, **options)

    def table(self, name: str) -> pd.DataFrame:
        """Return a table of the run, such as ``pairs/perso``; its columns are told in `persodpo.tables`."""
        return self.read(name)

    def figure(self, name: str) -> Figure:
        """Draw a figure from the run's tables; stage ``figures`` saves them all as PDF, PNG and JSON."""
        from persodpo.stages.figures import draw_figure  # noqa: PLC0415 - the same

        return draw_figure(self, name)
