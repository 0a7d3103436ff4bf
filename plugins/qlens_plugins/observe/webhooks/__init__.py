"""Events to HTTP endpoints: signed, retried for a day, kept on disk until they are delivered."""

from qlens_plugins.observe.webhooks.plugin import Webhooks
from qlens_plugins.observe.webhooks.settings import WebhooksConfig

__all__ = ["Webhooks", "WebhooksConfig"]
