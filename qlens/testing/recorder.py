"""An observe plugin that keeps every receipt, for tests."""

from __future__ import annotations

import asyncio

from attrs import define, field

from qlens import Call, Receipt, hookimpl


@define(eq=False)
class Recorder:
    """Keeps receipts in the order they settle."""

    config: None
    name: str
    receipts: list[Receipt] = field(factory=list, init=False)
    _news: asyncio.Condition = field(factory=asyncio.Condition, init=False)

    async def reached(self, count: int) -> None:
        """Wait until this many receipts settled."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.receipts) >= count)

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt) -> None:
        """Keep the receipt."""
        self.receipts.append(receipt)
        async with self._news:
            self._news.notify_all()

    @hookimpl
    def adopt(self, old: object) -> None:
        """Go on with the list of the instance before."""
        if isinstance(old, Recorder):
            self.receipts, self._news = old.receipts, old._news
