"""Object storage that errs now and then: a proxy on loopback before a moto server refuses, cuts and loses answers; and
one that never answers.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from akd_dist.base.errors import MachineError, RecipeError
from akd_dist.storage import catalog, repair, s3
from akd_dist.storage.objects import ObjectRoot
from akd_dist.storage.reader import open_store
from akd_dist.storage.roots import open_root
from tests import stores


class Faults:
    """Which fault the next request meets: a seeded share of them, or all."""

    def __init__(self) -> None:
        self.share, self.kinds, self.random, self.seen = 0.0, ["busy", "cut", "lost"], random.Random(0), Counter[str]()

    def next(self) -> str:
        kind = self.random.choice(self.kinds) if self.random.random() < self.share else "none"
        self.seen[kind] += 1
        return kind


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on, or: answers 503; cuts the answer short; does the work and then answers 500."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    upstream: str

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.next()
        if fault == "busy":
            self.reply(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        connection = http.client.HTTPConnection(self.upstream, timeout=900)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data, headers = answer.read(), dict(answer.getheaders())
        connection.close()
        if fault == "lost":
            self.reply(500, {}, b"")
        elif fault == "cut" and data and self.command == "GET":
            self.reply(answer.status, headers, data, cut=True)
        else:
            self.reply(answer.status, headers, data)

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = answer  # noqa: N815

    def reply(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def faults() -> Iterator[Faults]:
    """A bucket behind the proxy, and what the proxy does."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT"), timeout=900).close()
    faulty = Faults()
    handler = type("Handler", (Proxy,), {"faults": faulty, "upstream": f"{host}:{port}"})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        yield faulty
    proxy.shutdown()
    thread.join()
    proxy.server_close()
    server.stop()


def test_a_third_of_the_requests_failing_changes_no_byte(faults: Faults) -> None:
    faults.share = 0.3
    stores.build("s3://bucket/stores")
    store = catalog.find_store("s3://bucket/stores", stores.identity())
    assert store is not None
    rows = np.stack([store.rows(view, 0, 300) for view in range(2)])
    np.testing.assert_array_equal(rows, stores.logits(stores.identity()))
    assert repair.verify_store("s3://bucket/stores", store.id) == []
    assert set(faults.seen) == {"none", "busy", "cut", "lost"}, faults.seen
    faults.share = 0.0
    golden = {name.partition("/")[2]: data for name, data in stores.sealed_files(stores.GOLDEN).items()}
    assert {name: open_root(store.uri).get(name) for name in golden} == golden
    assert open_root("s3://bucket/stores").files() == []


def test_a_put_whose_answer_was_lost_is_found_done(faults: Faults) -> None:
    root = open_root("s3://bucket/lost")
    faults.share, faults.kinds = 1.0, ["lost"]
    timer = threading.Timer(0.05, lambda: setattr(faults, "share", 0.0))
    timer.start()
    assert root.put_new("key", b"data") in (False, True)  # callers compare what is there
    timer.join()
    assert root.get("key") == b"data"


def test_storage_that_only_errs_is_given_up_naming_the_key(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = stores.build("s3://bucket/stores").uri
    monkeypatch.setattr(s3, "_answered", set[str]())  # as at first sight: storage that has answered is given longer
    faults.share, faults.kinds = 1.0, ["busy"]
    with pytest.raises(MachineError, match=r"cannot read s3://bucket/stores/.*/manifest\.json") as refused:
        open_store(uri)
    assert "SlowDown" in str(refused.value.got) or "503" in str(refused.value.got)
    assert faults.seen["busy"] == 7  # the request and six retries


# ---- storage that accepts and never answers


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The endpoint of a server that accepts every connection and says nothing; given up after 0.4 s."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = list[socket.socket]()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AKD_DIST_S3_TIMEOUT", "0.4")
        # A server of an earlier test may have had the same port.
        monkeypatch.setattr(s3, "_answered", set[str]())
        monkeypatch.setattr(s3, "_silent", dict[tuple[str, int], float]())
        yield endpoint
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in kept:
            connection.close()


ASKED: dict[str, Callable[[ObjectRoot], object]] = {
    "get": lambda root: root.get("key"),
    "exists": lambda root: root.exists("key"),
    "list": lambda root: root.list(),
    "folders": lambda root: root.folders(),
    "put_new": lambda root: root.put_new("key", b""),
    "put": lambda root: root.put("key", b""),
    "move": lambda root: root.move("key", "to"),
    "delete": lambda root: root.delete("key"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_silent_storage_is_told_of_and_then_given_up(
    silence: str, asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = open_root("s3://bucket/stores")
    with pytest.raises(MachineError) as refused:
        ASKED[asked](root)
    assert refused.value.code == 6
    assert refused.value.what.startswith("cannot ")
    assert "s3://bucket/stores" in refused.value.what
    assert re.fullmatch(rf"no answer from {silence} within [\d.]+ s, in 2 tries", str(refused.value.got))
    assert "AKD_DIST_S3_TIMEOUT" in str(refused.value.next)
    assert caplog.messages == [f"no answer from {silence} for 0.2 s: asking again, until 0.4 s are over"]
    with pytest.raises(MachineError, match="did not answer just now"):  # whoever tidies up does not wait again
        root.delete("key")


def test_a_command_on_silent_storage_ends_with_exit_code_6(silence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "akd_dist.cli", "stores", "list", "--store-root", "s3://bucket/stores"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    line, error, *_ = done.stderr.splitlines()
    assert line == f"no answer from {silence} for 0.2 s: asking again, until 0.4 s are over"
    assert error == "error: cannot list s3://bucket/stores/"
    assert f"no answer from {silence} within" in done.stderr


def test_the_time_for_storage_grows_with_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert s3.timeout_seconds() == 30.0
    assert [s3._sending_seconds(size) for size in (0, 2**18, 2**19, 16 * 2**20)] == [0.0, 0.0, 2.0, 64.0]
    for text in ("soon", "0", "-1", "nan", "inf", "3_0", "\u0663\u0660"):
        monkeypatch.setenv("AKD_DIST_S3_TIMEOUT", text)
        with pytest.raises(RecipeError, match="AKD_DIST_S3_TIMEOUT is no time"):
            s3.timeout_seconds()
