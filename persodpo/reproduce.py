"""Run the notebooks in order with papermill; executed copies go to the run folder.

papermill only warns of a misspelt parameter or a notebook without a parameters cell, and would then run with the
defaults; here both are errors, found before anything runs.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from persodpo.config import DEFAULT_PROFILE, load_profile
from persodpo.errors import PersodpoError
from persodpo.files import PROJECT, RELEASE_VARIABLE, make_folder
from persodpo.runfolder import RunFolder

NOTEBOOKS = PROJECT / "notebooks"


class Executed(NamedTuple):
    """A notebook that ran: its source, the executed copy, and the wall time with the kernel's start."""

    notebook: Path
    copy: Path
    seconds: float

    def __str__(self) -> str:
        """Return one line for logs."""
        return f"{self.notebook.name}: {self.seconds:.1f} s -> {self.copy}"


def notebook_files(folder: Path = NOTEBOOKS) -> list[Path]:
    """Return the numbered notebooks in the order in which they run, then `explore`, which shows what the others make."""
    return [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *folder.glob("explore.ipynb")]


def _literal(path: Path) -> str:
    """Return a path for papermill, which takes braces in it for parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that the notebook does not declare in its one cell tagged ``parameters``."""
    try:
        cells = papermill.iorw.load_notebook_node(str(notebook)).cells
        count = sum("parameters" in cell.metadata.get("tags", []) for cell in cells)
        names = sorted(papermill.inspect_notebook(_literal(notebook))) if count == 1 else []
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise PersodpoError(f"{notebook} cannot be read as a notebook: {error}.") from error
    if count != 1:
        raise PersodpoError(
            f"{notebook.name} has {count} cells tagged 'parameters'; tag exactly one, or papermill runs with defaults."
        )
    for unknown in sorted(set(parameters) - set(names)):
        raise PersodpoError(
            f"{notebook.name} has no parameter '{unknown}'; its parameters cell sets {', '.join(names)}."
        )


def run_notebook(notebook: Path, copy: Path, parameters: Mapping[str, Any], progress: bool = True) -> Executed:
    """Execute one notebook; its copy is written with all outputs, also when a cell fails.

    Raises:
        PersodpoError: A parameter is unknown, a cell failed (the message holds the cell and its error), or the kernel
            died.
    """
    check_parameters(notebook, parameters)
    make_folder(copy.parent)
    started = time.perf_counter()
    try:
        # Messages between notebook and kernel stay off the network, in files of this kernel that only this user can open.
        with TemporaryDirectory(prefix="persodpo-") as sockets:
            papermill.execute_notebook(
                _literal(notebook),
                _literal(copy),
                parameters=dict(parameters),
                kernel_name="python3",
                cwd=str(notebook.parent),
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
                progress_bar={"desc": notebook.name, "leave": False} if progress and sys.stderr.isatty() else False,
            )
    except PapermillExecutionError as error:
        source = "\n".join(f"    {line}" for line in str(error.source).splitlines())
        raise PersodpoError(
            f"{notebook.name} failed in cell [{error.exec_count}]:\n{source}\n{error.ename}: {error.evalue}\n"
            f"The executed copy with the whole traceback is {copy}."
        ) from error
    except DeadKernelError as error:
        raise PersodpoError(
            f"{notebook.name}: its kernel died, most often for lack of memory; what ran before is in {copy}."
        ) from error
    return Executed(notebook, copy, time.perf_counter() - started)


def reproduce(
    profile: str = DEFAULT_PROFILE,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    notebooks: Sequence[Path] | None = None,
) -> Iterator[Executed]:
    """Run notebooks, all unless some are named; their stages skip what has not changed. Where all would, two run at a time.

    Yields:
        Each notebook as it is done.

    Raises:
        PersodpoError: As `persodpo.config.load_profile`, `check_parameters` and `run_notebook`. The first failure stops
            the run; stages that were done stay done.
    """
    run = RunFolder(load_profile(profile, overrides))
    # Notebooks run in their own folder, where a relative path would point elsewhere.
    if Path(profile).is_file():
        profile = str(Path(profile).resolve())
    if os.environ.get(RELEASE_VARIABLE):
        os.environ[RELEASE_VARIABLE] = str(Path(os.environ[RELEASE_VARIABLE]).resolve())
    parameters = {"profile": profile, "overrides": list(overrides), "overwrite": overwrite}
    selected = list(notebooks) if notebooks is not None else notebook_files()
    if not selected:
        raise PersodpoError(f"There are no notebooks in {NOTEBOOKS}.")
    for notebook in selected:
        check_parameters(notebook, parameters)
    from persodpo import stages  # noqa: PLC0415 - slow to load, and not needed to run one notebook

    os.environ.setdefault("TQDM_DISABLE", "1")  # of the notebooks' kernels: nobody watches them
    executed = all((run.notebooks / notebook.name).is_file() for notebook in selected)
    execute = functools.partial(_execute, run.notebooks, parameters)
    if overwrite or len(selected) == 1 or not executed or not stages.nothing_to_do(run.profile):
        yield from map(execute, selected)
    else:
        # Fresh processes, for one that has talked to kernels cannot be forked; a thread each.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            yield from pool.imap(functools.partial(execute, progress=False), selected)


def _execute(folder: Path, parameters: Mapping[str, Any], notebook: Path, progress: bool = True) -> Executed:
    return run_notebook(notebook, folder / notebook.name, parameters, progress)
