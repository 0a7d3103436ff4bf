"""Which deployments of a model a bill tells apart.

Azure's bills name the account, which is in a provider's endpoint, and not the deployment in it; those of AWS name
application profiles by the ARN that a target has too. All else the operator may say with `--map`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from attrs import frozen

from qlens_plugins.cost.ledger.reconcile_names import Mapped, Meter

Deployment = tuple[str, str]
"""A provider, and its name for a model."""
Place = tuple[Deployment, ...]
"""Deployments of a model that the bill does not tell apart, in order."""

_ARN = "arn:"
_ACCOUNT = "/accounts/"


def account(endpoint: object) -> str | None:
    """The account behind an endpoint of Azure: `eu` of `https://eu.openai.azure.com`; None for what is no URL."""
    host = urlsplit(endpoint).hostname if isinstance(endpoint, str) else None
    return host.partition(".")[0] if host else None


@frozen
class Places:
    """Finds them."""

    accounts: Mapping[str, str]
    """By provider, the account that its charges name."""
    rules: tuple[Mapped, ...] = ()

    def apart(
        self, deployments: Iterable[Deployment], meters: Iterable[Meter]
    ) -> tuple[Mapping[Deployment, Place], Mapping[Meter, Place]]:
        """The place of each deployment of one model, and of each meter that is charged for it.

        A charge that may be for any of them keeps all of them together: to guess would make sums look right or wrong.
        """
        known = sorted(deployments)
        by_label: dict[str, list[Deployment]] = {}
        for deployment in known:
            by_label.setdefault(self._of_deployment(deployment), []).append(deployment)
        labels = {meter: self._of_charge(meter, by_label) for meter in meters}
        if not by_label.keys() >= set(labels.values()):
            whole = tuple(known)
            return dict.fromkeys(known, whole), dict.fromkeys(labels, whole)
        places = {label: tuple(those) for label, those in by_label.items()}
        return (
            {deployment: place for place in places.values() for deployment in place},
            {meter: places[label] for meter, label in labels.items()},
        )

    def _of_deployment(self, deployment: Deployment) -> str:
        """What tells it from others in a bill; nothing for those that a bill does not name."""
        provider, name = deployment
        if name.startswith(_ARN):
            return name
        named = any(rule.provider == provider for rule in self.rules)
        return self.accounts.get(provider, provider if named else "")

    def _of_charge(self, meter: Meter, known: Mapping[str, object]) -> str:
        for rule in self.rules:
            if rule.provider is not None and rule.fits(meter):
                return self.accounts.get(rule.provider, rule.provider)
        resource = meter.resource
        if resource.startswith(_ARN):
            return resource if resource in known else ""  # a model that everybody may call has an ARN too
        return resource.lower().rpartition(_ACCOUNT)[2].partition("/")[0] if _ACCOUNT in resource.lower() else ""
