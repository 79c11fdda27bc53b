"""A stand-in for the Hugging Face Hub on loopback: what the real client and stock diffusers ask of it, in memory.

``Hub`` is the state and may be read and changed by a test while it is served; ``Fault`` spoils chosen answers. What is
not spoken here is answered with 501, so that nothing passes by accident.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.routes import ROUTES, Call
from tests.hub.state import Account, Fault, File, Hub, Refusal, Reply, Repo, Request

__all__ = ["Account", "Fault", "File", "Hub", "Repo", "Request", "environment", "serve"]


class Handler(BaseHTTPRequestHandler):
    """One connection; ``serve`` binds ``hub``."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, self.headers.get("Range"))
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self.hub.fault(self.command, path)
        if fault and fault.cut_after is not None and self.command == "PUT":
            self.rfile.read(fault.cut_after)
            return self.hang_up(fault.reset)
        body = self.read_body()
        if fault and fault.status is not None:
            return self.send(request, Reply(fault.body, fault.status, fault.headers), None)
        with self.hub.lock:
            try:
                reply = self.reply(request, body)
            except Refusal as refusal:
                reply = refusal.reply
        return self.send(request, reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def reply(self, request: Request, body: bytes) -> Reply:
        account = self.account()
        request.user = account.name if account else None
        url = urlsplit(self.path)
        for method, pattern, route in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, url.path)):
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                address = f"http://{self.headers['Host']}"
                return route(
                    Call(
                        self.hub,
                        address,
                        groups,
                        parse_qs(url.query),
                        {name.lower(): value for name, value in self.headers.items()},
                        body,
                        account,
                    )
                )
        raise Refusal(501, None, f"{self.command} {self.path} is not spoken here")

    def account(self) -> Account | None:
        """A token that is unknown is refused everywhere, also where none is needed."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        account = self.hub.accounts.get(given.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return account

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, request: Request, reply: Reply, fault: Fault | None) -> None:
        binary = isinstance(reply.body, bytes)
        body = reply.body if binary else json.dumps(reply.body).encode()
        request.status = reply.status
        self.send_response(reply.status)
        kind = "application/octet-stream" if binary else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.wrong_bytes:
            body = bytes(byte ^ 0xFF for byte in body)
        self.wfile.write(body if fault is None else body[: fault.cut_after])
        if fault and fault.cut_after is not None:
            self.hang_up(fault.reset)

    def hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closed here: the server's own way to close says goodbye before.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serve ``hub`` on a free port of loopback; gives the address."""
    bound = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def environment(address: str, home: Path, token: str | None = None) -> dict[str, str]:
    """This process' environment with the Hub at ``address`` and its caches in ``home``.

    For other processes: the client reads these variables once, when it is imported.
    """
    ours = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    hub = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return kept | hub | ({"HF_TOKEN": token} if token is not None else {})
