"""Responses and dialogues in, the four metric values of every readable response out, computed with the profile's scorers.

Nothing that loads a model is imported before a scorer is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from persodpo.config import Compute, Profile
from persodpo.corrections import Correction
from persodpo.errors import PersodpoError
from persodpo.method import METRICS
from persodpo.scoring.cache import ScoreCache
from persodpo.scoring.engine import LOCAL, Asked, Backend, Tally, score_items
from persodpo.scoring.scorers import Item, Scorer, Way

SMALL = "small"


def make_scorer(name: str, profile: Profile, small: Mapping[str, str]) -> Scorer:
    """Make one scorer; its model is loaded on first use.

    Args:
        name: One of the four metrics.
        profile: Models, their settings and corrections.
        small: Metric -> folder or file of the small model, for those that the settings call ``small``.

    Returns:
        The scorer.
    """
    settings = profile.scoring.compute
    model = getattr(settings.models, name)
    model = small[name] if model == SMALL else model
    if name == "persona_distance":
        from persodpo.scoring.persona_distance import persona_distance  # noqa: PLC0415 - scipy

        return persona_distance(model, _way(profile, "A10c"))
    from persodpo.scoring.checkpoints import Checkpoint  # noqa: PLC0415

    if name == "coherence":
        from persodpo.scoring.coherence import CoherenceScorer  # noqa: PLC0415

        return CoherenceScorer(Checkpoint(model), batch_tokens=settings.batch_tokens)
    from persodpo.scoring.nli import CScorer, UEScorer  # noqa: PLC0415
    from persodpo.scoring.nli_model import NliModel  # noqa: PLC0415

    is_c = name == "c_score"
    classifier = NliModel(
        Checkpoint(model), labels=settings.labels.get("c_score" if is_c else "ue_score"),
        max_length=settings.nli_tokens, batch_tokens=settings.batch_tokens,
    )  # fmt: skip
    return (CScorer if is_c else UEScorer)(classifier, _way(profile, "A10b"))


def _way(profile: Profile, correction: Correction) -> Way:
    return "corrected" if profile.corrects(correction) else "as_released"


def small_models(settings: Compute) -> tuple[str, ...]:
    """Return the metrics whose model is to be made on the spot."""
    return tuple(metric for metric in METRICS if getattr(settings.models, metric) == SMALL)


def model_files(settings: Compute, small: Mapping[str, str]) -> dict[str, Path]:
    """Return the files of all models that lie on this machine's disk, by a name that does not depend on the machine."""
    found: dict[str, Path] = {}
    for metric in METRICS:
        path = Path(small.get(metric, getattr(settings.models, metric)))
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
        found |= {f"scorers/{metric}/{file.name}": file for file in files}
    return found


class Readable:
    """The readable responses of a table as what is asked of scorers, one at a time."""

    def __init__(self, responses: pd.DataFrame, dialogues: pd.DataFrame) -> None:
        """Take a responses table and the dialogues it answers.

        Raises:
            PersodpoError: A response answers a dialogue that is not there.
        """
        there = responses["outcome"].eq("ok") & responses["response"].notna()
        self.table = responses.loc[there, ["dialogue_id", "model", "response"]].reset_index(drop=True)
        self.null = int(responses["response"].isna().sum())
        self.failed = int((~there).sum())
        self._dialogues = dialogues.set_index("dialogue_id")[["personas", "context", "reference"]]
        unknown = set(self.table["dialogue_id"]) - set(self._dialogues.index)
        if unknown:
            raise PersodpoError(
                f"Response to dialogue {min(unknown)}: there is no such dialogue; make both tables again with "
                "`persodpo generate`."
            )

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.table)

    def __iter__(self) -> Iterator[Asked]:
        """Yield them in the order of the table."""
        rows = self._dialogues.to_dict("index")
        for dialogue, model, response in self.table.itertuples(index=False):
            row = rows[dialogue]
            item = Item(tuple(row["personas"]), row["context"] or "", row["reference"] or "", response)
            yield Asked(f"dialogue {dialogue}, model {model}", item)


def computed_metrics(
    responses: pd.DataFrame,
    dialogues: pd.DataFrame,
    scorers: Sequence[Scorer],
    cache: ScoreCache,
    *,
    backend: Backend = LOCAL,
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame, list[Tally]]:
    """Score the readable responses of a table.

    A response that could not be read has no text to score; what it is given instead is decided by
    `persodpo.pairs.impute`.

    Args:
        responses: Responses table.
        dialogues: Dialogues table.
        scorers: One for each metric.
        cache: Where scores are found and kept.
        backend: What scores batches.
        progress: Show progress bars, on a terminal.

    Returns:
        Metrics as `persodpo.release.published.published_metrics` gives them; what there is to report, columns scorer,
        quantity and value; and each scorer's tally.

    Raises:
        PersodpoError: A response has no dialogue, or as `persodpo.scoring.engine.score_items`.
    """
    readable = Readable(responses, dialogues)
    metrics, tallies = readable.table.rename(columns={"response": "parsed"}), []
    for scorer in scorers:
        metrics[scorer.name], tally = score_items(scorer, readable, cache, backend=backend, progress=progress)
        tallies.append(tally)
    return metrics, _report(readable, tallies), tallies


def _report(readable: Readable, tallies: Sequence[Tally]) -> pd.DataFrame:
    """Return what does not depend on what was in the cache."""
    rows = [
        (tally.scorer, quantity, float(value))
        for tally in tallies
        for quantity, value in {
            "responses": tally.responses, "not_read": readable.failed, "without_text": readable.null,
            "empty_personas": tally.empty_personas, "distinct_texts": tally.distinct, "truncated": tally.truncated,
            **tally.notes,
        }.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["scorer", "quantity", "value"])
