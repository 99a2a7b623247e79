"""Published completions in, responses table out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from persodpo.completions import read_completion
from persodpo.errors import PersodpoError
from persodpo.release.published import PublishedSet, read_set
from persodpo.settings import Completions


def published_responses(
    files: dict[str, Path], sets: Iterable[PublishedSet], dialogues: pd.DataFrame, settings: Completions
) -> pd.DataFrame:
    """Read published completions.

    Args:
        files: Manifest path -> local file.
        sets: Which published sets.
        dialogues: Dialogues table; a set answers its split's dialogues in their order.
        settings: How completions are read.

    Returns:
        A responses table, a dialogue's answers side by side. Where no completion was published, the published response
        stands alone and a failure's outcome is ``unknown``.

    Raises:
        PersodpoError: A set has another number of rows than its split.
    """
    frames = []
    for which in sets:
        frame = read_set(files, which)
        ids = dialogues.loc[dialogues["split"] == which.split, "dialogue_id"].to_numpy()
        if len(ids) != len(frame):
            raise PersodpoError(
                f"{which.label} has {len(frame)} responses for {len(ids)} {which.split} dialogues; fetch both again."
            )
        if which.raw:
            frame = read_completions(frame, settings)
        else:
            outcome = frame["parsed"].map(lambda text: "ok" if text else "unknown")
            frame = frame.assign(response=frame["parsed"], outcome=outcome)
        # The authors asked one prompt at a time; on what machine is not published.
        known = {"split": which.split, "model": which.model, "finish_reason": None, "batch_size": 1, "hardware": None}
        frames.append(frame.assign(dialogue_id=ids, **known))
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values("dialogue_id", kind="stable", ignore_index=True)


def read_completions(frame: pd.DataFrame, settings: Completions) -> pd.DataFrame:
    """Return ``frame`` with response and outcome as read from its completion column."""
    readings = [read_completion(text, settings.reading) for text in frame["completion"]]
    response = pd.Series([reading.response for reading in readings], index=frame.index, dtype=object)
    return frame.assign(response=response, outcome=[reading.outcome for reading in readings])
