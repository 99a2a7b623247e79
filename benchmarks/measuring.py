"""What the benchmarks share: the machine, processes of their own, tables in Markdown, and the files of a result."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from persodpo.files import PROJECT, git_commit, versions, write_json

RESULTS = PROJECT / "benchmarks" / "results"


def machine(**more: Any) -> dict[str, Any]:
    """Describe this machine, the versions and the commit, and what else a result depends on."""
    cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), **more, **versions(), "commit": git_commit()}


def pipes(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def save(name: str, content: Mapping[str, Any], text: str, output: Path = RESULTS) -> None:
    """Write a result as JSON and Markdown, and show it."""
    write_json(output / f"{name}.json", content)
    (output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def start(script: str, **options: Any) -> subprocess.Popen[str]:
    """Start a script in a process of its own."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, script, *words], stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a process told by `tell`, once it has ended."""
    shown, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} ended with status {process.returncode}")
    told: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return told


def tell(measured: Mapping[str, Any]) -> None:
    """Print figures for `answer`, with the most memory that this process ever held, GiB."""
    print(json.dumps({**measured, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def most_memory(process: subprocess.Popen[Any]) -> float:
    """Wait for a process; return the most that it and all below it held at one time, GiB, looked at once a second.

    Shared pages count once (Linux's proportional set size).
    """
    most, own = 0, psutil.Process(process.pid)
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
            return most / 2**30
        held = 0
        for one in [own, *own.children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended meanwhile
                held += one.memory_full_info().pss
        most = max(most, held)
