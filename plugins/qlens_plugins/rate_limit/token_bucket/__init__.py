"""Token buckets: requests and tokens a minute, and calls at a time, in one process or over all replicas."""

from qlens_plugins.rate_limit.token_bucket.plugin import TokenBucket
from qlens_plugins.rate_limit.token_bucket.settings import Match, Memory, Redis, Rule, TokenBucketConfig

__all__ = ["Match", "Memory", "Redis", "Rule", "TokenBucket", "TokenBucketConfig"]
