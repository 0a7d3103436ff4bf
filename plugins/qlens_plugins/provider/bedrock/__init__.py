"""AWS Bedrock: every family of models behind Converse, and embeddings."""

from qlens_plugins.provider.bedrock.plugin import Bedrock
from qlens_plugins.provider.bedrock.settings import BedrockConfig

__all__ = ["Bedrock", "BedrockConfig"]
