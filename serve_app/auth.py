"""Whose request this is: the Authorization header to a principal. Nothing else is trusted."""

from __future__ import annotations

from lakebus.errors import Unauthenticated
from serve_app.calls import Call
from storage.ingesting.grants import Principal
from storage.ingesting.keyring import KeyRing


async def authenticate(call: Call, keyring: KeyRing) -> Principal:
    """The caller. Raises Unauthenticated, MalformedRequest, Unavailable."""

    text = call.header(b"authorization")
    if text is None:
        raise Unauthenticated("an API key is needed; send Authorization: Bearer <key>")
    scheme, _, key = text.partition(" ")
    if scheme != "Bearer" and scheme.lower() != "bearer":
        raise Unauthenticated("only Authorization: Bearer <key> is understood")
    return await keyring.authenticate(key.strip())
