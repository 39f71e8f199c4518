"""How is one question put to a server: no proxy, no redirect, in time, and not too long an answer?

http.client is used as it is: it follows no redirect and reads no proxy from the environment.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from med_gradcam.blackbox import short
from med_gradcam.errors import ModelError

MOST_BYTES = 2**29  # of an answer
PIECE = 2**20  # bytes read at a time
TRIES = 5  # of a server that is busy
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
BUSY = (429, 503)
_PLAIN = re.compile(r"[\w\-./%~+@:]+")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is: `secure` (https), host, port, and the path of what is asked there."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def words(self) -> str:
        """Host and port, for people."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def here(self) -> bool:
        """Whether it is this machine."""
        with suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


def address(url: str) -> Address:
    """The parts of an http or https URL.

    Raises:
        ModelError: it is none, or holds a password, a query or odd characters.
    """
    parts = urlsplit(url.removeprefix("kserve+"))
    try:
        port = parts.port
    except ValueError:
        port = -1
    path = parts.path.rstrip("/")
    plain = _PLAIN.fullmatch(path) and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or not plain:
        raise ModelError(
            f"expected a URL such as http://127.0.0.1:8000/v2/models/NAME, got {short(url)!r}."
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise ModelError(
            f"expected a URL without a user, a query or a #, got one of {parts.hostname!r} with; "
            f"leave that out."
        )
    secure = parts.scheme == "https"
    return Address(secure, parts.hostname, port or (443 if secure else 80), path)


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What a server answered; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Wire:
    """A server that is asked one question at a time, each answered within `timeout_s`."""

    address: Address
    timeout_s: float = 60.0

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """The answer; a server that is busy (503, 429) is asked again, after a while.

        Raises:
            ModelError: no answer in time, a redirect, an answer that is too long, or busy for long.
        """
        wait = FIRST_WAIT_S
        for turn in range(TRIES):
            reply = self._once(method, path, body, dict(headers or {}))
            if reply.status not in BUSY:
                return reply
            if turn < TRIES - 1:
                time.sleep(min(max(wait, _asked_wait(reply)), LONGEST_WAIT_S))
                wait *= 2
        raise ModelError(
            f"expected an answer from the server {self.address.words}, it was busy {TRIES} times "
            f"({reply.status}); try again later, or with a smaller batch."
        )

    def _once(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        connection = kind(self.address.host, self.address.port, timeout=self.timeout_s)
        late = threading.Event()
        try:
            connection.connect()
            guard = threading.Timer(self.timeout_s, _hang_up, [connection.sock, late])
            guard.daemon = True
            guard.start()
            try:
                connection.request(method, path, body or None, headers)
                with connection.getresponse() as response:
                    reply = self._read(response)
            finally:
                guard.cancel()
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error, late=late.is_set()) from error
        finally:
            connection.close()
        if late.is_set():
            raise self._failed(TimeoutError(), late=True)
        return reply

    def _read(self, response: http.client.HTTPResponse) -> Reply:
        if 300 <= response.status < 400:
            raise ModelError(
                f"expected an answer from the server {self.address.words}, got a redirect "
                f"({response.status}) to {short(response.headers.get('Location', 'nowhere'))!r}, "
                f"which is not followed; name the place itself."
            )
        if (response.length or 0) > MOST_BYTES:
            raise self._too_long(f"{response.length} bytes")
        pieces, size = [], 0
        while piece := response.read(PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_BYTES:
                raise self._too_long("more")
        if response.length:  # the end of the line came before that of the answer
            raise http.client.IncompleteRead(b"", response.length)
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Reply(response.status, headers, b"".join(pieces))

    def _too_long(self, got: str) -> ModelError:
        return ModelError(
            f"expected at most {MOST_BYTES} bytes from the server {self.address.words}, got {got}; "
            f"is this the model's own address?"
        )

    def _failed(self, error: BaseException, *, late: bool) -> ModelError:
        where = self.address.words
        if late or isinstance(error, TimeoutError):
            return ModelError(
                f"expected an answer from the server {where} within {self.timeout_s:g} s, got "
                f"none; is it at work? Its timeout_s can be raised."
            )
        if isinstance(error, ConnectionRefusedError):
            return ModelError(
                f"expected a server at {where}, nothing answers there; is it running?"
            )
        why = short(str(error)) or type(error).__name__
        return ModelError(
            f"expected an answer from the server {where}, the connection failed: {why}."
        )


def _asked_wait(reply: Reply) -> float:
    """Seconds that a busy server asks for."""
    text = reply.headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0


def _hang_up(line: socket.socket, late: threading.Event) -> None:
    """End a conversation whose time is over, whatever it waits for."""
    late.set()
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
