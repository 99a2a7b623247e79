"""Fetching the published files: right bytes, nothing twice, and one sentence for everything that can go wrong.

Faults are real ones: a loopback server that hangs or breaks off, hostile archives, the kernel's own "no space left",
killed processes. Only name resolution is stubbed, because how long a lookup takes to fail is the network's business.
"""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import file_size_limit

from persodpo.errors import PersodpoError
from persodpo.release import download, sources
from persodpo.release.fetch import FetchReport, fetch_release, release_files
from persodpo.runfolder import RELEASE_VARIABLE

CONTENT = {
    "Evaluations/FoCus-results.xlsx": b"PK results",
    "Metrics Results/FoCus/GPT 4-train.xlsx": bytes(range(256)) * 700,
    "Prompts/FoCus-train.csv": "Prompt\n\u2019a\u2019\r\n".encode() * 300,
    "Prompts/FoCus-valid.csv": b"",
}
LARGEST = "Metrics Results/FoCus/GPT 4-train.xlsx"
TRAIN = "Prompts/FoCus-train.csv"
TOP = "PersoDPO-4f86cad/"
Handler = http.server.BaseHTTPRequestHandler


def write(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def packed(content: dict[str, bytes], top: str = "", extra: tarfile.TarInfo | None = None) -> bytes:
    """Return a .tar.gz; the extra member comes last, so that all before it could have been written."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(top + name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        if extra:
            tar.addfile(extra)
    return buffer.getvalue()


def zipped(content: dict[str, bytes], top: str = "", extra: zipfile.ZipInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in content.items():
            bundle.writestr(top + name, data)
        if extra:
            bundle.writestr(extra, b"/etc/passwd")
    return buffer.getvalue()


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file below ``folder``, hidden ones too, with its bytes and the time it was written."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@dataclass
class Release:
    """A small release in a folder of its own, so that anything left beside the target is noticed."""

    home: Path

    @property
    def target(self) -> Path:
        return self.home / "data" / "release"

    @property
    def folder(self) -> Path:
        return self.home / "published"

    @property
    def manifest(self) -> Path:
        return self.home / "manifest.json"

    def archive(self, data: bytes, name: str = "release.tar.gz") -> str:
        (self.home / name).write_bytes(data)
        return str(self.home / name)

    def fetch(self, source: object = None) -> FetchReport:
        return fetch_release(
            self.target, None if source is None else str(source), progress=False, manifest=self.manifest
        )

    def refusal(self, source: object = None) -> str:
        """Fetch, and check that it is refused in one sentence and leaves everything as it was; return the sentence."""
        before, folders = snapshot(self.home), {path for path in self.home.rglob("*") if path.is_dir()}
        with pytest.raises(PersodpoError) as caught:
            self.fetch(source)
        assert snapshot(self.home) == before
        assert {path for path in self.home.rglob("*") if path.is_dir()} == folders
        message = str(caught.value)
        assert message.endswith(".")
        assert "\n" not in message
        return message

    def assert_complete(self) -> None:
        assert {name: data for name, (data, _) in snapshot(self.target).items()} == CONTENT
        assert [path.name for path in self.target.parent.iterdir()] == ["release"]


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    monkeypatch.delenv(RELEASE_VARIABLE, raising=False)
    made = Release(tmp_path / "home")
    write(made.folder, CONTENT)
    files = [{"path": n, "bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in CONTENT.items()]
    manifest = {"repository": "https://github.com/someone/PersoDPO", "commit": "4f86cad", "files": files}
    made.manifest.write_text(json.dumps(manifest), encoding="utf-8")
    return made


@dataclass
class Server:
    """A loopback server whose answer a test chooses; it counts requests and lets hung answers go at the end."""

    url: str = ""
    answer: Callable[[Handler], None] = lambda _: None
    requests: list[str] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def send(self, body: bytes, status: int = 200, **headers: object) -> None:
        self.answer = lambda handler: start(handler, body, status, **{"Content-Length": len(body), **headers})

    def send_half_and_hang(self, body: bytes) -> None:
        def answer(handler: Handler) -> None:
            start(handler, body[: len(body) // 2], **{"Content-Length": len(body)})
            self.started.set()
            self.over.wait(20)

        self.answer = answer


def start(handler: Handler, body: bytes, status: int = 200, **headers: object) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Answers(Handler):
        def do_GET(self) -> None:  # noqa: N802
            state.requests.append(self.path)
            state.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as listening:
        listening.daemon_threads = True
        state.url = f"http://127.0.0.1:{listening.server_address[1]}/archive.tar.gz"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield state
        state.over.set()
        listening.shutdown()
        thread.join()


# ---------------------------------------------------------------------------------------------- what it brings in


def test_folder_is_copied_byte_for_byte(release: Release) -> None:
    report = release.fetch(release.folder)
    release.assert_complete()
    assert (report.files, report.downloaded, report.bytes) == (4, 4, sum(map(len, CONTENT.values())))
    assert str(report) == f"release: 4 of 4 files (0.2 MB) fetched into {release.target}, all verified"


def test_environment_names_the_source_unless_one_is_given(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RELEASE_VARIABLE, str(release.home / "gone"))
    assert f"gone (from {RELEASE_VARIABLE}) does not exist" in release.refusal()
    release.fetch(release.folder)
    shutil.rmtree(release.target)
    monkeypatch.setenv(RELEASE_VARIABLE, str(release.folder))
    release.fetch()
    release.assert_complete()


@pytest.mark.parametrize("pack", [packed, zipped])
@pytest.mark.parametrize("top", ["", "./", TOP, "./" + TOP])
def test_archive_with_or_without_a_folder_on_top(
    release: Release, pack: Callable[[dict[str, bytes], str], bytes], top: str
) -> None:
    others = {"README.md": b"# PersoDPO", "UniEval/Prompts/FoCus-train.csv": b"not the published one"}
    assert release.fetch(release.archive(pack({**others, **CONTENT}, top), "release.bin")).downloaded == 4
    release.assert_complete()


@pytest.mark.parametrize("pack", [packed, zipped])
def test_second_run_asks_the_server_for_nothing(
    release: Release, server: Server, pack: Callable[[dict[str, bytes], str], bytes]
) -> None:
    server.send(pack(CONTENT, TOP))
    assert release.fetch(server.url).downloaded == 4
    release.assert_complete()
    before = snapshot(release.target)
    again = release.fetch(server.url)
    assert (again.downloaded, again.bytes) == (0, 0)
    assert str(again) == f"release: all 4 files are in {release.target}, nothing downloaded"
    assert snapshot(release.target) == before
    assert server.requests == ["/archive.tar.gz"]


def test_only_damaged_and_missing_files_are_replaced(release: Release) -> None:
    release.fetch(release.folder)
    write(release.target, {TRAIN: b"x" * len(CONTENT[TRAIN]), "notes/mine.txt": b"keep"})
    (release.target / LARGEST).unlink()
    before = snapshot(release.target)
    report = release.fetch(release.folder)
    assert (report.downloaded, report.bytes) == (2, len(CONTENT[TRAIN]) + len(CONTENT[LARGEST]))
    after = snapshot(release.target)
    assert {name: data for name, (data, _) in after.items()} == {**CONTENT, "notes/mine.txt": b"keep"}
    assert {name for name in before if before[name] != after[name]} == {TRAIN}


def test_target_may_be_a_link_to_another_place(release: Release) -> None:
    elsewhere = release.home / "scratch" / "files"
    release.target.parent.mkdir()
    release.target.symlink_to(elsewhere)
    release.fetch(release.folder)
    assert release.target.is_symlink()
    assert {name: data for name, (data, _) in snapshot(elsewhere).items()} == CONTENT


def test_progress_is_shown_only_when_wanted(
    release: Release, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    release.fetch(release.folder)
    assert capfd.readouterr() == ("", "")
    server.send(packed(CONTENT))
    for source, word in ((str(release.folder), "copying"), (server.url, "downloading")):
        shutil.rmtree(release.target)
        fetch_release(release.target, source, manifest=release.manifest)
        assert word in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ sources at fault


def test_wrong_bytes_leave_the_earlier_copy_alone(release: Release) -> None:
    wrong = {**CONTENT, TRAIN: b"x" * len(CONTENT[TRAIN])}
    write(release.target, {**CONTENT, LARGEST: b"an older version", TRAIN: b"mine"})
    found, expected = (hashlib.sha256(content[TRAIN]).hexdigest() for content in (wrong, CONTENT))
    for source in (write(release.home / "wrong", wrong), release.archive(packed(wrong))):
        message = release.refusal(source)
        for part in (f"'{TRAIN}' from {source}", f"found sha256 {found}", f"sha256 {expected}"):
            assert part in message


def test_source_that_lacks_files(release: Release) -> None:
    part = {name: data for name, data in CONTENT.items() if not name.startswith("Prompts")}
    for source in (write(release.home / "part", part), release.archive(zipped(part), "part.zip")):
        assert f"{source} lacks '{TRAIN}' and 1 other files" in release.refusal(source)
    assert "lacks 'Evaluations/FoCus-results.xlsx' and 3" in release.refusal(release.archive(packed({"a": b""})))


def test_source_that_does_not_exist(release: Release) -> None:
    assert "/nowhere/at/all does not exist; name a folder" in release.refusal("/nowhere/at/all")


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9])
@pytest.mark.parametrize("pack", [packed, zipped])
def test_archive_cut_short(release: Release, share: float, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    data = pack(CONTENT)
    source = release.archive(data[: int(len(data) * share)])
    assert f"{source} cannot be unpacked as a .tar.gz or .zip archive" in release.refusal(source)


def test_archive_that_is_something_else(release: Release) -> None:
    assert "cannot be unpacked" in release.refusal(release.archive(b"<html>Please sign in</html>"))
    assert "cannot be unpacked" in release.refusal(release.archive(b"\x1f\x8b no gzip after all"))


def link(kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo("PersoDPO/shortcut")
    entry.type, entry.linkname = kind, "/etc/passwd"
    return entry


def zip_link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("PersoDPO/shortcut")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    return entry


@pytest.mark.parametrize("name", ["../evil", TOP + "../../evil", "/tmp/evil", "..\\evil", "C:/evil", "C:evil"])  # noqa: S108
@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_archive_that_reaches_outside_is_refused(release: Release, name: str, kind: str) -> None:
    if kind == "zip":
        source = release.archive(zipped(CONTENT, extra=zipfile.ZipInfo(name)), "release.zip")
    else:
        source = release.archive(packed(CONTENT, extra=tarfile.TarInfo(name)))
    assert f"refused because its member {name!r} lies outside" in release.refusal(source)
    assert not Path("/tmp/evil").exists()  # noqa: S108


@pytest.mark.parametrize(
    "data",
    [
        *(
            packed(CONTENT, extra=link(k))
            for k in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        ),
        zipped(CONTENT, extra=zip_link()),
    ],
    ids=["symlink", "hard link", "device", "fifo", "symlink in zip"],
)
def test_archive_with_links_or_devices_is_refused(release: Release, data: bytes) -> None:
    assert "its member 'PersoDPO/shortcut' is a link or a device" in release.refusal(release.archive(data))


@pytest.mark.parametrize("pack", [packed, zipped])
def test_bomb_in_a_published_file_fills_no_disk(release: Release, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    source = release.archive(pack({**CONTENT, TRAIN: bytes(30_000_000)}))
    with file_size_limit(1_000_000):  # writing more would fail with another sentence
        assert f"'{TRAIN}' from {source} is not the published file (found more than" in release.refusal(source)


def test_bomb_beside_the_published_files_is_not_unpacked(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LIMIT_BYTES", 5_000_000)
    assert "unpacks to more than 5,000,000 bytes" in release.refusal(
        release.archive(packed({"zeros": bytes(9_000_000)}))
    )
    header = tarfile.TarInfo("name")
    header.pax_headers = {"comment": "0" * 9_000_000}
    assert "unpacks to more than 5,000,000 bytes" in release.refusal(release.archive(packed({}, extra=header)))


# ------------------------------------------------------------------------------------------------ network at fault


def test_server_that_answers_with_an_error(release: Release, server: Server) -> None:
    server.send(b"not here", status=404)
    message = release.refusal(server.url)
    assert f"Downloading {server.url} failed: the server answered 404 Not Found" in message
    assert RELEASE_VARIABLE in message


def test_connection_that_breaks_off(release: Release, server: Server) -> None:
    body = packed(CONTENT)
    server.answer = lambda handler: start(handler, body[:100], **{"Content-Length": len(body)})
    assert f"the connection closed after 100 of {len(body):,} bytes" in release.refusal(server.url)
    server.answer = lambda handler: start(handler, b"fff\r\nabc", **{"Transfer-Encoding": "chunked"})
    assert "IncompleteRead" in release.refusal(server.url)
    server.answer = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    assert "without response" in release.refusal(server.url)


def test_server_that_hangs(release: Release, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    began = time.monotonic()
    server.send_half_and_hang(packed(CONTENT))
    assert "no answer for 0.2 s" in release.refusal(server.url)
    server.answer = lambda _: server.over.wait(20) and None
    assert "no answer for 0.2 s" in release.refusal(server.url)
    assert time.monotonic() - began < 4


def test_connection_refused(release: Release) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: nobody else can take the port
        assert "Connection refused" in release.refusal(f"http://127.0.0.1:{unused.getsockname()[1]}/a.zip")


def test_without_network_the_pinned_address_is_named(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_answer)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    message = release.refusal()
    assert "https://github.com/someone/PersoDPO/archive/4f86cad.tar.gz failed: its host cannot be found" in message


def test_download_without_end_is_given_up(release: Release, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LIMIT_BYTES", 100_000)
    server.answer = lambda handler: start(handler, bytes(1_000_000))
    assert "larger than 100,000 bytes" in release.refusal(server.url)


@pytest.mark.parametrize(
    "url", ["http://example.org/a.zip", "ftp://127.0.0.1/a.zip", "file:///etc/passwd", "https:///a.zip", "http://[::/a"]
)
def test_unsafe_addresses_are_refused(release: Release, url: str) -> None:
    assert f"{url} is no https:// address" in release.refusal(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.org/a.zip", "http://example.org/a.zip is no https:// address"),
        ("ftp://127.0.0.1/a.zip", "ftp://127.0.0.1/a.zip is no https:// address"),
        ("file:///etc/passwd", "answered 302 Found - Redirection to url 'file:///etc/passwd' is not allowed"),
    ],
)
def test_redirects_to_unsafe_addresses_are_refused(release: Release, server: Server, url: str, why: str) -> None:
    server.send(b"", status=302, Location=url)
    assert why in release.refusal(server.url)
    assert len(server.requests) == 1


def test_redirect_to_a_safe_address_is_followed(release: Release, server: Server) -> None:
    def answer(handler: Handler) -> None:
        if handler.path == "/moved":
            start(handler, packed(CONTENT))
        else:
            start(handler, b"", 302, Location="/moved")

    server.answer = answer
    release.fetch(server.url)
    release.assert_complete()


def test_loopback_request_does_not_leave_through_a_proxy(
    release: Release, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server.send(packed(CONTENT))
    assert release.fetch(server.url).downloaded == 4


# --------------------------------------------------------------------------------------------------- disk at fault


def test_write_refused_by_the_kernel(release: Release, server: Server) -> None:
    write(release.target, {TRAIN: b"mine"})
    server.send(packed({**CONTENT, "other": os.urandom(200_000)}))
    with file_size_limit(100_000):
        assert f"{release.target} cannot be filled" in release.refusal(release.folder)
        assert f"{release.target} cannot be filled" in release.refusal(server.url)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, the kernel's full disk, is Linux's")
@pytest.mark.parametrize("full", ["archive", "FoCus-train.csv"])
def test_full_disk(release: Release, server: Server, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    """The staged file is swapped for /dev/full, so that the error is the kernel's."""
    really_open = Path.open

    def open_full(path: Path, mode: str = "r", *rest: object, **named: object) -> object:
        swapped = Path("/dev/full") if mode == "wb" and path.name == full else path
        return really_open(swapped, mode, *rest, **named)

    write(release.target, {TRAIN: b"mine"})
    server.send(packed(CONTENT))
    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(PersodpoError, match=r"The disk holding .* is full; free some space"):
        release.fetch(server.url)
    monkeypatch.undo()
    assert snapshot(release.target).keys() == {TRAIN}
    assert [path.name for path in release.target.parent.iterdir()] == ["release"]


def test_full_disk_that_is_a_mount_of_its_own(release: Release) -> None:
    """A real disk of 64 KB mounted as the target, in a mount namespace that ends with the process."""
    release.target.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size=64k tmpfs '{release.target}'"
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*namespace, mount], capture_output=True, check=False).returncode:
        pytest.skip("needs Linux that lets this user mount a tmpfs in a namespace of its own")
    code = f"""
from pathlib import Path
from persodpo.errors import PersodpoError
from persodpo.release.fetch import fetch_release
target = Path({str(release.target)!r})
(target / 'Prompts').mkdir()
(target / 'Prompts/FoCus-train.csv').write_text('mine')
try:
    fetch_release(target, {str(release.folder)!r}, False, manifest=Path({str(release.manifest)!r}))
except PersodpoError as error:
    print(error)
print(sorted(str(path.relative_to(target)) for path in target.rglob('*')))
"""
    command = [*namespace, f"{mount} && exec '{sys.executable}' -c \"$0\"", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert f"The disk holding {release.target} is full" in done.stdout
    assert done.stdout.endswith("['Prompts', 'Prompts/FoCus-train.csv']\n")


def test_target_that_cannot_be_written(release: Release) -> None:
    target = Path("/sys/persodpo/release")  # nobody may make folders there, not even root
    if sys.platform != "linux":
        pytest.skip("/sys is Linux's")
    with pytest.raises(PersodpoError, match=r"/sys/persodpo/release cannot be written .*choose another folder"):
        fetch_release(target, str(release.folder), False, manifest=release.manifest)


def test_target_or_its_parent_is_a_file(release: Release) -> None:
    write(release.home, {"data/release": b"a file"})
    assert f"{release.target} is a file" in release.refusal(release.folder)
    shutil.rmtree(release.home / "data")
    write(release.home, {"data": b"a file"})
    assert f"{release.target} cannot be filled" in release.refusal(release.folder)


def test_files_already_moved_are_put_back_when_one_cannot_be(release: Release) -> None:
    write(release.target, {"Evaluations/FoCus-results.xlsx": b"mine", f"{TRAIN}/in the way": b"a folder"})
    os.utime(release.target / "Evaluations/FoCus-results.xlsx", ns=(1, 1))
    assert f"{release.target} cannot be filled" in release.refusal(release.folder)


# ---------------------------------------------------------------------------------- interrupted, killed and rivalled


def run_fetch(release: Release, source: object, before: str = "") -> subprocess.Popen[bytes]:
    code = f"""
import os, signal
from pathlib import Path
from persodpo.release.fetch import fetch_release
{before}
fetch_release(Path({str(release.target)!r}), {str(source)!r}, False, manifest=Path({str(release.manifest)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code])


def test_killed_while_downloading(release: Release, server: Server) -> None:
    write(release.target, {TRAIN: b"mine"})
    before = snapshot(release.target)
    server.send_half_and_hang(packed(CONTENT))
    with run_fetch(release, server.url) as process:
        assert server.started.wait(20)
        until = time.monotonic() + 10
        while not list(release.target.parent.glob(".*/archive")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert snapshot(release.target) == before
    assert len(list(release.target.parent.iterdir())) == 2, "the killed run left its temporary folder"
    release.fetch(release.folder)
    release.assert_complete()


def test_killed_while_moving_files_into_place(release: Release) -> None:
    earlier = dict.fromkeys(CONTENT, b"older")
    write(release.target, earlier)
    kill_at_third = """
moves, replace = [], Path.replace
def counted(path, target):
    moves.append(path)
    if len(moves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)
Path.replace = counted
"""
    assert run_fetch(release, release.folder, kill_at_third).wait(30) == -signal.SIGKILL
    left = {name: data for name, (data, _) in snapshot(release.target).items()}
    assert left.keys() == CONTENT.keys()
    assert [left[name] == CONTENT[name] for name in sorted(CONTENT)] == [True, True, False, False]
    assert all(left[name] in (earlier[name], CONTENT[name]) for name in CONTENT)
    assert release.fetch(release.folder).downloaded == 2
    release.assert_complete()


def test_leftovers_are_cleared_even_if_nothing_is_needed(release: Release) -> None:
    release.fetch(release.folder)
    write(release.target.parent / ".release.fetch", {"archive": b"half", "files/Prompts/stale.csv": b"old"})
    assert release.fetch(release.folder).downloaded == 0
    release.assert_complete()


def test_leftovers_do_not_slip_into_the_target(release: Release) -> None:
    write(release.target.parent / ".release.fetch", {"archive": b"half", "files/Prompts/stale.csv": b"old"})
    release.fetch(release.folder)
    release.assert_complete()


def test_interrupt_leaves_nothing_behind(release: Release, server: Server) -> None:
    def answer(handler: Handler) -> None:
        start(handler, b"half", **{"Content-Length": 100})
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        server.over.wait(20)

    write(release.target, {TRAIN: b"mine"})
    before, server.answer = snapshot(release.home), answer
    with pytest.raises(KeyboardInterrupt):
        release.fetch(server.url)
    assert snapshot(release.home) == before
    assert [path.name for path in release.target.parent.iterdir()] == ["release"]


def test_two_fetches_at_once_do_not_mix(release: Release, server: Server) -> None:
    refused: list[str] = []

    def answer(handler: Handler) -> None:
        try:
            release.fetch(release.folder)
        except PersodpoError as error:
            refused.append(str(error))
        start(handler, packed(CONTENT))

    server.answer = answer
    release.fetch(server.url)
    release.assert_complete()
    assert re.search(r"Another fetch is at work in .*\.release\.fetch; wait", refused[0])


# ---------------------------------------------------------------------------------------- manifest and release_files


@pytest.mark.parametrize(
    "text",
    [
        "{not json",
        "[]",
        '{"repository": "r", "commit": "c"}',
        '{"repository": "r", "commit": "c", "files": []}',
        '{"repository": "r", "commit": "c", "files": [{"path": "a", "sha256": "0"}]}',
        '{"repository": "r", "commit": "c", "files": [{"path": "../a", "bytes": 1, "sha256": "0"}]}',
    ],
)
def test_manifest_that_cannot_be_read(release: Release, text: str) -> None:
    release.manifest.write_text(text, encoding="utf-8")
    assert f"The manifest {release.manifest} cannot be read" in release.refusal(release.folder)


def test_manifest_that_is_missing(release: Release) -> None:
    release.manifest.unlink()
    assert f"The manifest {release.manifest} cannot be read" in release.refusal(release.folder)


def test_release_files_gives_every_path_or_the_command_that_helps(release: Release) -> None:
    with pytest.raises(PersodpoError, match=r"lacks 'Eval.*' and 3 other files .*`persodpo fetch release`"):
        release_files(release.target, manifest=release.manifest)
    release.fetch(release.folder)
    files = release_files(release.target, manifest=release.manifest)
    assert files == {name: release.target / name for name in CONTENT}
    files[TRAIN].write_bytes(b"shorter")
    with pytest.raises(PersodpoError, match=f"lacks '{TRAIN}' of the release, or holds it with another size"):
        release_files(release.target, manifest=release.manifest)


REAL = os.environ.get(RELEASE_VARIABLE)


@pytest.mark.skipif(not REAL, reason=f"{RELEASE_VARIABLE} is not set: the published files are not on this machine")
def test_the_published_files_themselves(tmp_path: Path) -> None:
    target = tmp_path / "release"
    assert fetch_release(target, REAL, progress=False).downloaded == 42
    assert sum(path.stat().st_size for path in release_files(target).values()) == 20_803_101
    assert fetch_release(target, REAL, progress=False).downloaded == 0
