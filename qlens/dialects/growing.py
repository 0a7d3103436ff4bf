"""Rewrites a text that is still growing: what can pass is what no later piece can change."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrs import define, field

from qlens.errors import CallError

Rewrite = Callable[[str], str]

_LOOKS = 2
"""How far a pattern may look around its match: `\\b` looks at one character on either side."""


@define(eq=False)
class Growing:
    """A text that comes in pieces and is rewritten by `fn` as if it had come whole.

    `longest` is the length of the longest match of `fn`; 0 means that it looks at each character alone.
    `fn` may raise a CallError to refuse the text, and must have no effects: it sees the same pieces many times.
    """

    fn: Rewrite
    longest: int
    held: str = ""
    """What has come and not passed."""
    changed: bool = field(default=False, init=False)
    """Whether something of it was rewritten."""
    _retry_at: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """How many characters are held."""
        return len(self.held)

    def grow(self, piece: str) -> str:
        """Take a piece; return what can pass now, rewritten. Raises what `fn` raises."""
        self.held += piece
        cut, passing = self._cut()
        self.changed = self.changed or passing != self.held[:cut]
        self.held = self.held[cut:]
        return passing

    def end(self) -> str:
        """Return the rest, rewritten."""
        rest, self.held = self.held, ""
        passing = self.fn(rest) if rest else ""
        self.changed = self.changed or passing != rest
        return passing

    def _cut(self) -> tuple[int, str]:
        """How much can pass, and as what.

        A match that starts before the edge is there to its end, with all that the pattern looks at. So the text up to
        a cut before the edge is settled if no match goes through the cut, and cutting there makes no new one.
        """
        text = self.held
        if not self.longest:
            return len(text), self.fn(text)
        reach = self.longest + _LOOKS
        edge, lowest = len(text) - reach, max(0, len(text) - 3 * reach)
        if edge <= 0 or len(text) < self._retry_at:
            return 0, ""
        whole = self._try(text)
        if whole is None:
            self._refuse(edge)
            return 0, ""
        changed = whole != text
        # Two wrong pieces can make up the right text by chance, but hardly at every length.
        lengths = range(len(text), edge, -1) if changed else (len(text),)
        wholes = {length: rewritten for length in lengths if (rewritten := self._try(text[:length])) is not None}
        for cut in range(edge, lowest, -1):
            passing = self._try(text[:cut])
            if passing is None or (changed and not self._stands_alone(cut, passing)):
                continue
            if self._is_good(cut, passing, wholes):
                self._retry_at = 0
                return cut, passing
        if lowest:
            # A text without a good place is rare: looking again after every piece would take quadratic time.
            self._retry_at = 2 * len(text)
        return 0, ""

    def _refuse(self, edge: int) -> None:
        """Refuse a text for good: what is refused at its end may be harmless once it goes on (bomb, bombastic)."""
        if self._try(self.held[edge:]) is not None:
            self.fn(self.held)

    def _stands_alone(self, cut: int, passing: str) -> bool:
        """Tell whether the character before a cut is rewritten by itself, so that no match goes through the cut.

        Without this a cut in a row of matches that leave nothing behind would look good, and move all later matches.
        """
        before, alone = self._try(self.held[: cut - 1]), self._try(self.held[cut - 1 : cut])
        return before is not None and bool(alone) and passing == f"{before}{alone}"

    def _is_good(self, cut: int, passing: str, wholes: Mapping[int, str]) -> bool:
        """Tell whether the two sides of a cut become what the whole becomes, wherever the text ends."""
        for length, whole in wholes.items():
            rest = self._try(self.held[cut:length])
            if rest is None or passing + rest != whole:
                return False
        return True

    def _try(self, text: str) -> str | None:
        """The text rewritten; None when it is refused."""
        try:
            return self.fn(text)
        except CallError:
            return None
