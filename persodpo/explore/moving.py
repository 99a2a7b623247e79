"""Scored responses in, what other weights and thresholds make of them out: the arithmetic of `persodpo.explore.quality`.

The texts are prepared once; a setting then goes through `persodpo.method` as in the stages, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import polars as pl
from numpy.typing import NDArray

from persodpo import method
from persodpo.config import Profile, Weights
from persodpo.errors import PersodpoError
from persodpo.gate import FEATURES, label_accuracy
from persodpo.pairs import PairKeys, answers_of, effective_weights, prompt_table, scale_of

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Setting:
    """What the sliders say.

    Attributes:
        weights: One weight a signal, 0 to 1; they sum to 1.
        low: Quantile of quality at or below which a response may be rejected, 0 to 1.
        high: Quantile at or above which it may be chosen; not under ``low``.
    """

    weights: Mapping[str, float]
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """What a setting gives.

    Attributes:
        quality: Quality of every scored response.
        low: Threshold at or below which a response may be rejected.
        high: Threshold at or above which it may be chosen.
        table: Dialogue and models of each pair.
        sources: Pairs by chosen model (rows) and rejected model (columns), in the order of `Pool.models`.
        means: Mean quality of each model, in that order.
        prompts: Dialogues with a pair.
        changed: Share of the pairs of this setting or of the profile's own that are not pairs of both; 0 to 1.
        length_alone: Share of pairs whose chosen side length alone predicts, as the gate measures it; NaN without pairs.
    """

    quality: Floats
    low: float
    high: float
    table: pl.DataFrame
    sources: Whole
    means: Floats
    prompts: int
    changed: float
    length_alone: float

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.table)

    @property
    def keys(self) -> PairKeys:
        """Dialogue, chosen model and rejected model of each pair."""
        return set(self.table.select("dialogue_id", "model_chosen", "model_rejected").iter_rows())

    @property
    def ranks(self) -> Whole:
        """Rank of each model by mean quality, 1 for the highest."""
        return np.array([1 + int((self.means > mean).sum()) for mean in self.means])


def moved(weights: Mapping[str, float], signal: str, value: float, fallback: Mapping[str, float]) -> dict[str, float]:
    """Move one weight and rescale the others in proportion, so that they still sum to 1.

    Args:
        weights: All weights before the move.
        signal: Which one moves.
        value: Where to, 0 to 1.
        fallback: Proportions of the others where all of them are 0; where these are 0, too, all get the same.

    Returns:
        All weights after the move, in the order of ``weights``.
    """
    others = [name for name in weights if name != signal]
    shares = next(
        (found for found in (weights, fallback) if sum(found[name] for name in others) > 0), dict.fromkeys(others, 1.0)
    )
    total = sum(shares[name] for name in others)
    return {name: value if name == signal else (1.0 - value) * shares[name] / total for name in weights}


class Pool:
    """The scored responses of a run, ready to be rated and paired under any weights and thresholds.

    Attributes:
        models: The models, sorted by name.
        own: The profile's setting.
    """

    def __init__(
        self, responses: pd.DataFrame, scores: pd.DataFrame, dialogues: pd.DataFrame, profile: Profile
    ) -> None:
        """Prepare what no move changes.

        Args:
            responses: Responses table.
            scores: Scores table of the same responses.
            dialogues: Dialogues table, all splits.
            profile: Its weights and quantiles are where the sliders start; all other settings hold throughout.

        Raises:
            PersodpoError: No response is scored, or a score is not finite.
        """
        self._profile = profile
        self.own = Setting(
            profile.scoring.weights.model_dump(), profile.pairs.low_quantile, profile.pairs.high_quantile
        )
        self._scale = scale_of(scores, profile.scoring)
        # Compliance knows no weights, so the table's own is right.
        scored = scores[scores["quality"].notna()].sort_values(["dialogue_id", "model"], ignore_index=True)
        self._scored = pl.from_pandas(scored.drop(columns="quality"))
        self.models = sorted(scored["model"].unique())
        answers = answers_of("perso", responses, scored, prompt_table(dialogues, profile), profile)
        length = FEATURES["length"]
        # Rows and dialogues by number, in the order of the pairs table.
        self._answers = (
            answers.drop("quality", "outcome")
            .sort("dialogue_id", "model")
            .with_row_index("row")
            .with_columns(
                pl.col("dialogue_id").rank("dense").alias("dialogue"),
                pl.col("text").map_elements(lambda t: float(length(t, "")), return_dtype=pl.Float64).alias("length"),
            )
        )
        self._own_pairs = _numbers(self._pairs(self.own)[2], len(self._answers))

    def quality(self, weights: Mapping[str, float]) -> Floats:
        """Return the quality of every scored response, by dialogue and model.

        Raises:
            PersodpoError: All the weight is on a coherence column that the profile leaves out.
        """
        return self._rated(weights)["quality"].to_numpy()

    def _rated(self, weights: Mapping[str, float]) -> pl.DataFrame:
        scoring = self._profile.scoring.model_copy(update={"weights": Weights(**weights)})
        acting = effective_weights(self._profile.model_copy(update={"scoring": scoring}))
        return self._scored.with_columns(method.quality(self._scale, acting).alias("quality"))

    def _pairs(self, setting: Setting) -> tuple[pl.DataFrame, tuple[float, float], pl.DataFrame]:
        """Return the rated responses, both thresholds and the pairs."""
        rated = self._rated(setting.weights)
        limits = method.thresholds(rated, setting.low, setting.high)
        answers = self._answers.join(rated.select("dialogue_id", "model", "quality"), on=["dialogue_id", "model"])
        return rated, limits, method.perso_pairs(answers, *limits).sort("row_chosen", "row_rejected")

    def at(self, setting: Setting) -> Outcome:
        """Rate and pair all responses under a setting.

        Raises:
            PersodpoError: As `quality`, or a quantile is out of 0..1, or the low one is above the high one.
        """
        if not 0.0 <= setting.low <= setting.high <= 1.0:
            raise PersodpoError(
                f"Quantiles must rise within 0 and 1, they are {setting.low} and {setting.high}; choose others."
            )
        rated, (low, high), pairs = self._pairs(setting)
        place = {model: number for number, model in enumerate(self.models)}
        sources = np.zeros((len(place), len(place)), dtype=np.int64)
        for chosen, rejected, count in pairs.group_by("model_chosen", "model_rejected").len().iter_rows():
            sources[place[chosen], place[rejected]] = count
        shared = len(np.intersect1d(_numbers(pairs, len(self._answers)), self._own_pairs, assume_unique=True))
        either = len(pairs) + len(self._own_pairs) - shared
        return Outcome(
            rated["quality"].to_numpy(),
            low,
            high,
            pairs,
            sources,
            rated.group_by("model").agg(pl.col("quality").mean()).sort("model")["quality"].to_numpy(),
            pairs["dialogue_chosen"].n_unique(),
            1.0 - shared / either if either else 0.0,
            label_accuracy(
                pairs["length_chosen"].to_numpy(), pairs["length_rejected"].to_numpy(), pairs["dialogue_chosen"].to_numpy(),
                self._profile.seed,
            ),
        )  # fmt: skip


def _numbers(pairs: pl.DataFrame, rows: int) -> Whole:
    """Return one number for each pair of rows."""
    chosen, rejected = (pairs[f"row_{side}"].to_numpy().astype(np.int64) for side in ("chosen", "rejected"))
    return chosen * rows + rejected
