import hashlib
import http.server
import io
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pooch
import pytest
from tqdm import tqdm

from lm.data import corpora
from roundoff.errors import UsageError

FILES = {
    "train.txt": b" = Robot = \n \n a robot <unk> is a robot \n" * 3000,
    "valid.txt": b" = Valid = \n some more text \n",
    "test.txt": " = Test = \n caf\u00e9 \n".encode(),
}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def the_error(call: Callable[[], object]) -> str:
    """The one line of the UsageError that `call` ends with."""
    with pytest.raises(UsageError) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


# Folders


def test_a_folder_gives_its_texts_and_digests(tmp_path: Path) -> None:
    texts = corpora.read(write(tmp_path / "mine"))
    assert texts.name == "mine"
    assert [texts.train, texts.valid, texts.test] == [content.decode() for content in FILES.values()]
    assert texts.sha256 == {
        name.removesuffix(".txt"): hashlib.sha256(content).hexdigest() for name, content in FILES.items()
    }


def test_line_ends_of_other_systems_become_newlines_and_digests_are_of_the_bytes(tmp_path: Path) -> None:
    raw = b"a b\r\nc\rd\n\r\n"
    texts = corpora.read(write(tmp_path / "mine", FILES | {"train.txt": raw}))
    assert texts.train == "a b\nc\nd\n\n"
    assert texts.sha256["train"] == hashlib.sha256(raw).hexdigest()


def test_a_missing_folder(tmp_path: Path) -> None:
    line = the_error(partial(corpora.read, tmp_path / "none"))
    assert f"--data {tmp_path / 'none'}: there is no such folder" in line
    assert "train.txt, valid.txt and test.txt" in line
    assert "--data python-docs" in line
    assert not any(tmp_path.iterdir())


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b\n")
    assert "this is a file" in the_error(partial(corpora.read, tmp_path / "text"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {"valid.txt": b"a\n"})
    assert "no train.txt and no test.txt" in the_error(partial(corpora.read, folder))


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", "\u2028".encode()])
def test_an_empty_file_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "mine", FILES | {"valid.txt": content})
    assert f"{folder / 'valid.txt'}: the file is empty" in the_error(partial(corpora.read, folder))


def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", FILES | {"test.txt": b"caf\xc3\xa9 caf\xe9 \n"})
    line = the_error(partial(corpora.read, folder))
    assert f"{folder / 'test.txt'}: the file is not UTF-8 (byte 0xe9 at offset 9)" in line


def test_unreadable_paths_are_errors_of_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {"valid.txt": b"a\n", "test.txt": b"a\n"})
    (folder / "train.txt").mkdir()
    assert f"cannot read {folder / 'train.txt'}" in the_error(partial(corpora.read, folder))
    assert "cannot read" in the_error(partial(corpora.read, tmp_path / ("x" * 300)))
    (tmp_path / "loop").symlink_to("loop")
    assert "no such folder" in the_error(partial(corpora.read, tmp_path / "loop"))


