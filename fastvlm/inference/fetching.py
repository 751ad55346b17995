"""Images a request names: data URLs, and http(s) addresses of hosts that the operator allows.

A server that fetches what strangers name can be made to fetch from its own network. So: no scheme but http and https;
only hosts of the allow-list (none by default); the name is resolved once, every address must be public, and the
connection goes to the address that was looked at, under the name for TLS and the Host header; no redirect is followed;
bytes and seconds are bounded.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from urllib.parse import unquote_to_bytes, urlsplit

DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<options>(;[\w=.+-]+)*?)(?P<base64>;base64)?,", re.ASCII)


class ImageFetcher:
    """
    Args:
        hosts: what may be fetched from: `example.org`, `*.example.org`, or `host:port` for another port than the
            scheme's own.
        max_bytes: of one image.
        timeout: seconds for the whole of one image.
        private: allow private and loopback addresses, for a trusted network.
        resolve: name and port -> addresses (`socket.getaddrinfo`).
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

    def __call__(self, url: str) -> bytes:
        """
        Raises:
            ValueError: the address is not allowed, cannot be read, or holds too much.
        """
        if url[:5].lower() == "data:":
            return self._decode(url)
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
        try:
            return self._fetch(parts.scheme, host, port, target)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"image_url: {host[:80]!a} did not give the image ({type(error).__name__})") from None

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

    def _addresses(self, host: str, port: int) -> list[str]:
        found = [info[4][0] for info in self.resolve(host, port, type=socket.SOCK_STREAM)]
        for address in found:
            if not self.private and not is_public(address):
                raise ValueError(f"image_url: host {host[:80]!a} lies in a private network, which is not allowed")
        if not found:
            raise ValueError(f"image_url: host {host[:80]!a} has no address")
        return found

    def _fetch(self, scheme: str, host: str, port: int, target: str) -> bytes:
        deadline = time.monotonic() + self.timeout
        address = self._addresses(host, port)[0]
        plain = socket.create_connection((address, port), timeout=self.timeout)
        connection = http.client.HTTPConnection(host, port, timeout=self.timeout)
        try:
            connection.sock = (
                ssl.create_default_context().wrap_socket(plain, server_hostname=host) if scheme == "https" else plain
            )
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "fastvlm"})
            reply = connection.getresponse()
            if reply.status != 200:
                raise ValueError(f"image_url: {host[:80]!a} answered {reply.status}; redirects are not followed")
            chunks, size = [], 0
            while chunk := reply.read1(1 << 16):
                size += len(chunk)
                if size > self.max_bytes:
                    raise ValueError(f"image_url: an image of more than {self.max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise ValueError(f"image_url: {host[:80]!a} took more than {self.timeout:g} s")
                chunks.append(chunk)
            return b"".join(chunks)
        finally:
            connection.close()
            plain.close()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet; addresses that carry another one inside are looked into."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast
