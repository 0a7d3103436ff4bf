"""One request to Bedrock: signed, sent, and its answer or the error it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import orjson
from attrs import define, field, frozen

from qlens import (
    Answer,
    CallError,
    Deadlines,
    Upstream,
    UpstreamError,
    UpstreamInvalid,
    UpstreamRejected,
    Usage,
    json_of,
    trimmed,
)
from qlens_plugins.provider.bedrock.failures import CredentialsExpired, from_answer
from qlens_plugins.provider.bedrock.signing import NOTHING, Proof

_ERROR_BODY_BYTES = 64 * 1024


class Credentials(Protocol):
    """What proves to Bedrock who asks."""

    def prove(self, host: str, path: str, body: bytes, accept: str, own: Mapping[str, str]) -> Proof:
        """The headers of a request, Bedrock's own among them; raises UpstreamAuth when there is no credential."""

    async def renew(self, refused: Proof) -> bool:
        """Get a fresh credential, because that of a request with these headers has expired; False: there is none."""


@frozen(slots=False)  # made for every call
class Told:
    """A whole answer."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    request_id: str | None


@define(eq=False)
class Wire:
    """Sends requests to one endpoint of Bedrock."""

    http: Upstream = field(repr=False)
    base: str
    """The endpoint without a path."""
    credentials: Credentials = field(repr=False)
    deadlines: Deadlines
    _host: str = field(init=False)
    _prefix: str = field(init=False)
    """The path of the endpoint itself, which is signed with the rest."""

    def __attrs_post_init__(self) -> None:
        self.base = self.base.rstrip("/")
        self._host, slash, rest = self.base.partition("://")[2].partition("/")
        self._prefix = slash + rest

    async def ask(self, path: str, body: bytes, own: Mapping[str, str] = NOTHING) -> Told:
        """Post JSON and return the whole answer; raises UpstreamInvalid for one that is no JSON object."""
        answer = await self.post(path, body, "application/json", own)
        request_id = request_id_of(answer)
        try:
            return Told(_parsed(await answer.read()), answer.headers, request_id)
        except CallError as error:
            error.upstream_id = request_id
            raise

    async def post(self, path: str, body: bytes, accept: str, own: Mapping[str, str] = NOTHING) -> Answer:
        """Post JSON and return the answer once its status says that it is one; raises the error it is otherwise.

        Credentials that were refused as expired are renewed, and the request is sent once more.
        """
        prove = partial(self.credentials.prove, self._host, self._prefix + path, body, accept, own)
        proof = prove()
        try:
            return await self._post(path, body, proof)
        except CredentialsExpired:
            if not await self.credentials.renew(proof):
                raise
        return await self._post(path, body, prove())

    async def _post(self, path: str, body: bytes, proof: Proof) -> Answer:
        answer = await self.http.open(
            "POST",
            self.base + path,
            headers=proof.headers,
            authorization=proof.authorization,
            body=body,
            deadlines=self.deadlines,
        )
        if answer.status == 200:
            return answer
        raise await _refusal(answer)


@define(eq=False)
class ToldBy:
    """Around the reading of an answer: what is wrong with it is told with AWS's id of its request, and what it used."""

    request_id: str | None
    usage: Usage | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        if isinstance(error, CallError):
            error.upstream_id = error.upstream_id or self.request_id
            error.usage = error.usage or self.usage
        elif isinstance(error, AttributeError | IndexError | KeyError | TypeError):
            invalid = UpstreamInvalid("The provider's answer is not as its API promises.")
            invalid.upstream_id, invalid.usage = self.request_id, self.usage
            raise invalid from error


def dumped(body: dict[str, Any]) -> bytes:
    """A body as it is sent, and signed."""
    try:
        return trimmed(orjson.dumps(body))
    except orjson.JSONEncodeError:
        raise UpstreamRejected("The body is nested too deeply, or a number in it is too large.") from None


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        parsed = json_of(raw)
    except orjson.JSONDecodeError:
        error = UpstreamInvalid("The provider's answer is not valid JSON.")
        error.answered = raw.lstrip().startswith(b"{")  # it was made all the same
        raise error from None
    if not isinstance(parsed, dict):
        raise UpstreamInvalid("The provider's answer is not a JSON object.")
    return parsed


async def _refusal(answer: Answer) -> CallError:
    request_id = request_id_of(answer)
    if answer.status < 400:
        await answer.close()
        no_answer = UpstreamInvalid(f"The provider answered with status {answer.status}, which is no answer to a call.")
        no_answer.upstream_id = request_id
        return no_answer
    try:
        body = await answer.read(_ERROR_BODY_BYTES)
    except UpstreamError:
        body = b""  # the status and the headers say enough
    finally:
        await answer.close()
    error = from_answer(answer.status, answer.headers, body)
    error.upstream_id = request_id
    return error


def request_id_of(answer: Answer) -> str | None:
    """AWS's id of a request, for receipts and for AWS's support."""
    value = answer.headers.get("x-amzn-requestid")
    return value if value and len(value) <= 128 and value.isascii() and value.isprintable() else None
