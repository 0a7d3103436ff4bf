"""Authentication by JSON Web Tokens of one issuer: OpenID Connect, a key set, or one key."""

from qlens_plugins.auth.jwt.plugin import Jwt
from qlens_plugins.auth.jwt.settings import JwtConfig

__all__ = ["Jwt", "JwtConfig"]
