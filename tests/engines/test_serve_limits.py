"""Who is let in, how much a request may hold, and from where pictures are fetched."""

from __future__ import annotations

import http.client
import http.server
import json
import random
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import httpx
import numpy as np
import openai
import pytest
from PIL import ImageFile
from serving import MODEL, client, data_url, encoded_url, image_bytes, serving, user, wait_until
from vflow.engines import Batcher, Engine, EngineError, ImageError
from vflow.engines.preprocess import load_image
from vflow.engines.serve import gate, images, remote
from vflow.engines.serve.app import READERS, create_app
from vflow.engines.serve.images import read_messages
from vflow.engines.serve.options import ServeOptions
from vflow.engines.serve.remote import fetch_image
from vflow.engines.serve.schema import ImagePart, ImageUrl, UserMessage

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def batcher(standin: Engine) -> Iterator[Batcher]:
    with Batcher(standin, slots=1, queue_limit=2, provider="cpu", threads=1) as batcher:
        yield batcher


def ask(address: str, *urls: str, **options: Any) -> Any:
    return client(address, **options).chat.completions.create(model=MODEL, messages=[user("hello", *urls)], max_tokens=2)


def refused(address: str, *urls: str) -> str:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(address, *urls)
    return str(caught.value.body["message"])  # type: ignore[index]


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is that large, and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_with_a_key_nobody_is_let_in_without_it(batcher: Batcher) -> None:
    with serving(batcher, ServeOptions(api_key="secret-1")) as address:
        assert ask(address, api_key="secret-1").choices
        for key in ("secret-2", "secret-11", "secret-"):
            with pytest.raises(openai.AuthenticationError, match="wrong or no API key") as caught:
                ask(address, api_key=key)
            assert caught.value.code == "invalid_api_key"
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/chat/completions", "/health/x"):
            refused = httpx.get(f"{address}{path}")
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": "secret-1"}).status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        assert 'vflow_http_errors_total{status="401"} 9.0' in httpx.get(f"{address}/metrics", headers={"Authorization": "Bearer secret-1"}).text


@pytest.mark.parametrize("wrong", ["", " x", "ü", "a\nb"])
def test_keys_that_no_client_could_send_are_refused(wrong: str) -> None:
    with pytest.raises(EngineError, match="API key must be"):
        ServeOptions(api_key=wrong)


@pytest.mark.parametrize("field", ["max_body_bytes", "max_images", "max_image_pixels", "timeout"])
def test_limits_that_let_nothing_through_are_refused(field: str) -> None:
    with pytest.raises(EngineError, match=field):
        ServeOptions(**{field: 0})


def test_bodies_beyond_the_limit_are_not_read(batcher: Batcher) -> None:
    with serving(batcher, ServeOptions(max_body_bytes=10_000)) as address:
        url = f"{address}/v1/chat/completions"
        said = httpx.post(url, json={"model": "x" * 10_000})
        assert said.status_code == 413 and "larger than 10000 bytes" in said.json()["error"]["message"]
        unsaid = httpx.post(url, content=(b"x" * 1000 for _ in range(20)), headers={"Content-Type": "application/json"})
        assert unsaid.status_code == 413 and unsaid.json()["error"]["type"] == "invalid_request_error"
        assert ask(address, data_url(PICTURE)).choices


