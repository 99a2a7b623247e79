"""Run folders and provenance files: the only module that knows where tables lie (`persodpo.tables` knows their columns).

Every table is a Parquet file in ``runs/<profile>/`` with a provenance file ``<file>.json`` beside it: the sha256 of its
inputs and of itself, the settings it was made with, versions, commit, rows and seconds. A table is written to a temporary
name and renamed; its provenance file comes last, so a table without a matching one was interrupted or edited, and is
refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from persodpo.config import Profile, profile_names
from persodpo.errors import PersodpoError
from persodpo.files import (
    PROJECT,
    as_json,
    disk_errors,
    git_commit,
    make_folder,
    read_json,
    scratch_in,
    sha256,
    versions,
    write_json,
    write_text,
)
from persodpo.imports import code_of
from persodpo.tables import check_table, schema_of, with_none, write_table

#: The command that makes each table, for messages.
MAKER = {
    "dialogues": "dialogues", "responses": "generate", "answers": "generate", "scores": "score", "thresholds": "score",
    "extras": "score", "scorers": "score", "probes": "score", "pairs": "pairs", "training": "train",
    "evaluation": "evaluate", "ablations": "ablate", "audit": "audit",
}  # fmt: skip
Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class StageReport:
    """What a stage did: the rows of each table it made, and whether nothing had changed so that nothing was done.

    Of its notes, further lines to show, only those that are warnings hold where it was skipped.
    """

    stage: str
    skipped: bool
    rows: Mapping[str, int]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes that are warnings."""
        return tuple(note for note in self.notes if note.startswith("warning"))

    def __str__(self) -> str:
        """Return a line for logs and notebooks, and one for each note."""
        tables = [", ".join(f"{name} ({count:,} rows)" for name, count in self.rows.items())] if self.rows else []
        done = "unchanged, skipped" if self.skipped else f"written in {self.seconds:.1f} s"
        lines = self.warnings if self.skipped else self.notes
        return "\n  ".join([f"{self.stage}: {' - '.join([*tables, done])}", *lines])


