"""Download one file over https, or say in one sentence why that failed."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from persodpo.errors import PersodpoError
from persodpo.runfolder import RELEASE_VARIABLE

#: Longest silence of a server before the download is given up.
TIMEOUT_SECONDS = 60.0
_CHUNK = 1 << 16


def download(url: str, path: Path, limit: int, progress: bool) -> None:
    """Stream ``url`` into the file ``path``.

    Args:
        url: An https:// address; http:// only if this machine serves it.
        path: The file to write; what is in it when this fails is of no use.
        limit: Bytes after which the download is given up.
        progress: Show a progress bar.

    Raises:
        PersodpoError: The address is not allowed, or the network or the server failed.
        OSError: ``path`` cannot be written.
    """
    # A proxy would carry a plain http:// request off this machine.
    proxies = [urllib.request.ProxyHandler({})] if _require_safe(url) else []
    opener = urllib.request.build_opener(_SafeRedirects, *proxies)
    with _network(url):
        response = opener.open(url, timeout=TIMEOUT_SECONDS)
    length = response.headers.get("Content-Length") or ""
    expected = int(length) if length.isdecimal() else None
    bar = tqdm(total=expected, desc="downloading", unit="B", unit_scale=True, disable=not progress)
    with response, path.open("wb") as file, bar:
        while True:
            with _network(url):
                chunk = response.read(_CHUNK)
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > limit:
                raise _failed(url, f"it is larger than {limit:,} bytes, which the release is not")
        if expected is not None and file.tell() != expected:
            raise _failed(url, f"the connection closed after {file.tell():,} of {expected:,} bytes")


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _require_safe(url: str) -> bool:
    """Refuse addresses that others could read or change on the way; return whether this machine serves it."""
    try:
        scheme, host = urlsplit(url).scheme.lower(), urlsplit(url).hostname or ""
    except ValueError:
        scheme, host = "", ""
    local = _is_loopback(host)
    if not host or scheme not in ("http", "https") or (scheme == "http" and not local):
        raise PersodpoError(f"{url} is no https:// address (http:// is for this machine only); name one or a file.")
    return local


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(  # noqa: PLR0917 (the signature is the standard library's)
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if _require_safe(newurl) and not _require_safe(req.full_url):
            raise PersodpoError(f"{req.full_url} points back to this machine ({newurl}); name another source.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _network(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(error, urllib.error.HTTPError):
            why = f"the server answered {error.code} {error.reason}"
            error.close()
        elif isinstance(reason, socket.gaierror):
            why = "its host cannot be found, there is no network or the name is wrong"
        elif isinstance(reason, TimeoutError):
            why = f"no answer for {TIMEOUT_SECONDS:g} s"
        else:
            why = str(reason) or type(reason).__name__
        raise _failed(url, why) from error


def _failed(url: str, why: str) -> PersodpoError:
    return PersodpoError(
        f"Downloading {url} failed: {why}; try again, or name a copy of the release as source or in {RELEASE_VARIABLE}."
    )
