"""Compliance: how close a response is to the wanted length, and whether the completion is one JSON object.

Given as an SQL expression, so that the same formula serves ten responses and a hundred million.
"""

from __future__ import annotations

from persodpo.settings import Scoring


def count_words(text: str) -> int:
    """Count words as the released method does: what white space separates."""
    return len(text.split())


def compliance_sql(settings: Scoring, target_words: int) -> str:
    """Return compliance as an expression over the columns ``words`` and ``one_object``.

    ``max(0, 1 - ((words - L) / L)^2)``, where L is ``target_words``, plus the format bonus where the format check finds
    exactly one JSON object, rounded half to even to three decimals. With ``format_check: as_released`` the check reads
    text that was already taken out of its JSON, so the bonus never comes (audit A3).

    Args:
        settings: The bonus, and where it is looked for.
        target_words: L, at least 1.

    Returns:
        A SQL expression in [0, 1 + bonus].
    """
    closeness = f"greatest(0e0, 1e0 - pow((words - {target_words}) / {target_words}e0, 2))"
    if settings.format_check == "corrected":
        closeness += f" + CASE WHEN one_object THEN {settings.format_bonus!r}::DOUBLE ELSE 0e0 END"
    return f"round_even({closeness}, 3)"
