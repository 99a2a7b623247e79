"""Money: a purse that is never overdrawn."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from persodpo.errors import PersodpoError


class BudgetReached(PersodpoError):  # noqa: N818 - reaching the budget is what it is for, no error of the run
    """The next request could pass the budget."""


@dataclass
class Purse:
    """What a run may spend. What is under way is reserved at its highest possible price, so that the budget holds.

    Attributes:
        budget: US dollars, over all runs that share a store; None for no limit.
        spent: US dollars spent so far.
    """

    budget: float | None = None
    spent: float = 0.0
    _reserved: dict[int, float] = field(default_factory=dict)
    _count: int = 0
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def reserve(self, usd: float) -> int:
        """Set money aside before it is spent, waiting while requests under way may still turn out cheaper.

        Args:
            usd: The highest possible price of the request.

        Returns:
            A number to settle the reservation with.

        Raises:
            BudgetReached: Nothing is under way and the price could still pass the budget.
        """
        while not self._fits(usd):
            if not self._reserved:
                raise BudgetReached(
                    f"The budget of ${self.budget:,} is used up: ${self.spent:,.4f} are spent and the next request may "
                    f"cost ${usd:,.4f}; raise generation.budget_usd to go on."
                )
            self._settled.clear()
            await self._settled.wait()
        self._count += 1
        self._reserved[self._count] = usd
        return self._count

    def settle(self, reservation: int, usd: float) -> None:
        """Replace a reservation by what was spent in the end, US dollars."""
        del self._reserved[reservation]
        self.spent += usd
        self._settled.set()

    def _fits(self, usd: float) -> bool:
        return self.budget is None or self.spent + sum(self._reserved.values()) + usd <= self.budget
