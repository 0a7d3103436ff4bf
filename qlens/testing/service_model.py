"""Checks JSON against the models of AWS's services, as botocore has them."""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as Base64Error
from functools import cache
from typing import Any

from botocore.model import ServiceModel, Shape
from botocore.session import get_session
from botocore.validate import ParamValidator


@cache
def service_model(name: str) -> ServiceModel:
    """The model of a service: bedrock-runtime, say."""
    return get_session().get_service_model(name)


def fault(shape: Shape, value: Any, path: str = "") -> str | None:
    """What of a JSON value does not fit a shape; None when all does."""
    try:
        typed = _typed(shape, value, path)
    except ValueError as error:
        return str(error)
    report = ParamValidator().validate(typed, shape)
    return report.generate_report() if report.has_errors() else None


def _typed(shape: Shape, value: Any, path: str) -> Any:
    """The value with bytes for base64; raises ValueError where botocore's own check does not look."""
    if getattr(shape, "is_document_type", False):
        return value
    match shape.type_name:
        case "structure" if isinstance(value, dict):
            return _structure(shape, value, path)
        case "list" if isinstance(value, list):
            _check_length(shape, value, path)
            return [_typed(shape.member, item, f"{path}[{at}]") for at, item in enumerate(value)]
        case "map" if isinstance(value, dict):
            _check_length(shape, value, path)
            return {
                _typed(shape.key, name, path): _typed(shape.value, item, f"{path}.{name}")
                for name, item in value.items()
            }
        case "blob" if isinstance(value, str):
            try:
                return b64decode(value, validate=True)
            except Base64Error:
                raise ValueError(f"{path}: not valid base64") from None
        case "string" if isinstance(value, str):
            _check_text(shape, value, path)
        case "integer" | "long" | "float" | "double" if type(value) in {int, float}:
            most = shape.metadata.get("max")
            if most is not None and value > most:
                raise ValueError(f"{path}: {value} is above {most}")
    return value


def _structure(shape: Shape, value: dict[str, Any], path: str) -> dict[str, Any]:
    if shape.metadata.get("union") and len(value) != 1:
        raise ValueError(f"{path}: exactly one of {', '.join(shape.members)} must be set, found {sorted(value)}")
    unknown = value.keys() - shape.members.keys()
    if unknown:
        raise ValueError(f"{path}: extraneous key [{min(unknown)}] is not permitted")
    return {name: _typed(shape.members[name], item, f"{path}.{name}") for name, item in value.items()}


def _check_length(shape: Shape, value: Any, path: str) -> None:
    most = shape.metadata.get("max")
    if most is not None and len(value) > most:
        raise ValueError(f"{path}: more than {most} members")


def _check_text(shape: Shape, value: str, path: str) -> None:
    pattern, most, allowed = shape.metadata.get("pattern"), shape.metadata.get("max"), getattr(shape, "enum", None)
    if most is not None and len(value) > most:
        raise ValueError(f"{path}: longer than {most} characters")
    if pattern is not None and not re.fullmatch(pattern, value):
        raise ValueError(f"{path}: failed to satisfy constraint: Member must satisfy regular expression pattern")
    if allowed and value not in allowed:
        raise ValueError(f"{path}: must be one of {', '.join(allowed)}")
