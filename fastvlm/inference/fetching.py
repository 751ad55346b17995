"""Load the images of a request: data URLs, and http(s) URLs of hosts on an allow-list.

A server that fetches URLs from clients can be abused to reach its own network (SSRF). Therefore:
* only http and https, and only hosts on the allow-list, which is empty by default;
* a name is resolved once, all its addresses must be public, and the connection goes to one of these addresses, with
  the name used for TLS and the Host header;
* redirects are not followed;
* sizes are limited, and one deadline covers all images of a request: look-ups, connections, headers and bodies.
"""

from __future__ import annotations

import base64
import binascii
import concurrent.futures
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

DATA_URL = re.compile(
    r"(?i:data):(?P<type>[\w.+-]+/[\w.+-]+)?(?P<options>(;[\w=.+-]+)*?)(?P<base64>;base64)?,", re.ASCII
)
NAMES, IMAGES = 8, 16  # concurrent DNS look-ups and image downloads, over all requests


class Deadline:
    """A point in time after which operations time out."""

    def __init__(self, seconds: float):
        self.at = time.monotonic() + seconds

    def left(self) -> float:
        """Return the remaining seconds.

        Raises:
            TimeoutError: the deadline has passed.
        """
        if (seconds := self.at - time.monotonic()) <= 0:
            raise TimeoutError
        return seconds


@dataclass(frozen=True)
class Place:
    """A parsed URL that is allowed."""

    scheme: str
    host: str
    port: int
    target: str


