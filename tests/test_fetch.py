"""Fetching the published files: right bytes, nothing twice, no half files, and one sentence for what goes wrong."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pooch
import pytest
import requests

from persodpo.errors import PersodpoError
from persodpo.files import RELEASE_VARIABLE
from persodpo.release.fetch import fetch_release, release_files

CONTENT = {
    "Metrics Results/FoCus/GPT 4.xlsx": bytes(range(256)) * 700,
    "Prompts/train.csv": b"a,b\r\n",
    "empty.csv": b"",
}
FIRST, SECOND = list(CONTENT)[:2]
COMMIT = "4f86cad"


def write(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, temporary ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.server.together:
            self.server.together.wait(20)
        if self.server.answer:
            self.wfile.write(self.server.answer)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the published files; it counts requests, and a test may set what it answers."""
    monkeypatch.delenv(RELEASE_VARIABLE, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write(tmp_path / "served" / COMMIT, CONTENT)
    handler = partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.requests, listening.together, listening.answer = [], None, b""
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


@pytest.fixture
def fetch(tmp_path, server):
    files = [{"path": name, "sha256": hashlib.sha256(data).hexdigest()} for name, data in CONTENT.items()]
    manifest = tmp_path / "manifest.json"
    repository = f"http://127.0.0.1:{server.server_address[1]}"
    manifest.write_text(json.dumps({"repository": repository, "commit": COMMIT, "files": files}))
    return partial(fetch_release, tmp_path / "release", manifest=manifest)


def test_only_what_is_missing_or_different_is_fetched(fetch, server, tmp_path):
    places = fetch()
    assert {name: place.read_bytes() for name, place in places.items()} == files_in(tmp_path / "release") == CONTENT
    assert places == release_files(tmp_path / "release", manifest=fetch.keywords["manifest"])
    assert server.requests == [f"/{COMMIT}/{quote(name)}" for name in CONTENT]
    fetch()
    assert len(server.requests) == len(CONTENT)
    write(tmp_path / "release", {SECOND: b"b,a\r\n", "notes/mine.txt": b"stays"})
    with pytest.raises(PersodpoError, match=f"{SECOND} is missing or not as published"):
        release_files(tmp_path / "release", manifest=fetch.keywords["manifest"])
    fetch()
    assert server.requests[len(CONTENT) :] == [f"/{COMMIT}/{SECOND}"]
    assert files_in(tmp_path / "release") == {**CONTENT, "notes/mine.txt": b"stays"}


def test_a_copy_is_checked_and_left_alone(fetch, server, tmp_path, monkeypatch):
    copy = write(tmp_path / "copy", {**CONTENT, SECOND: b"b,a\r\n"})
    monkeypatch.setenv(RELEASE_VARIABLE, str(copy))
    with pytest.raises(PersodpoError, match=rf"copy/{SECOND} is not the published file"):
        fetch()
    (copy / SECOND).unlink()
    with pytest.raises(PersodpoError, match=rf"copy/{SECOND} cannot be read \(No such file"):
        fetch()
    assert files_in(tmp_path / "release") == {FIRST: CONTENT[FIRST]}  # what was right is kept, nothing else is left
    write(copy, CONTENT)
    fetch()
    assert files_in(tmp_path / "release") == files_in(copy) == CONTENT
    assert server.requests == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"200 OK\r\n\r\nother bytes", "is not the published file"),
        (b"200 OK\r\nContent-Length: 179200\r\n\r\nbroken off", "cannot be fetched"),
        (b"302 Found\r\nLocation: /elsewhere\r\n\r\n", "is not the published file"),
        (b"404 Not Found\r\n\r\n", "cannot be fetched"),
    ],
)
def test_a_refused_answer_is_one_sentence_and_leaves_the_file_as_it_was(fetch, server, tmp_path, answer, words):
    server.answer = b"HTTP/1.0 " + answer
    write(tmp_path / "release", {FIRST: b"older"})
    with pytest.raises(PersodpoError, match=rf"{quote(FIRST)} {words}.*{RELEASE_VARIABLE}.*\.$"):
        fetch()
    assert len(server.requests) == 1
    assert files_in(tmp_path / "release") == {FIRST: b"older"}


def test_without_a_network_the_pinned_address_and_a_remedy_are_named(tmp_path, monkeypatch):
    def fail(*_):
        raise requests.ConnectionError("no route to host")

    monkeypatch.delenv(RELEASE_VARIABLE, raising=False)
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fail)
    place = (
        "https://raw.githubusercontent.com/salehafzoon/PersoDPO/4f86cadd2dcff25ee32795233704133ce2ac8dcc/Evaluations"
    )
    with pytest.raises(PersodpoError, match=rf"{place}/FoCus-results.xlsx cannot be fetched.*{RELEASE_VARIABLE}"):
        fetch_release(tmp_path / "release")
    assert files_in(tmp_path) == {}


def test_two_fetches_at_once(fetch, server, tmp_path):
    server.together = threading.Barrier(2)  # each file is sent once both have asked for it
    with ThreadPoolExecutor(2) as pool:
        assert len({str(job.result()) for job in [pool.submit(fetch) for _ in range(2)]}) == 1
    assert len(server.requests) == 2 * len(CONTENT)
    assert files_in(tmp_path / "release") == CONTENT
