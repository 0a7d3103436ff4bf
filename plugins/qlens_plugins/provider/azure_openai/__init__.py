"""Azure OpenAI, on its classic surface (a deployment in the path) and on v1 (the deployment as the model)."""

from qlens_plugins.provider.azure_openai.plugin import AzureOpenAI
from qlens_plugins.provider.azure_openai.settings import AzureOpenAIConfig

__all__ = ["AzureOpenAI", "AzureOpenAIConfig"]
