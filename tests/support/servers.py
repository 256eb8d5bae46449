"""Real servers on loopback, S3 (moto) and plain HTTP, each reached through a proxy that injects faults.

proxy.fail("train-000002.tar", "500", "reset")     of the next GETs of such a path, one is answered with 500, one is cut off
proxy.gets["train-000002.tar"]                     the number of GETs
"""

import http.client
import http.server
import logging
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from moto.server import ThreadedMotoServer

S3_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>injected</Message></Error>'
KEPT = ("content-length", "content-type", "content-range", "accept-ranges", "etag", "last-modified")


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards requests to `upstream` (host, port), with the injected faults."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.gets: Counter[str] = Counter()  # by the last part of the path
        self.bytes_sent = 0
        self.stalled = threading.Event()  # a request is stalled
        self.go_on = threading.Event()  # ends all stalls
        self._faults: dict[str, deque[str]] = {}
        self._lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Logs nothing: the tests disconnect clients on purpose."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, name: str, *kinds: str) -> None:
        """500, 503, 403, reset, short (fewer bytes than announced), corrupt, stall; ever-… repeats."""
        self._faults.setdefault(name, deque()).extend(kinds)

    def clear(self) -> None:
        self._faults.clear()
        self.gets.clear()
        self.stalled.clear()
        self.go_on.clear()
        self.bytes_sent = 0

    def count(self, path: str) -> str | None:
        """Counts a GET; returns its fault, if any."""
        name = path.partition("?")[0].rpartition("/")[2]
        with self._lock:
            self.gets[name] += 1
            waiting = self._faults.get(name)
            if not waiting:
                return None
            return waiting[0].removeprefix("ever-") if waiting[0].startswith("ever-") else waiting.popleft()

    def shards(self) -> dict[str, int]:
        return {name: count for name, count in self.gets.items() if name.endswith(".tar")}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass_on(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = self.rfile.read(length) if length else None
        fault = self.server.count(self.path) if self.command == "GET" else None
        if fault in ("500", "503", "403"):
            code = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}[fault]
            self._answer(int(fault), {"content-type": "application/xml"}, S3_ERROR.format(code).encode())
            return
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "accept-encoding")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        kept = {name: value for name, value in answer.getheaders() if name.lower() in KEPT and name.lower() != "content-length"}
        announced = int(answer.getheader("content-length") or len(data)) if self.command == "HEAD" else len(data)
        if fault == "corrupt":
            data = data[: len(data) // 2] + bytes(255 - byte for byte in data[len(data) // 2 :])
        if fault in ("reset", "short", "stall"):
            self._answer(answer.status, kept, data[: len(data) // 2], announced)
            self.wfile.flush()
            if fault == "stall":
                self.server.stalled.set()
                self.server.go_on.wait(30)
            if fault == "reset":  # closed with an unsent linger of 0 seconds, a socket sends RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self._answer(answer.status, kept, data, announced)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _answer(self, status: int, headers: dict[str, str], data: bytes, announced: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data) if announced is None else announced))
        self.end_headers()
        self.wfile.write(data)
        self.server.bytes_sent += len(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def _serving(server: http.server.ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """Runs moto's S3 and a proxy, whose url the environment must name as AWS_ENDPOINT_URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port())
    try:
        with _serving(proxy):
            yield proxy
    finally:
        moto.stop()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def web_server(folder: Path) -> Iterator[Proxy]:
    """Runs Python's server of a folder, which ignores byte ranges, and a proxy."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    proxy = Proxy(("127.0.0.1", server.server_port))
    with _serving(server), _serving(proxy):
        yield proxy
