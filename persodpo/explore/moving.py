"""Scored responses in, what other weights and thresholds make of them out: the arithmetic of `persodpo.explore.quality`.

Everything that a move leaves as it is (texts, scaled signals, which responses may stand against each other) is worked out
once and kept in arrays, so that a setting takes milliseconds. The numbers are those of `persodpo.variants.rebuild`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from persodpo.errors import PersodpoError
from persodpo.gate import FEATURES, label_accuracy
from persodpo.pairs import prompt_table
from persodpo.scoring.quality import METRICS, SIGNALS, Scale, connect, effective_weights, measure_scale
from persodpo.scoring_settings import Weights
from persodpo.settings import Profile, Scoring

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Bools = NDArray[np.bool_]


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
        kept: Which of `Pool.candidates` are pairs.
        sources: Pairs by chosen model (rows) and rejected model (columns), in the order of `Pool.models`.
        means: Mean quality of each model, in that order.
        prompts: Dialogues with a pair.
        changed: Share of the pairs of this setting or of the profile's own that are not pairs of both; 0 to 1.
        length_alone: Share of pairs whose chosen side length alone predicts, as the gate measures it; NaN without pairs.
    """

    quality: Floats
    low: float
    high: float
    kept: Bools
    sources: Whole
    means: Floats
    prompts: int
    changed: float
    length_alone: float

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return int(self.kept.sum())

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
        candidates: Rows of the chosen and of the rejected side, [2, candidates], of all that could be a pair.
        own: The profile's setting.
    """

    def __init__(
        self, responses: pd.DataFrame, scores: pd.DataFrame, dialogues: pd.DataFrame, profile: Profile
    ) -> None:
        """Work out what no move changes.

        Args:
            responses: Responses table.
            scores: Scores table of the same responses.
            dialogues: Dialogues table, all splits.
            profile: Its weights and quantiles are where the sliders start; all other settings hold throughout.

        Raises:
            PersodpoError: No response is scored, or a score is not finite.
        """
        self._scoring: Scoring = profile.scoring
        self._seed = profile.seed
        self.own = Setting(
            profile.scoring.weights.model_dump(), profile.pairs.low_quantile, profile.pairs.high_quantile
        )
        scored = scores[scores[list(METRICS)].notna().all(axis=1)]
        frame = scored.merge(responses, on=["dialogue_id", "model"], validate="one_to_one")
        frame = frame.sort_values(["dialogue_id", "model"], ignore_index=True)
        scale = _scale(frame, profile)
        self._signals = _scaled(frame, scale)
        codes, models = pd.factorize(frame["model"], sort=True)
        self.models = list(models)
        self._model: Whole = codes.astype(np.int64)
        self._dialogue: Whole = pd.factorize(frame["dialogue_id"], sort=True)[0].astype(np.int64)
        self._keys = frame[["dialogue_id", "model"]]
        texts = _texts(frame, profile)
        prompts = prompt_table(dialogues, profile)["dialogue_id"]
        usable = texts.notna() & frame["response"].notna() & frame["split"].eq("train")
        self.candidates = _candidates(self._dialogue, texts, (usable & frame["dialogue_id"].isin(prompts)).to_numpy())
        length = FEATURES["length"]
        self._length = np.array([float(length(text, "")) if text is not None else np.nan for text in texts])
        self._own_kept = self._pairs(self.quality(self.own.weights), self.own)[2]

    def quality(self, weights: Mapping[str, float]) -> Floats:
        """Return the quality of every scored response, by dialogue and model.

        Raises:
            PersodpoError: All the weight is on a coherence column that the profile leaves out.
        """
        scoring = self._scoring.model_copy(update={"weights": Weights(**weights)})
        effective = effective_weights(scoring)
        quality = np.zeros(len(self._model))
        for signal in SIGNALS:  # in this order, the sum agrees with the package's to the last bit
            quality = quality + effective[signal] * self._signals[signal]
        return quality

    def at(self, setting: Setting) -> Outcome:
        """Rate and pair all responses under a setting.

        Raises:
            PersodpoError: As `quality`, or a quantile is out of 0..1, or the low one is above the high one.
        """
        if not 0.0 <= setting.low <= setting.high <= 1.0:
            raise PersodpoError(
                f"Quantiles must rise within 0 and 1, they are {setting.low} and {setting.high}; choose others."
            )
        quality = self.quality(setting.weights)
        low, high, kept = self._pairs(quality, setting)
        chosen, rejected = self.candidates[:, kept]
        count = len(self.models)
        cells = self._model[chosen] * count + self._model[rejected]
        sources = np.bincount(cells, minlength=count**2).reshape(count, count)
        both, either = (kept & self._own_kept).sum(), (kept | self._own_kept).sum()
        return Outcome(
            quality,
            low,
            high,
            kept,
            sources,
            np.bincount(self._model, quality) / np.bincount(self._model),
            len(np.unique(self._dialogue[chosen])),
            float(1.0 - both / either) if either else 0.0,
            label_accuracy(self._length[chosen], self._length[rejected], self._dialogue[chosen], self._seed),
        )

    def keys(self, outcome: Outcome) -> set[tuple[str, str, str]]:
        """Return dialogue, chosen model and rejected model of each pair."""
        chosen, rejected = (self._keys.iloc[side] for side in self.candidates[:, outcome.kept])
        return set(zip(chosen["dialogue_id"], chosen["model"], rejected["model"], strict=True))

    def _pairs(self, quality: Floats, setting: Setting) -> tuple[float, float, Bools]:
        """Return both thresholds and which candidates are pairs."""
        low, high = _quantiles(quality, setting)
        chosen, rejected = quality[self.candidates]
        return low, high, (chosen >= high) & (rejected <= low) & (chosen > rejected)


def _scale(frame: pd.DataFrame, profile: Profile) -> Scale:
    connection = connect(profile.engine, "")
    try:
        connection.register("pool", frame[[*METRICS, "words"]])
        return measure_scale(connection, "pool", profile.scoring)
    finally:
        connection.close()


def _scaled(frame: pd.DataFrame, scale: Scale) -> dict[str, Floats]:
    """Return each signal as it enters the sum; compliance knows no weights, so the table's own is right."""
    low, high = scale.low.model_dump(), scale.high.model_dump()
    signals = {"compliance": frame["compliance"].to_numpy(dtype=float)}
    for metric in METRICS:
        width = high[metric] - low[metric]
        values = frame[metric].to_numpy(dtype=float)
        signals[metric] = (values - low[metric]) / width if width else np.zeros(len(values))
    return signals


