"""What object storage refuses, and what a message then says to do: by a server on loopback that answers with codes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from akd_dist.base.errors import MachineError
from akd_dist.storage.objects import ObjectRoot
from akd_dist.storage.roots import open_root

ROOT = "s3://bucket/stores"


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with the status and code that are set."""

    protocol_version = "HTTP/1.1"
    status, code = 200, ""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = f"<?xml version='1.0'?><Error><Code>{self.code}</Code></Error>".encode() if self.code else b""
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def refusing() -> Iterator[type[Refusing]]:
    handler = type("Handler", (Refusing,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "canary-secret",
            "AWS_REGION": "us-east-1",
            "AKD_DIST_S3_TIMEOUT": "1",
        }.items():
            patch.setenv(name, value)
        yield handler
    server.shutdown()
    thread.join()
    server.server_close()


READ: Callable[[ObjectRoot], Any] = lambda root: root.get("key")  # noqa: E731
WRITE: Callable[[ObjectRoot], Any] = lambda root: root.put_new("key", b"data")  # noqa: E731


@pytest.mark.parametrize(
    ("status", "code", "ask", "next_step"),
    [
        (403, "AccessDenied", READ, "let these credentials"),
        (403, "AccessDenied", WRITE, "let these credentials"),
        (403, "InvalidAccessKeyId", READ, "set AWS_ACCESS_KEY_ID"),
        (403, "ExpiredToken", READ, "AWS_SESSION_TOKEN"),
        (403, "SignatureDoesNotMatch", WRITE, "AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", READ, "clock"),
        (403, "QuotaExceeded", WRITE, "free some space"),
        (507, "XMinioStorageFull", WRITE, "free some space"),
        (301, "PermanentRedirect", READ, "AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", READ, "AWS_REGION"),
        (404, "NoSuchBucket", READ, "create the bucket"),
        (501, "NotImplemented", WRITE, "conditional puts"),
        (403, "", lambda root: root.exists("key"), "clock"),
    ],
)
def test_a_refusal_says_what_to_do(
    status: int, code: str, ask: Callable[[ObjectRoot], Any], next_step: str, refusing: type[Refusing]
) -> None:
    refusing.status, refusing.code = status, code
    with pytest.raises(MachineError) as refused:
        ask(open_root(ROOT))
    assert refused.value.what in (f"cannot read {ROOT}/key", f"cannot write {ROOT}/key")
    assert next_step in str(refused.value.next)
    assert "canary-secret" not in str(refused.value)
