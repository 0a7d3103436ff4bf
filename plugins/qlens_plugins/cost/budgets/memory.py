"""Budgets in the memory of one process, which a restart forgets."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field

from qlens_plugins.cost.budgets.store import Account, Ask, Increase, State, Told
from qlens_plugins.cost.budgets.windows import is_over


@define(eq=False)
class Part:
    """What one process has spent and holds."""

    spent: int = 0
    held: int = 0
    excess: int = 0


@define(eq=False)
class Sheet:
    """One budget in one window."""

    account: Account
    window: int
    limit: int
    charged: int = 0
    """By processes that are gone."""
    parts: dict[tuple[str, int], Part] = field(factory=dict)

    @property
    def spent(self) -> int:
        return self.charged + sum(part.spent for part in self.parts.values())

    @property
    def held(self) -> int:
        return sum(part.held for part in self.parts.values())

    @property
    def excess(self) -> int:
        return sum(part.excess for part in self.parts.values())


@define(eq=False)
class MemoryStore:
    """Implements `Store`; the model of what every other store does."""

    sheets: dict[tuple[str, int], Sheet] = field(factory=dict)
    alive: dict[str, float] = field(factory=dict)
    """Until when each process is believed to live."""
    increases: list[Increase] = field(factory=list)

    async def sync(self, process: str, asks: Sequence[Ask], now: float, crash_seconds: float) -> list[Told]:
        """Implements `Store`."""
        self.reap(now)
        if process not in self.alive and any(ask.is_known for ask in asks):
            return [Told(given_up=True)] * len(asks)
        self.alive[process] = now + crash_seconds
        return [self._answer(process, ask, now) for ask in asks]

    def _answer(self, process: str, ask: Ask, now: float) -> Told:
        key = (ask.account.id, ask.window)
        sheet = self.sheets.get(key)
        if sheet is None:
            sheet = self.sheets[key] = Sheet(ask.account, ask.window, ask.limit)
            self._forget(ask)
        part = sheet.parts.setdefault((process, ask.part), Part())
        sheet.limit = ask.limit
        part.spent, part.held, part.excess = ask.spent, ask.held, ask.excess
        raised = [each for each in self.increases if each.account == ask.account.id and each.expires_at > now]
        limit = ask.limit + sum(each.picos for each in raised)
        others = [each for id_ in ask.beside if (each := self.sheets.get((id_, ask.window))) is not None]
        beside, held = sum(each.spent for each in others), sum(each.held for each in others)
        free = limit - sheet.spent - sheet.held - beside - held
        slack = ask.tolerance - sheet.excess - sum(each.excess for each in others)
        granted = []
        for need in ask.needs:
            fits = need.likely <= free and need.excess <= slack
            if fits:
                free, slack = free - need.likely, slack - need.excess
                part.held, part.excess = part.held + need.likely, part.excess + need.excess
            granted.append(fits)
        spare = max(0, min(ask.spare, free - limit // 5)) if all(granted) else 0
        part.held += spare
        until = min((each.expires_at for each in raised), default=2**53)
        return Told(granted, spare, sheet.spent, sheet.held + held, limit, until, beside=beside)

    def _forget(self, ask: Ask) -> None:
        """Drop windows that are long over, so that memory does not grow with time."""
        older = sorted(window for id_, window in self.sheets if id_ == ask.account.id and window < ask.window)
        for window in older[:-1]:
            if not self.sheets[ask.account.id, window].held:
                del self.sheets[ask.account.id, window]

    async def sweep(self, process: str, after: str, now: float) -> str:
        """Implements `Store`."""
        self.increases = [each for each in self.increases if each.expires_at > now]
        for key, sheet in list(self.sheets.items()):
            is_raised = any(each.account == key[0] for each in self.increases)
            if is_over(sheet.account.period, sheet.window, now) and not (sheet.held or sheet.excess or is_raised):
                del self.sheets[key]
        return ""

    def reap(self, now: float) -> None:
        """Charge what processes held that show no sign of life."""
        for process in [process for process, until in self.alive.items() if until <= now]:
            self._charge(process)

    def _charge(self, process: str) -> None:
        self.alive.pop(process, None)
        for sheet in self.sheets.values():
            for key in [key for key in sheet.parts if key[0] == process]:
                part = sheet.parts.pop(key)
                sheet.charged += part.spent + part.held + part.excess

    async def renew(self, process: str, now: float, crash_seconds: float) -> bool:
        """Implements `Store`."""
        self.reap(now)
        if process not in self.alive:
            return False
        self.alive[process] = now + crash_seconds
        return True

    async def leave(self, process: str) -> None:
        """Implements `Store`."""
        self._charge(process)

    async def states(self, now: int, account: str | None = None) -> list[State]:
        """Implements `Store`."""
        latest: dict[str, Sheet] = {}
        for (id_, window), sheet in self.sheets.items():
            if account in (None, id_) and (id_ not in latest or latest[id_].window < window):
                latest[id_] = sheet
        return [
            State(
                *(sheet.account, sheet.window, sheet.limit, sheet.spent, sheet.held),
                tuple(each for each in self.increases if each.account == id_ and each.expires_at > now),
            )
            for id_, sheet in sorted(latest.items())
        ]

    async def increase(self, increase: Increase) -> None:
        """Implements `Store`."""
        if all(each.id != increase.id for each in self.increases):
            self.increases.append(increase)

    async def close(self) -> None:
        """Implements `Store`."""
