"""A command of this package beside the notebook's kernel: started, read, stopped."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence

from persodpo.runfolder import PROJECT

#: Lines of a command's output that are kept.
_KEPT = 200


class Command:
    """One run of the command ``persodpo``; it ends with the kernel at the latest.

    Attributes:
        arguments: What stands after ``persodpo``.
        lines: The last lines that it wrote.
        stopped: Whether it was interrupted from here.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it."""
        self.arguments = tuple(arguments)
        self.lines: deque[str] = deque(maxlen=_KEPT)
        self.stopped = False
        # A kernel's own plotting backend is of no use elsewhere.
        environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and arguments that no shell reads
            [sys.executable, "-m", "persodpo.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            cwd=PROJECT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        atexit.register(self.stop)

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs or has lines left to read."""
        return None if self._reader.is_alive() else self._process.wait()

    def stop(self) -> None:
        """Interrupt it as Ctrl-C does, and end it if that is asked a second time; what was done stays done."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM if self.stopped else signal.SIGINT)
            self.stopped = True

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.lines.append(line.rstrip("\n"))
        atexit.unregister(self.stop)
