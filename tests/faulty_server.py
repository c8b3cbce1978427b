"""An HTTP server on loopback that serves a folder and misbehaves as it is told.

with FaultyServer(folder, [Fault("a.tar", "reset", times=2)]) as server:
    server.url("a.tar")
python tests/faulty_server.py FOLDER --port 0 --faults '[{"path": "a.tar", "kind": "503"}]'
"""

import argparse
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

KINDS = ("reset", "stall", "trickle", "cut", "missing")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with requests of one file.

    Args:
        path: Inside the folder. None = any.
        kind: A status such as "503"; "missing": 404 for good; after half of the body "reset": the
            connection breaks, "stall": nothing more comes, "cut": the connection ends; "trickle":
            ten bytes a second.
        times: Requests that it meets; later ones are served.
        offset: Only requests of ranges that hold this byte. None = all.
        client: Only requests from this address. None = all.
        seconds: For so long after its first, instead of `times`. None = by `times`.
    """

    path: str | None
    kind: str
    times: int = 1
    offset: int | None = None
    client: str | None = None
    seconds: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS and not re.fullmatch(r"[45]\d\d", self.kind):
            raise ValueError(f"kind={self.kind!r}: wanted a status or {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Request:
    """A request; `kind` is the fault that met it and `span` what it asked for, last included."""

    path: str
    kind: str | None
    span: tuple[int, int] | None


class FaultyServer:
    """Serves a folder in threads, with keep-alive.

    `/PATH` is the file, `/redirect/PATH` sends there, `/away/PORT/PATH` to another server.

    Args:
        folder: What to serve.
        faults: Tried in their order; the first that fits a request meets it.
        ranges: Whether Range is obeyed.
        rate: {kind: n}: every n-th request of all meets it, where no fault does.
        port: 0 = any free one.
        host: Address to serve at.
        log: File that gets each request as a line of JSON.
        retry_after: Header of answers with a status that is a fault.
    """

    def __init__(
        self,
        folder: Path,
        faults: Sequence[Fault] = (),
        ranges: bool = True,
        rate: Mapping[str, int] | None = None,
        port: int = 0,
        log: Path | None = None,
        host: str = "127.0.0.1",
        retry_after: str | None = None,
    ):
        self.folder, self.ranges, self.stopped = Path(folder).resolve(), ranges, threading.Event()
        self.requests: list[Request] = []
        self.headers: list[dict[str, str]] = []  # of each request
        self.retry_after = retry_after
        self._left = [[fault, fault.times] for fault in faults]
        self._rate, self._log, self._lock = dict(rate or {}), log, threading.Lock()
        self._until: dict[int, float] = {}
        self._server = _Server((host, port), _Handler)
        self._server.owner, self._server.connections = self, []

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def num_connections(self) -> int:
        return len(self._server.connections)

    @property
    def log(self) -> list[Request]:
        """The requests that met a fault."""
        return [request for request in self.requests if request.kind]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{quote(path)}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self._server.shutdown()
        for connection in self._server.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def meet(self, path: str, span: tuple[int, int] | None, client: str = "") -> str | None:
        """Note a request and return the fault that meets it."""
        with self._lock:
            number = len(self.requests) + 1
            kind = next((k for k, every in self._rate.items() if number % every == 0), None)
            for i, entry in enumerate(self._left):
                fault, left = entry
                here = fault.offset is None or span is None or span[0] <= fault.offset <= span[1]
                here = here and fault.client in (None, client)
                if here and fault.seconds is not None and fault.path in (None, path):
                    now = time.monotonic()
                    left = now < self._until.setdefault(i, now + fault.seconds)
                if fault.path in (None, path) and here and (left or fault.kind == "missing"):
                    kind, entry[1] = fault.kind, left - 1
                    break
            request = Request(path, kind, span)
            self.requests.append(request)
            if self._log:
                with open(self._log, "a") as file:
                    file.write(json.dumps(vars(request)) + "\n")
        return kind


class _Server(ThreadingHTTPServer):
    owner: FaultyServer
    connections: list[socket.socket]
    request_queue_size = 128

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request, client_address):
        pass  # clients that leave


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        owner = self.server.owner
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        if path.startswith("redirect/"):
            return self._answer(302, {"Location": f"/{quote(path.removeprefix('redirect/'))}"})
        if path.startswith("away/"):
            _, port, rest = path.split("/", 2)
            return self._answer(302, {"Location": f"http://localhost:{port}/{quote(rest)}"})
        owner.headers.append(dict(self.headers))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        span = None
        if asked and owner.ranges:
            span = int(asked[1]), int(asked[2]) if asked[2] else 1 << 62
        kind = owner.meet(path, span, self.client_address[0])
        file = (owner.folder / path).resolve()
        if kind == "missing" or not (file.is_relative_to(owner.folder) and file.is_file()):
            return self._answer(404)
        if kind and kind.isdigit():
            told = {} if owner.retry_after is None else {"Retry-After": owner.retry_after}
            return self._answer(int(kind), told)
        size = file.stat().st_size
        if span is None:
            return self._serve(200, {"Accept-Ranges": "none"}, file, 0, size, kind)
        start, end = span[0], min(span[1] + 1, size)
        if start >= size:
            return self._answer(416, {"Content-Range": f"bytes */{size}"})
        told = {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        return self._serve(206, told, file, start, end, kind)

    def _answer(self, status, headers=(), length=0):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": length}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _serve(self, status, headers, path, start, end, kind):
        self._answer(status, headers, end - start)
        self.close_connection = self.close_connection or kind is not None
        with open(path, "rb") as file:
            file.seek(start)
            if kind == "trickle":
                for _ in range(start, end):
                    self.wfile.write(file.read(1))
                    if self.server.owner.stopped.wait(0.1):
                        break
                return
            left = (end - start) // 2 if kind else end - start
            while left:
                part = file.read(min(left, 1 << 20))
                self.wfile.write(part)
                left -= len(part)
        if kind == "stall":
            self.server.owner.stopped.wait()
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--faults", type=json.loads, default=[], help="JSON: fields of Fault")
    parser.add_argument("--rate", type=json.loads, default={}, help='JSON: {"reset": 20}')
    parser.add_argument("--no-ranges", action="store_true")
    parser.add_argument("--log", type=Path, help="gets each request as a line of JSON")
    args = parser.parse_args()
    faults = [Fault(**fields) for fields in args.faults]
    with FaultyServer(
        args.folder, faults, not args.no_ranges, args.rate, args.port, args.log, args.host
    ) as server:
        print(server.port, flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