def _texts(frame: pd.DataFrame, profile: Profile) -> pd.Series[str]:
    """Return a side's text as perso pairs hold it, None where there is none."""
    if profile.pairs.serialisation == "corrected":
        return frame["completion"].astype(object)
    texts = [
        None if response is None else json.dumps({"response": response}, ensure_ascii=False)
        for response in frame["response"]
    ]
    return pd.Series(texts, index=frame.index, dtype=object)


def _candidates(dialogue: Whole, texts: pd.Series[str], usable: Bools) -> Whole:
    """Return every two rows of a dialogue with unlike texts, in the order of the package's pairs."""
    rows = pd.DataFrame({"dialogue": dialogue, "row": np.arange(len(dialogue)), "text": texts})[usable]
    both = rows.merge(rows, on="dialogue", suffixes=("_chosen", "_rejected"))
    both = both[both["text_chosen"] != both["text_rejected"]].sort_values(["row_chosen", "row_rejected"])
    return both[["row_chosen", "row_rejected"]].to_numpy(dtype=np.int64).T.copy()


def _quantiles(quality: Floats, setting: Setting) -> tuple[float, float]:
    """Return exact quantiles, interpolated from the same two order statistics as `persodpo.scoring.quality.thresholds`."""
    last = len(quality) - 1
    positions = [setting.low * last, setting.high * last]
    ranks = sorted(
        {min(rank, last) for position in positions for rank in (math.floor(position), math.floor(position) + 1)}
    )
    ordered = np.partition(quality, ranks)
    low, high = (
        float(np.quantile([ordered[math.floor(at)], ordered[min(math.floor(at) + 1, last)]], at - math.floor(at)))
        for at in positions
    )
    return low, high
