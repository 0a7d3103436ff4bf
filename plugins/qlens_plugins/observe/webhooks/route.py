"""The way to an endpoint: its address, its keys, its headers."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from qlens import Outbound, Received
from qlens_plugins.observe.webhooks.settings import WebhookEndpoint
from qlens_plugins.observe.webhooks.signing import signed


@frozen
class Route:
    """What is needed to send something to an endpoint."""

    endpoint: WebhookEndpoint
    keys: list[bytes] = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)

    @classmethod
    def to(cls, endpoint: WebhookEndpoint) -> Route:
        """The route to an endpoint."""
        more = {name: value.reveal() for name, value in endpoint.headers.items()}
        return cls(endpoint, endpoint.keys, {"content-type": "application/cloudevents+json", **more})

    async def send(self, outbound: Outbound, event: str, now: float, body: bytes, seconds: float) -> Received:
        """Send an event once; raises OutboundFailed."""
        headers = {**self.headers, **signed(self.keys, event, int(now), body)}
        return await outbound.send("POST", self.endpoint.url, headers=headers, body=body, seconds=seconds)
