"""Pictures from other machines: only from hosts on a list, by https, from public addresses, and no more bytes than allowed."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Collection

from ..errors import EngineError
from ..preprocess import ImageError

__all__ = ["fetch_image"]

MAX_REDIRECTS = 3
TIMEOUT = 10.0  # seconds for all of it
CHUNK = 1 << 16
REDIRECTS = (301, 302, 303, 307, 308)

Connect = Callable[[str, float], http.client.HTTPConnection]


def public_address(host: str) -> str:
    """An address of a host, all of whose addresses are public.

    Raises:
        ImageError: unknown, or one of them is not.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise ImageError(f"image host {host}: cannot be found") from None
    if not all(_is_public(address) for address in found):
        raise ImageError(f"image host {host}: not at a public address")
    return sorted(found)[0]


def connect_to(host: str, timeout: float) -> http.client.HTTPConnection:
    """A TLS connection to the very address that has been checked, so that nothing else can be resolved in between."""
    connection = http.client.HTTPSConnection(host, timeout=timeout, context=ssl.create_default_context())
    plain = socket.create_connection((public_address(host), 443), timeout)
    connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    return connection


def fetch_image(url: str, hosts: Collection[str], *, most: int, connect: Connect = connect_to) -> bytes:
    """The bytes behind a URL.

    Args:
        hosts: that may be asked; most: bytes that are read.
        connect: makes a connection to a host that is on the list.

    Raises:
        EngineError: a host that is not on the list, another scheme, or remote images are not allowed at all.
        ImageError: not there, too large, too slow.
    """
    end = time.monotonic() + TIMEOUT
    for _ in range(MAX_REDIRECTS + 1):
        host, path = _allowed(url, hosts)
        try:
            connection = connect(host, max(0.1, end - time.monotonic()))
            try:
                connection.request("GET", path, headers={"User-Agent": "vflow-export", "Accept": "image/*"})
                response = connection.getresponse()
                if response.status in REDIRECTS:
                    url = urllib.parse.urljoin(url, response.headers.get("Location", ""))
                    continue
                if response.status != http.client.OK:
                    raise ImageError(f"image host {host}: answered {response.status}")
                return _read(response, host, most, end)
            finally:
                connection.close()
        except ImageError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError(f"image host {host}: {type(error).__name__}") from None
    raise ImageError(f"image host {host}: more than {MAX_REDIRECTS} redirects")


def _allowed(url: str, hosts: Collection[str]) -> tuple[str, str]:
    """Host and path of a URL that may be fetched."""
    if not hosts:
        raise EngineError("this server fetches no images: send a data: URL (data:image/png;base64,...), or start it with --allow-remote-images HOST")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ImageError("image URL cannot be read") from None
    if parts.scheme != "https" or port not in (None, 443) or parts.username is not None:
        raise EngineError("images are fetched by plain https:// URLs only; send a data: URL instead")
    if host not in hosts:
        raise EngineError(f"image host {host!r} is not on this server's list (--allow-remote-images); send a data: URL instead")
    path = urllib.parse.quote(parts.path or "/", safe="/%:=&?~+!$,;'@()*") + (f"?{parts.query}" if parts.query else "")
    return host, path


def _read(response: http.client.HTTPResponse, host: str, most: int, end: float) -> bytes:
    content = bytearray()
    while chunk := response.read1(CHUNK):
        content += chunk
        if len(content) > most:
            raise ImageError(f"image host {host}: more than {most} bytes")
        if time.monotonic() > end:
            raise ImageError(f"image host {host}: not there after {TIMEOUT:g} s")
    return bytes(content)


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        return parsed.is_global and not parsed.is_multicast
    except ValueError:
        return False
