"""The one exception that users meet: a sentence that names the input and the remedy."""

from __future__ import annotations


class PersodpoError(Exception):
    """Something the user can mend; its message is one sentence that says what and how."""


class NothingToShowError(PersodpoError):
    """A figure's table is there, and nothing in it can be drawn."""
