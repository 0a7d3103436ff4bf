"""Signatures equal those of AWS's own signer, byte for byte."""

from __future__ import annotations

import calendar
import time
from hashlib import sha256
from urllib.parse import quote

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from qlens_plugins.provider.bedrock.signing import Keys, Proof, Signer, bearer

HOST = "bedrock-runtime.us-east-1.amazonaws.com"
PATH = "/model/us.amazon.nova-lite-v1%3A0/converse"
BODY = b'{"messages":[{"role":"user","content":[{"text":"hi"}]}]}'
STAMP = "20260102T030405Z"


def _at(stamp: str) -> float:
    return calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))


@pytest.mark.parametrize(
    ("token", "signature"),
    [
        (None, "e40c42d6ad606573b61e1d2730e4fc03f074aee6f54bc70d1f65416aaa246ad5"),
        ("TOKEN", "4d67618dc40e4b2d377242700233e03a6c08089661f89a13d9b7b67f475eecaf"),
    ],
)
def test_known_requests_have_known_signatures(token: str | None, signature: str) -> None:
    assert sha256(BODY).hexdigest() == "c3335e07d6e89650bf94cb98664be69f8774dbc3198df221f113db0a59ea14f0"
    keys = Keys("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", token)
    proof = Signer("us-east-1", lambda: _at(STAMP)).sign(keys, HOST, PATH, BODY, "application/json")
    assert proof.authorization.endswith(f"Signature={signature}")
    assert proof.headers.get("x-amz-security-token") == token
    assert proof.headers["x-amz-date"] == STAMP


def _judged(keys: Keys, region: str, url: str, body: bytes, proof: Proof) -> str:
    auth = SigV4Auth(Credentials(keys.access_key, keys.secret_key, keys.token), "bedrock", region)
    request = AWSRequest("POST", url, data=body)
    for name in ("content-type", "host", "x-amz-date", "x-amz-security-token"):
        if name in proof.headers:
            request.headers[name] = proof.headers[name]
    request.context["timestamp"] = proof.headers["x-amz-date"]
    signature = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    scope = auth.scope(request)
    names = auth.signed_headers(auth.headers_to_sign(request))
    return f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders={names}, Signature={signature}"


printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


@given(
    model=st.text(min_size=1, max_size=60).filter(lambda model: model not in {".", ".."}),
    body=st.binary(max_size=200),
    access_key=st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", min_size=16, max_size=20),
    secret=printable,
    token=st.none() | printable,
    second=st.integers(0, 4_000_000_000),
    region=st.sampled_from(["us-east-1", "eu-central-1", "us-gov-west-1"]),
    host=st.sampled_from([HOST, "127.0.0.1:8080", "vpce-1.example.com"]),
)
def test_every_signature_equals_that_of_the_sdk(
    model: str,
    body: bytes,
    access_key: str,
    secret: str,
    token: str | None,
    second: int,
    region: str,
    host: str,
) -> None:
    path = f"/model/{quote(model.encode(errors='replace'), safe='')}/converse"
    keys = Keys(access_key, secret, token)
    proof = Signer(region, lambda: second).sign(keys, host, path, body, "application/json")
    assert proof.authorization == _judged(keys, region, f"https://{host}{path}", body, proof)


def test_what_is_remembered_does_not_outlive_the_day_nor_the_key() -> None:
    now = [_at("20260102T235959Z")]
    signer = Signer("us-east-1", lambda: now[0])
    first, second = Keys("AKIDEXAMPLE", "one"), Keys("AKIDEXAMPLE", "other")
    for keys, stamp in ((first, "20260102T235959Z"), (first, "20260103T000000Z"), (second, "20260103T000000Z")):
        now[0] = _at(stamp)
        proof = signer.sign(keys, HOST, PATH, BODY, "application/json")
        assert proof.authorization == _judged(keys, "us-east-1", f"https://{HOST}{PATH}", BODY, proof)


def test_secrets_do_not_show() -> None:
    keys = Keys("AKIDEXAMPLE", "the-secret", "the-token")
    signer = Signer("us-east-1")
    signer.sign(keys, HOST, PATH, BODY, "application/json")
    assert "the-secret" not in f"{keys!r}{signer!r}"
    assert "the-token" not in f"{keys!r}{signer!r}"


def test_an_api_key_is_sent_as_bearer() -> None:
    assert bearer("example", HOST, "*/*").authorization == "Bearer example"
