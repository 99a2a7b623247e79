"""Companion to PersoDPO: persona-grounded preference pairs without annotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persodpo.run import Run

__all__ = ["Run"]


def __getattr__(name: str) -> Any:
    """Load `Run` when it is asked for: pandas and pyarrow take a second that ``persodpo --help`` need not wait."""
    if name == "Run":
        from persodpo.run import Run  # noqa: PLC0415

        return Run
    raise AttributeError(f"module 'persodpo' has no attribute '{name}'")
