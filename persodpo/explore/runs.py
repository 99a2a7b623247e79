"""Which runs are on this machine, and how far is each?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

from persodpo.runfolder import RunFolder, provenance_path, read_json
from persodpo.show import text_table
from persodpo.training.arms import ARMS

#: Column of each table whose rows say how far a run is.
_TABLES = {
    "dialogues": "dialogues", "responses": "responses", "scores": "scores", "pairs/perso": "perso pairs",
    "evaluation/responses": "held-out responses", "audit/findings": "findings",
}  # fmt: skip


def runs_beside(run: RunFolder) -> Styler:
    """List the runs beside one, each with what it holds; only provenance files are read, nothing is checked.

    Args:
        run: Any run; it is listed whether it exists or not.

    Returns:
        A table: a row a run, with the rows of its tables, its trained arms and when a table was written last.
    """
    folders = {path.parent for path in run.root.parent.glob("*/profile.yaml")} | {run.root}
    rows = [_row(folder) for folder in sorted(folders)]
    return text_table(pd.DataFrame(rows).set_index("run"))


def _row(folder: Path) -> Mapping[str, str]:
    found = {name: read_json(provenance_path(folder / f"{name}.parquet")).get("rows") for name in _TABLES}
    arms = sorted(path.parent.name for path in folder.glob("training/*/log.parquet"))
    written = max((path.stat().st_mtime for path in folder.rglob("*.parquet")), default=None)
    return {
        "run": folder.name,
        **{label: "–" if found[name] is None else f"{found[name]:,}" for name, label in _TABLES.items()},
        "trained": _trained(arms),
        "last written": "–" if written is None else f"{datetime.fromtimestamp(written):%Y-%m-%d %H:%M}",
    }


def _trained(labels: Sequence[str]) -> str:
    """Name the arms, and count what else was trained."""
    arms = [label for label in labels if label in ARMS]
    again = [label for label in labels if "@" in label]
    others = len(labels) - len(arms) - len(again)
    more = [f"{len(again)} under other seeds"] * bool(again) + [f"{others} ablations"] * bool(others)
    return "; ".join([*([", ".join(arms)] if arms else []), *more]) or "–"