# WikiText-2 from a server


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves FILES; under each address but /good/ valid.txt has a fault, so that a good file came before."""

    def do_GET(self) -> None:
        _, way, name = self.path.split("/")
        content = FILES[name]
        fault = way if name == "valid.txt" else "good"
        if fault == "absent":
            self.send_error(404)
            return
        if fault == "corrupted":
            content = content.replace(b"more", b"m0re")
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=partial(httpd.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _small_wikitext2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    monkeypatch.setattr(corpora, "WIKITEXT2_SHA256", digests)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)


def fetch_from(monkeypatch: pytest.MonkeyPatch, base_url: str) -> None:
    """Let `corpora.read` fetch from `base_url`."""
    monkeypatch.setattr(corpora, "fetch_wikitext2", partial(corpora.fetch_wikitext2, base_url=base_url))


@pytest.mark.parametrize("data", ["./data/wikitext-2", "data/wikitext-2/", "x/../data//wikitext-2", None])
def test_the_default_folder_is_fetched_when_missing(
    data: str | None,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "x").mkdir()
    fetch_from(monkeypatch, f"{server}/good/")
    pooch.get_logger().setLevel("NOTSET")
    for handler in pooch.get_logger().handlers:  # made at import, before stderr was captured
        monkeypatch.setattr(handler, "stream", sys.stderr)
    texts = corpora.read(data or tmp_path / "data/wikitext-2")
    folder = tmp_path / "data/wikitext-2"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["wikitext-2"]
    assert texts.name == "wikitext-2"
    assert texts.test == FILES["test.txt"].decode()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in folder.iterdir())
    assert capfd.readouterr() == ("", ""), "no progress bar in a pipe, and none of pooch's messages"
    # A second run needs no server.
    fetch_from(monkeypatch, "http://127.0.0.1:9/")
    assert corpora.read(data or folder) == texts


def test_a_terminal_shows_a_progress_bar_for_each_file(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    corpora.fetch_wikitext2(tmp_path / "w", f"{server}/good/")
    for name, content in FILES.items():
        last = [line for line in terminal.getvalue().replace("\n", "\r").split("\r") if name in line][-1]
        assert "100%" in last
        size = f"{len(content) / 1000:.0f}k" if len(content) >= 1000 else f"{len(content)}.0"
        assert f"{size}/{size}" in last


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("corrupted", "corrupted, its SHA-256 is not the pinned one"),
        ("cut", "the connection was cut in the middle of the file"),
        ("absent", "the server answered 404"),
    ],
)
@pytest.mark.parametrize("parent", ["data", "deeper/data"])
def test_a_failed_fetch_leaves_nothing_behind(
    fault: str, reason: str, parent: str, server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    folder = tmp_path / parent / "wikitext-2"
    line = the_error(partial(corpora.fetch_wikitext2, folder, f"{server}/{fault}/"))
    assert f"{server}/{fault}/valid.txt: " in line
    assert reason in line
    assert "--data python-docs" in line
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("data")]
    assert capfd.readouterr() == ("", "")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as nobody:  # bound, so that no other server gets the port; not listening
        nobody.bind(("127.0.0.1", 0))
        fetch_from(monkeypatch, f"http://127.0.0.1:{nobody.getsockname()[1]}/")
        line = the_error(partial(corpora.read, corpora.DEFAULT))
    assert "the server cannot be reached or stopped answering" in line
    assert not any(tmp_path.iterdir())


def test_a_silent_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpora, "TIMEOUT", (1.0, 0.05))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        line = the_error(partial(corpora.fetch_wikitext2, tmp_path / "w", url))
    assert "the server cannot be reached or stopped answering" in line
    assert not any(tmp_path.iterdir())


def test_an_address_that_is_none(tmp_path: Path) -> None:
    assert "InvalidURL" in the_error(partial(corpora.fetch_wikitext2, tmp_path / "w", "http://:0/"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_ctrl_c_or_a_full_disk_leaves_nothing_behind(
    fault: BaseException, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def update(bar: tqdm, n: int) -> None:
        if any(tmp_path.glob("data/.w-*/w/train.txt")):  # in the middle of the second file
            raise fault

    monkeypatch.setattr(tqdm, "update", update)
    with pytest.raises(KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else UsageError) as caught:
        corpora.fetch_wikitext2(tmp_path / "data/w", f"{server}/good/")
    assert isinstance(fault, KeyboardInterrupt) or "cannot write" in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where a folder should be")
    line = the_error(partial(corpora.read, corpora.DEFAULT))
    assert f"cannot write {tmp_path / 'data'}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_partial_default_folder_is_not_overwritten(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetch_from(monkeypatch, f"{server}/good/")
    folder = write(tmp_path / "data/wikitext-2", {"train.txt": b"my own\n", "valid.txt": b"text\n"})
    assert "no test.txt; add what is missing, or remove" in the_error(partial(corpora.read, corpora.DEFAULT))
    assert {path.name for path in folder.iterdir()} == {"train.txt", "valid.txt"}
    assert (folder / "train.txt").read_bytes() == b"my own\n"


def test_a_folder_that_another_process_put_there_stays(server: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "data/wikitext-2", {"train.txt": b"was first\n"})
    corpora.fetch_wikitext2(folder, f"{server}/good/")
    assert [path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*")] == [
        Path("wikitext-2"),
        Path("wikitext-2/train.txt"),
    ]
    assert (folder / "train.txt").read_bytes() == b"was first\n"
