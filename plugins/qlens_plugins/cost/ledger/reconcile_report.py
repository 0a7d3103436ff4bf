"""Shows how far the ledger and a bill are apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from attrs import frozen

from qlens_plugins.cost.columns import aligned, visible
from qlens_plugins.cost.ledger.past import Days
from qlens_plugins.cost.ledger.reconcile_compare import Comparison, Drift, Sums
from qlens_plugins.cost.ledger.reconcile_files import Bill
from qlens_plugins.cost.ledger.reconcile_places import Deployment

Values = dict[str, int | str | None]

_HEADS = ("CALLS", "UNPRICED", "LEDGER_USD", "BILL_USD", "LEDGER_TOKENS", "BILL_TOKENS", "DRIFT", "DRIFT_%")


@frozen
class Report:
    """What was compared, and what came of it."""

    found: Comparison
    bill: Bill
    days: Days
    providers: Sequence[str]
    threshold: Decimal
    """Percent."""
    by_tokens: bool

    @property
    def drifts(self) -> bool:
        """Whether all of it, or all days of one model or deployment, are further apart than they may be.

        Single days may: a call that begins before midnight may be billed after it.
        """
        parts = [sums for model in self.found.models for sums in self.found.places(model).values()]
        return any(map(self._drifts, (self.found.all, *map(self.found.total, self.found.models), *parts)))

    def _drifts(self, sums: Sums) -> bool:
        drift = self._drift(sums)
        return drift is None or drift.above(self.threshold)

    def _drift(self, sums: Sums) -> Drift | None:
        return sums.drift(by_tokens=self.by_tokens)

    def _values(self, sums: Sums) -> Values:
        drift = self._drift(sums)
        percent = None if drift is None else drift.percent
        return {
            "calls": sums.calls,
            "unpriced_calls": sums.unpriced,
            "ledger_usd": _text(sums.ledger_usd),
            "bill_usd": None if self.by_tokens else _text(sums.bill_usd),
            "ledger_tokens": sums.ledger_tokens,
            "bill_tokens": None if sums.bill_tokens is None else _text(sums.bill_tokens),
            "drift_tokens" if self.by_tokens else "drift_usd": None if drift is None else _text(drift.amount),
            "drift_percent": None if percent is None else _text(percent),
        }

    def as_json(self) -> str:
        """The report for machines; amounts as decimal text."""
        found = {
            "from": str(self.days.first),
            "to": str(self.days.last),
            "providers": list(self.providers),
            "by": "tokens" if self.by_tokens else "cost",
            "threshold_percent": _text(self.threshold),
            "drifts": self.drifts,
            "total": self._values(self.found.all),
            "models": [self._model(model) for model in sorted(self.found.models)],
            "days": [
                {"day": str(day), "model": model, "deployments": self._named(model, place), **self._values(sums)}
                for model, days in sorted(self.found.models.items())
                for (day, place), sums in sorted(days.items(), key=lambda item: item[0])
            ],
            "unmatched": [
                {
                    "meter": meter.name,
                    "about": meter.about or None,
                    "resource": meter.resource or None,
                    "may_be": list(unmatched.candidates),
                    **self._billed(sums),
                }
                for (meter, unmatched), sums in self._unmatched()
            ],
            "ignored": self._billed(self.found.ignored),
            "other_charges_usd": {kind: _text(usd) for kind, usd in sorted(self.bill.other_charges.items())},
            "other_rows": self.bill.other_rows,
        }
        return json.dumps(found, indent=2) + "\n"

    def _model(self, model: str) -> dict[str, Any]:
        total = self.found.total(model)
        deployments = self._named(model, self.found.deployments.get(model, ()))
        places = self.found.places(model)
        apart = [
            {"deployments": self._named(model, place), "drifts": self._drifts(sums), **self._values(sums)}
            for place, sums in (sorted(places.items(), key=lambda item: item[0]) if len(places) > 1 else ())
        ]
        values = {"drifts": self._drifts(total), **self._values(total)}
        return {"model": model, "deployments": deployments, **values, "by_deployment": apart}

    def _named(self, model: str, deployments: Sequence[Deployment]) -> list[str]:
        """Those that have calls, or else all of them."""
        called = self.found.deployments.get(model, ())
        those = [deployment for deployment in deployments if deployment in called] or deployments
        return [f"{provider}/{name}" for provider, name in sorted(those)]

    def _billed(self, sums: Sums) -> Values:
        values = self._values(sums)
        return {name: values[name] for name in ("bill_usd", "bill_tokens")}

    def _unmatched(self) -> list[Any]:
        return sorted(self.found.unmatched.items(), key=lambda item: (-item[1].bill_usd, item[0][0].name))

    def as_text(self) -> str:
        """The report for people."""
        models = [self._model(model) for model in sorted(self.found.models)]
        lines = [
            (each.get("model", ""), ", ".join(each["deployments"]) or "-", *_cells(each), _judged(each))
            for model in models
            for each in (model, *model["by_deployment"])
        ]
        total = self.found.all
        lines.append(("total", "", *_cells(self._values(total)), "DRIFTS" if self._drifts(total) else ""))
        parts = [
            f"{self.days.first} to {self.days.last}, by {'tokens' if self.by_tokens else 'cost'}; "
            f"drift is what the bill has more than the ledger of {', '.join(self.providers)}\n",
            aligned([("MODEL", "DEPLOYMENTS", *_HEADS, ""), *lines]),
            aligned([("DAY", "MODEL", "DEPLOYMENTS", *_HEADS), *self._days()]),
        ]
        if self.found.unmatched:
            parts.append("Of no known model, and in the total; --map FILE says what they are:\n" + self._left())
        parts += self._notes()
        return "\n".join(parts)

    def _days(self) -> list[tuple[str, ...]]:
        rows = [
            (day, model, place, sums)
            for model, days in self.found.models.items()
            for (day, place), sums in days.items()
        ]
        rows.sort(key=lambda row: row[:3])
        return [
            (str(day), model, ", ".join(self._named(model, place)) or "-", *_cells(self._values(sums)))
            for day, model, place, sums in rows
        ]

    def _left(self) -> str:
        rows = [
            (meter.name, meter.resource or "-", *_cells(self._billed(sums)), " or ".join(unmatched.candidates) or "-")
            for (meter, unmatched), sums in self._unmatched()
        ]
        return aligned([("METER", "RESOURCE", "BILL_USD", "BILL_TOKENS", "MAY_BE"), *rows])

    def _notes(self) -> list[str]:
        others = [f"{visible(kind)} {_text(usd)} USD" for kind, usd in sorted(self.bill.other_charges.items())]
        notes = [f"Not compared: {', '.join(others)}\n"] if others else []
        ignored = self._billed(self.found.ignored)["bill_usd"]
        if ignored not in (None, "0"):
            notes.append(f"Ignored, as --map says: {ignored} USD\n")
        if self.bill.other_rows:
            notes.append(f"{self.bill.other_rows} rows are about other services or days\n")
        return notes


def _judged(values: Mapping[str, Any]) -> str:
    return "DRIFTS" if values["drifts"] else ""


def _cells(values: Mapping[str, Any]) -> list[str]:
    """The numbers of a row, without what tells whose they are."""
    told = ("model", "deployments", "drifts", "by_deployment")
    return ["-" if value is None else str(value) for name, value in values.items() if name not in told]


def _text(number: Decimal) -> str:
    """In plain decimals, without trailing zeros."""
    if not number:
        return "0"
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
