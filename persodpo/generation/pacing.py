"""When the next request may be sent: requests and tokens a minute, and pauses that the server asked for."""

from __future__ import annotations

from persodpo.generation.requests import Limits


class Pace:
    """Spaces requests evenly, because servers hold their limits over seconds as well as over minutes.

    In any 60 seconds no more than ``requests_per_minute`` requests are given a time, and no more than
    ``tokens_per_minute`` tokens beside those of the last request. Times are seconds on one clock of the caller's choice.
    """

    def __init__(self, limits: Limits) -> None:
        """Start without a history: the first request may go at once."""
        self._request_seconds = 60 / limits.requests_per_minute if limits.requests_per_minute else 0.0
        self._token_seconds = 60 / limits.tokens_per_minute if limits.tokens_per_minute else 0.0
        self._free_at = float("-inf")
        self.paused_until = float("-inf")

    def slot(self, tokens: int, now: float) -> float:
        """Return the time at which a request of this many tokens may be sent, and keep that time for it."""
        at = max(now, self._free_at, self.paused_until)
        self._free_at = at + max(self._request_seconds, tokens * self._token_seconds)
        return at

    def pause(self, until: float) -> None:
        """Let no request be sent before ``until``, those included that were given a time already."""
        self.paused_until = max(self.paused_until, until)
