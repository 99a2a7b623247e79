"""What if other weights made the quality score, and other quantiles the pairs?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import pandas as pd

from persodpo.config import Profile
from persodpo.explore.moving import Outcome, Pool, Setting, moved
from persodpo.explore.panel import Panel, labelled, or_sentence
from persodpo.explore.quality_picture import QualityPicture
from persodpo.method import SIGNALS
from persodpo.metrics import metric_label
from persodpo.runfolder import RunFolder
from persodpo.show import text_table

_STEP = 0.01


def _on_step(weight: float) -> float:
    """Return a weight as a slider can show it."""
    return round(weight, 2)


class QualityPanel(Panel):
    """Sliders for weights and thresholds.

    Attributes:
        pool: The responses, for use without sliders.
        outcome: What the sliders give now.
    """

    def __init__(self, pool: Pool, profile: Profile) -> None:
        """Start from the profile's own setting; see `quality`."""
        self.pool = pool
        self.outcome = pool.at(pool.own)
        self._own = self.outcome
        self._weights = dict(pool.own.weights)
        self._picture = QualityPicture(pool, self._own, _highest(profile))
        self._sliders = {
            signal: labelled(
                widgets.FloatSlider, f"{metric_label(signal)} weight", value=_on_step(self._weights[signal]), min=0.0,
                max=1.0, step=_STEP, readout_format=".2f",
            )
            for signal in SIGNALS
        }  # fmt: skip
        self._range = labelled(
            widgets.FloatRangeSlider, "Threshold quantiles", value=(pool.own.low, pool.own.high), min=0.0, max=1.0,
            step=_STEP, readout_format=".2f",
        )  # fmt: skip
        self._reset = widgets.Button(
            description="Back to the profile's", layout=widgets.Layout(width="auto", align_self="flex-start")
        )
        self._reset.on_click(lambda button: self.refresh({"owner": button}))
        super().__init__({**self._sliders, "quantiles": self._range, "reset": self._reset}, self._render)

    @property
    def setting(self) -> Setting:
        """What the sliders say."""
        low, high = self._range.value
        return Setting(dict(self._weights), low, high)

    def follow(self, change: Any) -> None:
        """Let the other weights give way in proportion."""
        signal = next((name for name, slider in self._sliders.items() if change["owner"] is slider), None)
        if signal is not None:
            if change["new"] == _on_step(self._weights[signal]):
                return  # no hand moved it
            self._place(moved(self._weights, signal, change["new"], self.pool.own.weights))
        elif change["owner"] is self._reset:
            self._place(dict(self.pool.own.weights))
            self._range.value = (self.pool.own.low, self.pool.own.high)

    def _place(self, weights: dict[str, float]) -> None:
        self._weights = weights
        for name, slider in self._sliders.items():
            # A browser snaps what lies between two steps, and sends it back as if a hand had moved it.
            slider.value = _on_step(weights[name])

    def _render(self) -> Sequence[Any]:
        self.outcome = self.pool.at(self.setting)
        return self._picture.png(self.outcome), text_table(_numbers(self.outcome, self._own))


def _highest(profile: Profile) -> float:
    """Return the highest quality that there can be: 1, and all the weight on compliance with its bonus."""
    return 1.0 + (profile.scoring.format_bonus if profile.corrects("A3") else 0.0)


def _numbers(now: Outcome, own: Outcome) -> pd.DataFrame:
    """Set the numbers of a setting beside the profile's own."""
    columns = {name: _column(outcome) for name, outcome in (("profile", own), ("now", now))}
    return pd.DataFrame(columns).rename_axis("perso pairs")


def _column(outcome: Outcome) -> dict[str, str]:
    alone = "too few pairs" if math.isnan(outcome.length_alone) else f"{outcome.length_alone:.1%} of pairs"
    return {
        "pairs": f"{outcome.pairs:,}",
        "prompts with a pair": f"{outcome.prompts:,}",
        "thresholds": f"{outcome.low:.4f} and {outcome.high:.4f}",
        "pairs of one of both settings only": f"{outcome.changed:.1%}",
        "length alone predicts the chosen side of": alone,
    }


@or_sentence
def quality(run: RunFolder) -> Panel:
    """Move the five weights and the two thresholds of a run, and see what becomes of scores, pairs and ranks.

    The weights stay a mixture: moving one rescales the others in proportion. Nothing is written.

    Args:
        run: A run with dialogues, responses and scores.

    Returns:
        The panel, its controls named after the signals, and ``quantiles`` and ``reset``; a sentence if a table is missing.
    """
    responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    return QualityPanel(Pool(responses, scores, dialogues, run.profile), run.profile)