def test_a_body_of_the_very_limit_is_taken(batcher: Batcher) -> None:
    body = json.dumps({"model": MODEL, "messages": [user("hello")], "max_tokens": 2}).encode()
    with serving(batcher, ServeOptions(max_body_bytes=len(body))) as address:
        for content in (body, iter([body])):  # its size said, and not
            said = httpx.post(f"{address}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            assert said.status_code == 200


def test_what_has_no_body_takes_no_place(batcher: Batcher) -> None:
    with serving(batcher) as address:
        for _ in range(batcher.slots + batcher.queue_limit + READERS):
            assert httpx.get(f"{address}/metrics").status_code == 200
        assert ask(address).choices


def test_a_body_that_does_not_come_keeps_no_place(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    with serving(batcher) as address:
        connections = []
        port = int(address.rsplit(":", 1)[1])
        for _ in range(batcher.slots + batcher.queue_limit + 2):
            connections.append(socket.create_connection(("127.0.0.1", port)))
            connections[-1].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        wait_until(lambda: httpx.post(f"{address}/v1/chat/completions", json={}).status_code == 429)
        answer = connections[0].recv(1000)
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()
        wait_until(lambda: httpx.post(f"{address}/v1/chat/completions", json={}).status_code == 400)
        for connection in connections:
            connection.close()


def test_images_are_counted_before_they_are_looked_at(batcher: Batcher) -> None:
    with serving(batcher, ServeOptions(max_images=2)) as address:
        assert refused(address, *["data:image/png;base64,%"] * 3) == "3 images, and this server takes 2 a request; send fewer"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with serving(batcher, ServeOptions(max_image_pixels=1_000_000)) as address:
        assert "more than 1,000,000 pixels together (image 1: 10000 x 10000)" in refused(address, encoded_url(png_header(10_000, 10_000)))
        assert "too many pixels" in refused(address, encoded_url(png_header(100_000, 100_000)))
        halves = [encoded_url(png_header(1000, 600))] * 2
        assert "(image 2: 1000 x 600)" in refused(address, *halves)


def test_images_that_are_damaged_or_of_rare_formats_are_refused(batcher: Batcher) -> None:
    with serving(batcher) as address:
        assert "damaged image" in refused(address, encoded_url(png_header(64, 64)))
        assert "damaged image" in refused(address, encoded_url(image_bytes(PICTURE, "PNG")[:-200]))
        for kind in ("TIFF", "EPS", "PPM"):
            assert "not an image of PNG, JPEG" in refused(address, encoded_url(image_bytes(PICTURE, kind)))
        for kind in ("JPEG", "WEBP", "GIF", "BMP"):
            assert ask(address, data_url(PICTURE, kind)).choices


def test_as_many_images_and_pixels_as_the_limits_say_are_taken() -> None:
    message = UserMessage(role="user", content=[ImagePart(type="image_url", image_url=ImageUrl(url=data_url(PICTURE)))] * 2)
    _, taken = read_messages([message], ServeOptions(max_images=2, max_image_pixels=2 * PICTURE.shape[0] * PICTURE.shape[1]))
    assert len(taken) == 2


def test_hosts_and_bytes_of_fetched_images_are_those_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(images, "fetch_image", lambda url, hosts, *, most: asked.append((url, hosts, most)) or image_bytes(PICTURE))
    message = UserMessage(role="user", content=[ImagePart(type="image_url", image_url=ImageUrl(url="https://pictures.test/a.png"))])
    read_messages([message], ServeOptions(remote_hosts=frozenset({"pictures.test"}), max_body_bytes=12_345))
    assert asked == [("https://pictures.test/a.png", {"pictures.test"}, 12_345)]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_whatever_bytes_an_image_has_it_is_read_or_refused(kind: str) -> None:
    whole, rng = image_bytes(PICTURE, kind), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            place = rng.randrange(200)
            damaged[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        message = UserMessage(role="user", content=[ImagePart(type="image_url", image_url=ImageUrl(url=encoded_url(bytes(damaged), kind)))])
        try:
            _, [image] = read_messages([message], ServeOptions(max_image_pixels=1_000_000))
            assert load_image(image).ndim == 3
        except ImageError as error:
            assert "\n" not in str(error)


def test_the_document_says_that_a_key_is_needed(batcher: Batcher) -> None:
    document = create_app(batcher, ServeOptions(api_key="k")).openapi()
    assert document["security"] == [{"key": []}] and document["paths"]["/health"]["get"]["security"] == []
    assert "security" not in create_app(batcher).openapi()


class Host(http.server.BaseHTTPRequestHandler):
    """A picture, redirects, and what is too large or broken."""

    places: ClassVar = {
        "/moved": "/picture.png", "/away": "https://other.test/picture.png", "/inside": "https://169.254.169.254/", "/round": "/round",
        "/nowhere": "https://[::1", "/hops/4": "3", "/hops/3": "2", "/hops/2": "1", "/hops/1": "/picture.png",
    }  # fmt: skip
    statuses: ClassVar = {"/moved": 301, "/hops/3": 303, "/hops/2": 307, "/hops/1": 308, "/none": 404, "/part": 206}

    def do_GET(self) -> None:
        if self.path == "/garbage":
            self.wfile.write(b"garbage\r\n\r\n")
            return
        self.send_response(self.statuses.get(self.path, 302 if self.path in self.places else 200))
        if self.path in self.places:
            self.send_header("Location", self.places[self.path])
        self.end_headers()
        for _ in range(50 if self.path == "/slow" else 0):
            self.wfile.write(b"x")
            time.sleep(0.05)
        picture = image_bytes(PICTURE)
        content = {"/picture.png": picture, "/a%20b.png?key=c%2Fd": picture, "/large": b"x" * 100_000}.get(self.path, b"")
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def connect() -> Iterator[Callable[[str, float], http.client.HTTPConnection]]:
    """Every host is one on loopback, without TLS."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda host, timeout: http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=timeout)
        server.shutdown()


def test_pictures_come_from_hosts_on_the_list(connect: Any) -> None:
    whole = image_bytes(PICTURE)
    for path in ("picture.png", "a b.png?key=c%2Fd", "a%20b.png?key=c%2Fd", "moved", "hops/3"):  # as many bytes and redirects as may be
        assert fetch_image(f"https://pictures.test/{path}", {"pictures.test"}, most=len(whole), connect=connect) == whole


def test_a_host_that_sends_a_byte_now_and_then_is_not_waited_for(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    with pytest.raises(ImageError, match=r"pictures\.test: not there after 0\.3 s"):
        fetch_image("https://pictures.test/slow", {"pictures.test"}, most=10_000, connect=connect)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://other.test/picture.png", "'other.test' is not on this server's list"),
        ("http://pictures.test/picture.png", "by plain https:// URLs only"),
        ("https://pictures.test:8443/picture.png", "by plain https:// URLs only"),
        ("https://me:secret@pictures.test/picture.png", "by plain https:// URLs only"),
        ("https://pictures.test@other.test/", "by plain https:// URLs only"),
        ("file:///etc/passwd", "by plain https:// URLs only"),
        ("https://[::1", "cannot be read"),
        ("https://pictures.test/away", "'other.test' is not on this server's list"),
        ("https://pictures.test/inside", "'169.254.169.254' is not on this server's list"),
        ("https://pictures.test/round", "more than 3 redirects"),
        ("https://pictures.test/hops/4", "more than 3 redirects"),
        ("https://pictures.test/nowhere", "pictures.test: ValueError"),
        ("https://pictures.test/garbage", "pictures.test: BadStatusLine"),
        ("https://pictures.test/none", "answered 404"),
        ("https://pictures.test/part", "answered 206"),
        ("https://pictures.test/large", "more than 10000 bytes"),
    ],
)
def test_pictures_come_from_nowhere_else(connect: Any, url: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        fetch_image(url, {"pictures.test"}, most=10_000, connect=connect)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "::1", "fe80::1%eth0", "fd00::1", "0.0.0.0", "224.0.0.1"]
)
def test_a_host_at_a_private_address_is_not_asked(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)), (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(ImageError, match=r"pictures\.test: not at a public address"):
        fetch_image("https://pictures.test/a.png", {"pictures.test"}, most=10)


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))])

    def refuse(address: Any, timeout: float) -> Any:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(remote.socket, "create_connection", refuse)
    with pytest.raises(ImageError, match=r"pictures\.test: ConnectionRefusedError"):
        fetch_image("https://pictures.test/a.png", {"pictures.test"}, most=10)
    assert asked == [("93.184.216.34", 443)]


def test_the_host_must_prove_the_name_it_was_asked_by(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))])
    monkeypatch.setattr(remote.socket, "create_connection", lambda *_: None)

    def refuse(context: ssl.SSLContext, connection: None, *, server_hostname: str) -> Any:
        asked.append((server_hostname, context.check_hostname, context.verify_mode))
        raise ssl.SSLCertVerificationError

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", refuse)
    with pytest.raises(ImageError, match=r"pictures\.test: SSLCertVerificationError"):
        fetch_image("https://pictures.test/a.png", {"pictures.test"}, most=10)
    assert asked == [("pictures.test", True, ssl.CERT_REQUIRED)]
