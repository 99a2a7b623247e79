"""Provenance files in, one table out: what each table of a run was made by, and when."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from persodpo.artifacts import RunFolder, provenance_path
from persodpo.evaluation.cells import TextTable
from persodpo.report.contents import cell

_CAPTION = (
    "Where each table comes from. Written: the date of its provenance file. Settings: the first digits of the profile's "
    "sha256. Versions: see the notes."
)
_COLUMNS = ("Table", "Rows", "Stage", "Written (UTC)", "Seconds", "Commit", "Settings", "Versions", "sha256")


def provenance_table(run: RunFolder, names: Sequence[str]) -> TextTable:
    """Print the provenance of tables.

    Args:
        run: The run folder.
        names: Its tables.

    Raises:
        PersodpoError: A table was edited or its stage was interrupted.
    """
    notes: list[str] = []
    rows = []
    for name in names:
        file = provenance_path(run.checked_path(name))
        content = run.provenance(name)
        versions = ", ".join(f"{package} {version}" for package, version in content.get("versions", {}).items())
        if versions not in notes:
            notes.append(versions)
        written = datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S")
        rows.append((
            name, cell(content.get("rows")), cell(content.get("stage")), written, cell(content.get("seconds")),
            _commit(content.get("commit")), cell(content.get("profile_sha256"))[:12],
            f"({notes.index(versions) + 1})", cell(content.get("sha256")),
        ))  # fmt: skip
    lines = tuple(f"({place}) {versions or 'no versions recorded'}" for place, versions in enumerate(notes, start=1))
    return TextTable(_CAPTION, _COLUMNS, tuple(rows), lines)


def _commit(commit: str | None) -> str:
    """Shorten a commit, and say if the working tree differed."""
    if not commit:
        return "–"
    name, _, dirty = commit.partition("-")
    return f"{name[:12]}, changed" if dirty else name[:12]
