"""Sends events to NATS JetStream, from an outbox on disk that outlasts both."""

from qlens_plugins.observe.nats.plugin import Nats
from qlens_plugins.observe.nats.settings import NatsConfig

__all__ = ["Nats", "NatsConfig"]
