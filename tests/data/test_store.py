"""A folder and a real S3 keep the same promises: whole or invisible, one writer wins, no way out of the root."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from calotype.data import s3 as rooms
from calotype.data.files import FolderStore
from calotype.data.store import Missing, Store, open_store
from calotype.errors import CalotypeError, ConfigError, DataError

MIB = 2**20


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "a folder"))
    return open_store(request.getfixturevalue("bucket")).at("some", "prefix")


def test_reads_ranges_lists_and_deletes(store: Store) -> None:
    assert list(store.list()) == []
    assert store.publish("a/one", b"0123456789")
    store.write("a/two", b"")
    store.write("ab/three.txt", b"xyz")
    assert [(entry.key, entry.size) for entry in store.list()] == [("a/one", 10), ("a/two", 0), ("ab/three.txt", 3)]
    assert [entry.key for entry in store.list("a/")] == ["a/one", "a/two"]
    assert [entry.key for entry in store.list("ab/th")] == ["ab/three.txt"]
    assert store.folders() == ["a", "ab"]
    assert store.folders("a") == store.folders("nowhere") == []
    assert store.read("a/one") == b"0123456789"
    assert (store.read("a/one", 3), store.read("a/one", 3, 4)) == (b"3456789", b"3456")
    assert (store.read("a/one", 8, 9), store.read("a/one", 10, 1), store.read("a/one", 0, 0)) == (b"89", b"", b"")
    assert store.read("a/two") == b""
    assert store.at("a").read("one", 0, 1) == b"0"
    assert [entry.key for entry in store.at("a").list()] == ["one", "two"]
    store.delete("a/one")
    store.delete("a/one")
    assert (store.exists("a/one"), store.exists("a/two"), store.exists("a")) == (False, True, False)


def test_a_folder_that_cannot_be_listed_is_said_and_links_are_followed_once(tmp_path: Path) -> None:
    root, away = tmp_path / "root", tmp_path / "away"
    store = open_store(str(root))
    store.write("a/one", b"1")
    away.mkdir()
    (away / "two").write_bytes(b"2")
    (root / "link").symlink_to(away)
    (root / "a" / "loop").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "self").symlink_to(root / "self")
    (root / "also a").symlink_to(root / "a")  # which comes before it, and is not its name
    assert [entry.key for entry in store.list()] == ["a/one", "link/two"]
    assert store.folders() == ["a", "also a", "link"]
    assert store.read("link/two") == b"2"
    with pytest.raises(DataError, match="self cannot be read"):
        store.read("self")


def test_what_may_not_be_read_does_not_go_missing() -> None:
    def others(root: Path, pipe: Connection) -> None:
        if os.geteuid() == 0:  # root may always look
            os.setgroups([])
            os.setuid(65534)
        store, said = open_store(str(root)), []
        for look in (lambda: list(store.list()), lambda: store.read("secret/x"), store.folders):
            try:
                look()
            except DataError as error:
                said.append(str(error))
        pipe.send(said)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        Path(folder, "secret").mkdir(mode=0)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=others, args=(Path(folder), theirs))
        process.start()
        said = ours.recv()
        process.join()
    assert len(said) == 3
    assert "secret cannot be listed (Permission denied): check its owner" in said[0]
    assert "secret/x cannot be read (Permission denied)" in said[1]


def test_missing_names_the_full_uri(store: Store) -> None:
    with pytest.raises(Missing, match=r"no/such\.tar does not exist") as caught:
        store.read("no/such.tar", 5, 5)
    assert store.uri in str(caught.value)
    with pytest.raises(Missing, match="nothing lies below"):
        store.download("nothing", Path("unused"))


def test_publish_never_replaces_and_write_does(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"from a file")
    assert store.publish("key", path)
    assert not store.publish("key", b"another")
    assert store.read("key") == b"from a file"
    store.write("key", b"replaced")
    assert store.read("key") == b"replaced"
    assert [entry.key for entry in store.list()] == ["key"]


def test_of_many_writers_exactly_one_publishes(store: Store) -> None:
    writers = 8
    with ThreadPoolExecutor(writers) as pool:
        for number in range(3):
            gate = threading.Barrier(writers)

            def write(writer: int, key: str = f"race/{number}", gate: threading.Barrier = gate) -> bool:
                gate.wait()
                return store.publish(key, bytes([writer]) * MIB)

            won = list(pool.map(write, range(writers)))
            assert sum(won) == 1
            assert store.read(f"race/{number}") == bytes([won.index(True)]) * MIB


def test_files_too_big_for_one_put_are_published_in_parts(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "SINGLE_PUT", MIB)
    store, path = open_store(bucket), tmp_path / "big"
    path.write_bytes(os.urandom(20 * MIB))
    assert store.publish("big", path)
    assert store.read("big") == path.read_bytes()
    bucket, name = store.bucket, store._name("big")  # type: ignore[attr-defined]
    assert not store._publish_parts(name, path)  # type: ignore[attr-defined]
    assert not rooms._client().list_multipart_uploads(Bucket=bucket, Prefix=name).get("Uploads")


KILLED = """
import os, signal, sys
from pathlib import Path
from calotype.data import files, s3
from calotype.data.store import open_store
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
os.link = die                           # the folder's last step
s3.S3Store._conditional = die        # S3's: everything was sent, nothing completed
s3.SINGLE_PUT = 1
open_store(sys.argv[1]).publish("down/here/victim", Path(sys.argv[2]))
"""


def test_a_killed_writer_leaves_nothing_visible(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(MIB))
    done = subprocess.run([sys.executable, "-c", KILLED, store.uri, str(path)], env=_environment(), check=False)
    assert done.returncode == -9
    assert (store.exists("down/here/victim"), list(store.list()), store.folders()) == (False, [], [])

    left = list(store.unfinished("down"))
    assert len(left) == isinstance(store, FolderStore)
    assert list(store.unfinished("dow")) == []
    for entry in left:
        assert entry.key.startswith("down/here/")
        assert entry.size == MIB
        assert abs(entry.modified - time.time()) < 60
        store.give_up(entry)
    assert list(store.unfinished("")) == []
    assert store.publish("victim", path)
    assert store.read("victim") == path.read_bytes()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "platform")}


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "", "a//b", "a/./b", "a\\..\\b", "a\0b", "a/"])
def test_keys_cannot_leave_the_root(store: Store, key: str) -> None:
    for action in (store.read, store.exists, store.delete, store.at, lambda key: store.publish(key, b"x")):
        with pytest.raises(DataError):
            action(key)


@pytest.mark.parametrize(
    "uri", ["", "http://a/b", "pipe://ls", "s3://", "s3://UPPER/x", "s3://b/../c", "file://host/x"]
)
def test_other_schemes_and_names_are_refused(uri: str) -> None:
    with pytest.raises((ConfigError, DataError)):
        open_store(uri)


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("x").uri == open_store(f"file://{tmp_path}/x").uri == str(tmp_path / "x")
    assert open_store("s3://bucket/a/b/").at("c").uri == "s3://bucket/a/b/c"
    assert open_store("s3://bucket").uri == "s3://bucket"
    assert open_store(f"file://{tmp_path}/with%20space").uri == f"{tmp_path}/with space"


def test_folders_go_up_and_come_down(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"a")
    (source / "deep" / "er" / "b.bin").write_bytes(os.urandom(3 * MIB))
    store.upload(source, "up")
    store.write("upper/not.txt", b"a neighbour with the same beginning")
    store.download("up", target)
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == {"a.txt": b"a", "deep/er/b.bin": (source / "deep/er/b.bin").read_bytes()}


def test_travels_to_other_processes(store: Store) -> None:
    store.publish("key", b"value")
    assert pickle.loads(pickle.dumps(store)) == store
    with multiprocessing.get_context("fork").Pool(2) as pool:  # a client's sockets must not be shared
        assert pool.map(store.read, ["key"] * 8) == [b"value"] * 8


def test_ensure_makes_it_and_says_why_not(stack: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="set root"):
        open_store(str(tmp_path / "file" / "below")).ensure()
    store = open_store(f"s3://ensure-{os.urandom(4).hex()}")
    store.ensure()
    store.ensure()
    assert store.publish("key", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    rooms._clients.clear()
    with pytest.raises(CalotypeError, match="AWS_ACCESS_KEY_ID"):
        store.read("key")
    rooms._clients.clear()


def test_unreachable_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(CalotypeError, match=r"cannot be reached.*AWS_ENDPOINT_URL_S3"):
        open_store("s3://bucket").ensure()


class Proxy:
    """Between client and S3: breaks off the answer of the first connections after so many bytes."""

    def __init__(self, target: tuple[str, int], broken: int, after: int) -> None:
        self.target, self.broken, self.after = target, broken, after
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            limit, self.broken = (self.after, self.broken - 1) if self.broken > 0 else (-1, 0)
            server = socket.create_connection(self.target)
            threading.Thread(target=self._pump, args=(client, server, -1), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, limit), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, limit: int) -> None:
        sent = 0
        with suppress(OSError):  # either end may hang up
            while data := source.recv(65536):
                target.sendall(data if limit < 0 else data[: limit - sent])
                sent += len(data)
                if 0 <= limit <= sent:
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_broken_answers_are_asked_for_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = open_store(bucket), os.urandom(2 * MIB)
    store.write("key", data)
    host, port = os.environ["AWS_ENDPOINT_URL_S3"].removeprefix("http://").rstrip("/").split(":")
    proxy = Proxy((host, int(port)), broken=2, after=MIB)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
    assert store.read("key") == data
    proxy = Proxy((host, int(port)), broken=1, after=0)  # the put arrives, its answer does not
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
    assert store.publish("mine", b"x"), "a retried put met its own object and was taken for another's"
    assert not store.publish("mine", b"y")