class ImageFetcher:
    """Loads images from data URLs and from allowed hosts.

    Args:
        hosts: the allow-list: `example.org`, `*.example.org`, or `host:port` for ports other than 80 and 443.
        max_bytes: limit of one image.
        timeout: seconds for all images of a request.
        private: allow private and loopback addresses, for a trusted network.
        resolve: name and port -> addresses, with the interface of `socket.getaddrinfo`.
    """

    def __init__(
        self,
        *,
        hosts: Sequence[str] = (),
        max_bytes: int = 10 * 2**20,
        timeout: float = 10.0,
        private: bool = False,
        resolve: Callable = socket.getaddrinfo,
    ):
        self.hosts, self.max_bytes, self.timeout, self.private = tuple(hosts), max_bytes, timeout, private
        self.resolve = resolve
        self._names = ThreadPoolExecutor(NAMES, thread_name_prefix="names")  # look-ups have no timeout of their own
        self._fetches = ThreadPoolExecutor(IMAGES, thread_name_prefix="fetching")

    def __call__(self, url: str) -> bytes:
        """Load one image; see `all`."""
        return self.all([url])[0]

    def all(self, urls: Sequence[str]) -> list[bytes]:
        """Load the images of a request, concurrently, after checking that every URL is allowed.

        Raises:
            ValueError: a URL is invalid or not allowed, an image cannot be loaded or is too large, or time runs out.
        """
        deadline = Deadline(self.timeout)
        found = [self._check(url) if self.is_away(url) else self._decode(url) for url in urls]
        fetches = {i: self._fetches.submit(self._get, p, deadline) for i, p in enumerate(found) if isinstance(p, Place)}
        if not fetches:
            return found
        try:
            waited = concurrent.futures.wait(fetches.values(), deadline.left(), return_when="FIRST_EXCEPTION")
            for i, fetch in sorted(fetches.items(), key=lambda item: item[1] not in waited.done):
                found[i] = self._result(fetch, found[i].host)
        except TimeoutError:
            raise ValueError(f"image_url: the images took more than {self.timeout:g} s") from None
        finally:
            deadline.at = 0.0  # if one failed, the others stop at their next read
            for fetch in fetches.values():
                fetch.cancel()
        return found

    @staticmethod
    def is_away(url: str) -> bool:
        """Return whether a URL must be fetched, i.e. is not a data URL."""
        return url[:5].lower() != "data:"

    def _result(self, fetch: concurrent.futures.Future, host: str) -> bytes:
        try:
            return fetch.result(0)
        except (TimeoutError, concurrent.futures.TimeoutError):
            raise ValueError(f"image_url: {host[:80]!a} took more than {self.timeout:g} s") from None

    def _check(self, url: str) -> Place:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError("image_url: not an address that can be read") from None
        if parts.scheme not in ("http", "https") or not host:
            scheme = parts.scheme[:20] or "none"
            raise ValueError(f"image_url: scheme {scheme!a} is not allowed; use data:image/...;base64, or http(s)")
        if not self.allows(host, port):
            raise ValueError(
                f"image_url: host {host[:80]!a} is not on this server's allow-list; send the image as data"
            )
        if parts.username is not None or parts.password is not None:
            raise ValueError("image_url: names and passwords in an address are not allowed")
        port = port or (443 if parts.scheme == "https" else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or any(c <= " " for c in target):
            raise ValueError("image_url: the path must be percent-encoded")
        return Place(parts.scheme, host, port, target)

    def allows(self, host: str, port: int | None) -> bool:
        host = host.lower().rstrip(".")
        for entry in self.hosts:
            name, colon, wanted = entry.lower().rpartition(":") if entry.count(":") == 1 else (entry.lower(), "", "")
            right_port = str(port) == wanted if colon else port in (None, 80, 443)
            below = name.startswith("*.") and host.endswith(name[1:])
            if right_port and (host == name or below):
                return True
        return False

    def _decode(self, url: str) -> bytes:
        head = DATA_URL.match(url[:200])
        if head is None:
            raise ValueError("image_url: not a data URL; it looks like data:image/png;base64,...")
        if (kind := head["type"] or "").split("/")[0] != "image":
            raise ValueError(f"image_url: a data URL of type {kind or 'text/plain'}, not of an image")
        body = url[head.end() :]
        if len(body) * 3 / 4 > self.max_bytes + 3:
            raise ValueError(f"image_url: an image of more than {self.max_bytes} bytes")
        try:
            data = base64.b64decode(body, validate=True) if head["base64"] else unquote_to_bytes(body)
        except (binascii.Error, ValueError):
            raise ValueError("image_url: its base64 is broken") from None
        if len(data) > self.max_bytes:
            raise ValueError(f"image_url: an image of more than {self.max_bytes} bytes")
        return data

    def _addresses(self, host: str, port: int, deadline: Deadline) -> list[str]:
        asked = self._names.submit(self.resolve, host, port, type=socket.SOCK_STREAM)
        try:
            found = [info[4][0] for info in asked.result(deadline.left())]
        finally:
            asked.cancel()
        for address in found:
            if not self.private and not is_public(address):
                raise ValueError(f"image_url: host {host[:80]!a} lies in a private network, which is not allowed")
        if not found:
            raise ValueError(f"image_url: host {host[:80]!a} has no address")
        return found

    def _get(self, place: Place, deadline: Deadline) -> bytes:
        try:
            return self._fetch(place, deadline)
        except (TimeoutError, concurrent.futures.TimeoutError):
            raise
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            named = f"{place.host[:80]!a} did not give the image ({type(error).__name__})"
            raise ValueError(f"image_url: {named}") from None

    def _fetch(self, place: Place, deadline: Deadline) -> bytes:
        host = place.host
        plain = connect(self._addresses(host, place.port, deadline), place.port, deadline)
        connection = http.client.HTTPConnection(host, place.port)
        try:
            if place.scheme == "https":
                plain.settimeout(deadline.left())
                plain = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            connection.sock = InTime(plain, deadline)
            connection.request("GET", place.target, headers={"Accept": "image/*", "User-Agent": "fastvlm"})
            reply = connection.getresponse()
            if reply.status != 200:
                raise ValueError(f"image_url: {host[:80]!a} answered {reply.status}; redirects are not followed")
            chunks, size = [], 0
            while chunk := reply.read1(1 << 16):
                size += len(chunk)
                if size > self.max_bytes:
                    raise ValueError(f"image_url: an image of more than {self.max_bytes} bytes")
                chunks.append(chunk)
            return b"".join(chunks)
        finally:
            connection.close()
            plain.close()


def connect(addresses: Sequence[str], port: int, deadline: Deadline) -> socket.socket:
    """Connect to the first address that responds; the addresses must have been checked.

    Raises:
        OSError: none responds.
    """
    for number, address in enumerate(addresses, start=1):
        try:
            # Divide the time, so that an unresponsive address leaves some for the next.
            return socket.create_connection((address, port), timeout=deadline.left() / (len(addresses) - number + 1))
        except OSError:
            if number == len(addresses):
                raise
    raise OSError("no address")


class InTime(io.RawIOBase):
    """A socket for `http.client` with one deadline for all reads and writes; a plain timeout restarts at each one."""

    def __init__(self, connection: socket.socket, deadline: Deadline):
        self.connection, self.deadline = connection, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        # A new object: `http.client` closes its socket while the reply is still being read.
        return io.BufferedReader(InTime(self.connection, self.deadline))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.connection.settimeout(self.deadline.left())
        return self.connection.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self.connection.settimeout(self.deadline.left())
        self.connection.sendall(data)


def is_public(address: str) -> bool:
    """Return whether an IP address is publicly routable; IPv4 addresses embedded in IPv6 ones are checked, too."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    # In IPv6 all unassigned or withdrawn ranges are reserved, including ::/96 and the local-use 64:ff9b:1::/48.
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