class RunFolder:
    """The folder ``runs/<profile>/`` of one profile.

    Attributes:
        profile: The profile whose tables lie here.
        root: The folder; it is created when a stage writes.
        files: What was read and made through this object.
        read_as: The sha256 of each file that a stage read, as it was then.
        asked: Models whose stored answers were read through it.
    """

    def __init__(self, profile: Profile) -> None:
        """Name the run folder of ``profile``."""
        self.profile = profile
        self.root = PROJECT / profile.home / "runs" / profile.name
        self.files: set[Path] = set()
        self.read_as: dict[Path, str] = {}
        self.asked: set[str] = set()

    @property
    def release(self) -> Path:
        """Folder of the published files."""
        return PROJECT / self.profile.home / "data" / "release"

    @property
    def figures(self) -> Path:
        """Folder of this profile's figures."""
        return PROJECT / self.profile.home / "figures" / self.profile.name

    @property
    def answers(self) -> Path:
        """The store of all that models were asked in this run."""
        return self.root / "answers.sqlite"

    @property
    def notebooks(self) -> Path:
        """Folder of the executed notebooks."""
        return self.root / "notebooks"

    def command(self, stage: str) -> str:
        """Return the command that runs a stage of this run, for messages."""
        own = self.profile.name not in profile_names() and (self.root / "profile.yaml").is_file()
        return f"`persodpo {stage} --profile {self.root / 'profile.yaml' if own else self.profile.name}`"

    def path(self, name: str) -> Path:
        """Return the file of table ``name``."""
        return self.root / f"{name}.parquet"

    def checked_path(self, name: str) -> Path:
        """Return the file of table ``name`` after checking its hash and its schema.

        Raises:
            PersodpoError: The table is missing, was changed after it was written, or breaks its schema.
        """
        path = self.path(name)
        command = self.command(MAKER[name.split("/", maxsplit=1)[0]])
        if not path.is_file():
            raise PersodpoError(f"Table {name} is missing ({path}); make it with {command}.")
        check_table(path, name)
        if not self._intact(name):
            raise PersodpoError(
                f"Table {name} does not match its provenance file ({path}): it was edited or its stage was "
                f"interrupted; make it again with {command}."
            )
        return path

    def read(self, name: str) -> pd.DataFrame:
        """Read table ``name``; missing text is None. Errors as `checked_path`."""
        return with_none(pq.read_table(self.checked_path(name), columns=schema_of(name).names).to_pandas())

    def forget(self, name: str) -> None:
        """Remove a table of another profile, so that nothing takes it for one of this profile's."""
        for path in (provenance_path(self.path(name)), self.path(name)):
            path.unlink(missing_ok=True)

    def provenance(self, name: str) -> dict[str, Any]:
        """Return the provenance of table ``name``, empty if there is none."""
        return read_json(provenance_path(self.path(name)))

    def _intact(self, name: str) -> dict[str, Any]:
        """Return the provenance of table ``name``, empty if the table is not as it was written."""
        path, provenance = self.path(name), self.provenance(name)
        own = provenance.get("table") == name and path.is_file()
        return provenance if own and provenance.get("sha256") == sha256(path) else {}

    def stage(
        self,
        name: str,
        build: Callable[[], Tables],
        *,
        outputs: Sequence[str],
        reads: Sequence[str] = (),
        files: Mapping[str, Path] | None = None,
        settings: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> StageReport:
        """Make tables, unless their inputs, settings and code are those that they were made with.

        Args:
            name: The stage's name, for messages.
            build: Returns the tables. The source of its module, and of all which that imports, is the code that counts.
            outputs: Names of these tables.
            reads: Tables of this run that it reads.
            files: Other files that it reads, by a name that does not depend on the machine.
            settings: JSON-like settings it depends on.
            overwrite: Run even if nothing changed.

        Raises:
            PersodpoError: An input is missing, an output breaks its schema, or the disk fails. Outputs of earlier runs
                stay as they were.
        """
        inputs = {table: self.path(table) for table in reads} | dict(files or {})
        for path in inputs.values():
            if not path.is_file():
                raise PersodpoError(f"Stage {name} needs {path}, which does not exist.")
        paths = [path for output in outputs for path in (self.path(output), provenance_path(self.path(output)))]
        self.files |= {*inputs.values(), *paths}
        digests = {key: sha256(path) for key, path in sorted(inputs.items())}
        self.read_as |= {inputs[key]: digest for key, digest in digests.items()}
        basis = as_json({"inputs": digests, "settings": settings or {}, "code": code_of(build.__module__)})
        rows = None if overwrite else self._unchanged(outputs, basis)
        report = self._make(name, build, outputs, basis) if rows is None else StageReport(name, True, rows, 0.0)
        self.write_settings()
        return report

    def write_settings(self) -> None:
        """Write the profile into the run folder, where it differs from the one that lies there."""
        write_text(self.root / "profile.yaml", self.profile.to_yaml())

    def _make(
        self, stage: str, build: Callable[[], Tables], outputs: Sequence[str], basis: Mapping[str, Any]
    ) -> StageReport:
        """Make tables and move them to their places, all checked before the first."""
        started = time.perf_counter()
        with disk_errors(self.root), scratch_in(self.root) as scratch:
            tables, paths = build(), {output: scratch / f"{output.replace('/', '-')}.parquet" for output in outputs}
            for output, path in paths.items():
                write_table(path, output, tables[output])
            rows = {output: check_table(path, output) for output, path in paths.items()}
            seconds = time.perf_counter() - started
            for output, path in paths.items():
                provenance = {
                    "table": output, "stage": stage, "rows": rows[output], "sha256": sha256(path),
                    "seconds": round(seconds, 3), **basis, "profile": self.profile.name,
                    "profile_sha256": self.profile.digest(), "versions": versions(), "commit": git_commit(),
                }  # fmt: skip
                make_folder(self.path(output).parent)
                path.replace(self.path(output))
                write_json(provenance_path(self.path(output)), provenance)
        return StageReport(stage, False, rows, seconds)

    def _unchanged(self, outputs: Sequence[str], basis: Mapping[str, Any]) -> dict[str, int] | None:
        """Return the rows of ``outputs`` if all were made from ``basis`` and are still as they were written."""
        records = {output: self._intact(output) for output in outputs}
        if not all(basis.items() <= record.items() for record in records.values()):
            return None
        return {output: int(record["rows"]) for output, record in records.items()}

    @contextmanager
    def locked(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Keep other processes out of this run folder; within a process it can be entered again."""
        make_folder(self.root)
        with disk_errors(self.root):
            lock = FileLock(self.root / ".lock", is_singleton=True, thread_local=False)
            try:
                lock.acquire(timeout=wait_seconds)
            except Timeout as error:
                raise PersodpoError(
                    f"Another process works in {self.root}; wait for it, or give this run a folder of its own with "
                    "--set name=another."
                ) from error
            try:
                yield
            finally:
                lock.release()


def provenance_path(path: Path) -> Path:
    """Return the provenance file of ``path``."""
    return path.with_name(f"{path.name}.json")
