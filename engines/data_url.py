"""Pictures as ``data:`` URLs (RFC 2397), base64 alone, which is what JSON can hold."""

from __future__ import annotations

import base64
import binascii
import urllib.parse

from .preprocess import ImageError

__all__ = ["DATA_URL", "unpack_data_url"]

DATA_URL = b"data:"  # how one begins


def unpack_data_url(url: bytes, name: str) -> bytes:
    """What is in a URL ``data:image/png;base64,…``; percent escapes are taken.

    Raises:
        ImageError: not base64; ``name`` says of which picture.
    """
    head, comma, data = url.partition(b",")
    if not comma or not head.endswith(b";base64"):
        raise ImageError(f"{name}: a data URL must be data:image/...;base64,...")
    try:
        return base64.b64decode(urllib.parse.unquote_to_bytes(data) if b"%" in data else data, validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name}: not base64 ({error})") from None
