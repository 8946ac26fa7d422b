"""The chunk cache on a local disk: whole or invisible, bounded, shared, and never in the way of the training.

Real files, real processes, real kills; full and read-only disks are tmpfs in a mount namespace of a child's own.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from calotype.data.disk import COARSE, FREE, Disk
from calotype.errors import ConfigError, DataError

KIB, MIB = 2**10, 2**20
FORK = multiprocessing.get_context("fork")


@lru_cache(16)
def chunk(number: int, size: int = 64 * KIB) -> tuple[str, memoryview]:
    data = random.Random(number).randbytes(size)
    return hashlib.sha256(data).hexdigest(), memoryview(data)


def keep(disk: Disk, number: int, size: int = 64 * KIB) -> None:
    disk.write(*chunk(number, size))


def has(disk: Disk, number: int, size: int = 64 * KIB) -> bool:
    """As the stream does it, but that a hit with other bytes fails the test."""
    digest, data = chunk(number, size)
    buffer = memoryview(bytearray(size))
    hit = disk.read(digest, buffer)
    assert not hit or buffer == data, f"chunk {number} was read with other bytes than were written"
    return hit


def path_of(disk: Disk, digest: str) -> Path:
    return disk.folder / digest[:2] / f"{digest}.chunk"


def held(folder: Path, pattern: str = "**/*") -> int:
    """Bytes of entries and of partial files, each file once, while nobody may add or evict any."""
    files: dict[int, int] = {}
    with open(folder / "total") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):  # a partial file that has got its name
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and path.name != "total":
                    files[status.st_ino] = status.st_size
    return sum(files.values())


def partials(folder: Path) -> list[Path]:
    return list(folder.glob(".partial-*"))


def start(function: Callable[..., Any], *values: Any) -> Any:
    process = FORK.Process(target=function, args=values, daemon=True)
    process.start()
    return process


def in_child(function: Callable[..., Any], *values: Any) -> Any:
    """What the function returns in a process of its own, which it may spoil."""
    mine, theirs = FORK.Pipe()

    def body() -> None:
        try:
            theirs.send((function(*values), ""))
        except BaseException:
            theirs.send((None, traceback.format_exc()))

    process = start(body)
    theirs.close()
    result, error = mine.recv()
    process.join()
    assert not error, error
    return result


@pytest.fixture(autouse=True)
def clean(tmp_path: Path) -> Iterator[None]:
    """pytest would keep the many files of three sessions, and then take its time to remove them."""
    yield
    shutil.rmtree(tmp_path)


class Heard(logging.Handler):
    """The cache's warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("calotype.data.disk").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


# ----------------------------------------------------------------------------------------------- one process


def test_what_is_written_is_read(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "new" / "cache", MIB)
    digest, data = chunk(1)
    assert not has(disk, 1)
    disk.write(digest, data)
    once = path_of(disk, digest).stat().st_ino
    disk.write(digest, data)
    assert path_of(disk, digest).stat().st_ino == once
    assert has(disk, 1)
    assert has(Disk(tmp_path / "new" / "cache", MIB), 1)
    for size in (len(data) - 1, len(data) + 1, 0):
        assert not disk.read(digest, memoryview(bytearray(size))), f"hit with {size} bytes"
    path = path_of(disk, digest)
    assert path.read_bytes() == data
    assert (stat.S_IMODE(disk.folder.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o700, 0o700)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert held(disk.folder) == len(data)
    disk.discard(digest)
    disk.discard(digest)
    assert not has(disk, 1)
    disk.write(digest, data[:100])  # the class does not hash: another length replaces what is there
    disk.write(digest, data)
    assert has(disk, 1)


def test_a_chunk_goes_straight_into_the_buffer_it_was_given(tmp_path: Path) -> None:
    disk = Disk(tmp_path, MIB)
    keep(disk, 1)
    whole = bytearray(3 * 64 * KIB)
    digest, data = chunk(1)
    assert disk.read(digest, memoryview(whole)[64 * KIB : 128 * KIB])
    assert whole == bytes(64 * KIB) + data + bytes(64 * KIB)


def test_the_least_recently_used_go_first_and_a_tenth_at_once(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 20 * 64 * KIB)
    for number in range(20):
        keep(disk, number)
        past = time.time() - 10_000 + number
        os.utime(path_of(disk, chunk(number)[0]), (past, past))
    assert all(has(disk, number) for number in (0, 2))  # used now
    keep(disk, 20)
    assert [number for number in range(21) if not has(disk, number)] == [1, 3, 4]  # 18 stay: 0.9 of the limit
    assert held(tmp_path) == 18 * 64 * KIB


def test_reading_writes_an_inode_at_most_once_in_a_while(tmp_path: Path) -> None:
    disk = Disk(tmp_path, MIB)
    keep(disk, 1)
    path = path_of(disk, chunk(1)[0])
    for ago, renewed in ((COARSE / 2, False), (COARSE * 2, True), (-COARSE * 2, True)):  # the last: a clock went back
        past = time.time() - ago
        os.utime(path, (past, past))
        assert has(disk, 1)
        assert (abs(path.stat().st_mtime - past) > 1) == renewed


def test_a_chunk_over_the_limit_evicts_nothing_and_is_said_once(tmp_path: Path) -> None:
    heard, disk = Heard(), Disk(tmp_path, 100 * KIB)
    keep(disk, 1)
    for number in (2, 3):
        keep(disk, number, 101 * KIB)
    assert has(disk, 1)
    assert [held(tmp_path), len(heard.lines)] == [64 * KIB, 1]
    assert str(tmp_path) in heard.lines[0]
    assert "limit" in heard.lines[0]
    keep(disk, 4, 100 * KIB)
    assert has(disk, 4, 100 * KIB)


@pytest.mark.parametrize("damage", [b"", b"junk", b"%020d %020d\n" % (0, 0), b"%020d %020d\n" % (10**15, 0), None])
def test_a_counter_that_is_gone_or_wrong_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    disk = Disk(tmp_path, 20 * 64 * KIB)
    for number in range(20):
        keep(disk, number)
    if damage is None:
        (tmp_path / "total").unlink()
    else:
        (tmp_path / "total").write_bytes(damage)
    for number in range(20, 26):
        keep(disk, number)
    assert 10 * 64 * KIB < held(tmp_path) <= 20 * 64 * KIB
    assert has(disk, 25)


def test_two_jobs_with_different_limits(tmp_path: Path) -> None:
    small, big = Disk(tmp_path, 4 * 64 * KIB), Disk(tmp_path, 12 * 64 * KIB)
    for number in range(30):
        keep(big, number)
        assert held(tmp_path) <= 12 * 64 * KIB
    assert held(tmp_path) > 8 * 64 * KIB
    keep(small, 100)
    assert held(tmp_path) <= 4 * 64 * KIB
    assert has(big, 100)
    for number in range(6):
        keep(big, number)
    assert held(tmp_path) > 4 * 64 * KIB


# ---------------------------------------------------------------------------------------------- many processes


def test_four_processes_at_once_stay_within_the_limit(tmp_path: Path) -> None:
    limit = 40 * 64 * KIB

    def work(first: int) -> None:
        disk = Disk(tmp_path / "cache", limit)
        for number in range(first, first + 100):
            keep(disk, number % 300)
            has(disk, (number + 7) % 300)

    processes = [start(work, first) for first in range(0, 400, 100)]
    most = 0
    while any(process.is_alive() for process in processes):
        with suppress(FileNotFoundError):  # not yet made
            most = max(most, held(tmp_path / "cache"))
        time.sleep(0.02)
    assert [process.exitcode for process in processes] == [0] * 4
    assert limit // 2 < most <= limit
    disk = Disk(tmp_path / "cache", limit)
    assert held(disk.folder) == sum(has(disk, number) for number in range(300)) * 64 * KIB
    assert partials(disk.folder) == []


def test_kill_at_any_instant_leaves_no_half_chunk_and_no_growth(tmp_path: Path) -> None:
    size, limit = 4 * MIB, 24 * MIB

    def work(ready: Any) -> None:
        disk = Disk(tmp_path, limit)
        ready.set()
        while True:
            for digest, data in chunks:
                disk.discard(digest)
                disk.write(digest, data)

    chunks = [chunk(number, size) for number in range(4)]
    chance, left, hits = random.Random(0), 0, 0
    disk = Disk(tmp_path, limit)
    for _ in range(10):
        events = [FORK.Event(), FORK.Event()]
        writers = [start(work, event) for event in events]
        for event in events:
            event.wait()
        time.sleep(chance.uniform(0.0, 0.1))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
        for writer in writers:
            writer.join()
        left += len(partials(tmp_path))
        assert {path.stat().st_size for path in partials(tmp_path)} <= {0, size}  # all of it counts from the beginning
        hits += sum(has(disk, number, size) for number in range(4))
        assert held(tmp_path) <= limit
    assert left, "no writer was killed in the middle: nothing was tested"
    assert hits
    for number in range(100, 100 + limit // 10 // MIB + 3):  # enough for the next count
        keep(disk, number, MIB)
    assert partials(tmp_path) == []


def test_a_partial_file_is_a_leftover_if_nobody_holds_its_lock_whatever_its_age(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".partial-dead", tmp_path / ".partial-alive"
    for path in (dead, alive):
        path.write_bytes(bytes(300 * KIB))
    os.utime(dead, (time.time() + 9999, time.time() + 9999))
    os.utime(alive, (0, 0))
    disk = Disk(tmp_path, 600 * KIB)
    with open(alive, "rb+") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        for number in range(10):
            keep(disk, number)
            assert held(tmp_path) <= 600 * KIB
        assert not dead.exists()
        assert alive.exists()
        assert has(disk, 9)
    for number in range(10, 15):
        keep(disk, number)
    assert not alive.exists()


def test_nobody_waits_for_a_process_that_sleeps_on_the_lock(tmp_path: Path) -> None:
    disk = Disk(tmp_path, MIB)
    keep(disk, 1)
    with open(tmp_path / "total") as sleeper:
        fcntl.flock(sleeper, fcntl.LOCK_EX)
        began = time.monotonic()
        keep(disk, 2)
        assert time.monotonic() - began < 5
        assert [has(disk, number) for number in (1, 2)] == [True, False]
    keep(disk, 2)
    assert has(disk, 2)


def test_a_fork_in_the_middle_of_a_write_keeps_no_lock(tmp_path: Path) -> None:
    disk, done = Disk(tmp_path, 100 * MIB), threading.Event()

    def work() -> None:
        number = 0
        while not done.is_set():
            number += 1
            disk.write(f"{number:064x}", memoryview(bytes(10)))

    writer = threading.Thread(target=work)
    writer.start()
    children = [start(time.sleep, 60) for _ in range(20)]
    done.set()
    writer.join()
    keep(disk, 1)
    assert has(disk, 1)
    for child in children:
        child.kill()
        child.join()


def test_a_folder_that_is_removed_in_mid_use_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def work(done: Any) -> list[str]:
        heard, disk = Heard(), Disk(folder, 10 * MIB)
        while not done.is_set():
            for number in range(20):
                keep(disk, number)
                has(disk, number)
        keep(disk, 1)
        assert has(disk, 1)
        return heard.lines

    done = FORK.Event()
    lines: list[list[str]] = []
    threads = [threading.Thread(target=lambda: lines.append(in_child(work, done))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(200):
        time.sleep(0.004)
        if number % 10:
            with suppress(FileNotFoundError):
                folder.rename(tmp_path / f"gone-{number}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    done.set()
    for thread in threads:
        thread.join()
    assert lines == [[], []]


# -------------------------------------------------------------------------------------------- disks that fail


def on_tmpfs(options: str, body: Callable[[Path], None], otherwise: Path | None = None) -> None:
    """Run in a child that alone sees a small disk; where mounting is not allowed, `otherwise` on that, or skipped."""

    def work(folder: Path) -> Any:
        if ctypes.CDLL(None).unshare(0x20000):  # CLONE_NEWNS: nobody else sees it, and it goes with the child
            return "skip"
        made = subprocess.run(
            ["sh", "-c", 'mount --make-rprivate / && mount -t tmpfs -o "$1" tmpfs "$2"', "sh", options, str(folder)],
            capture_output=True,
        )
        if made.returncode:
            return "skip"
        return body(folder)

    with tempfile.TemporaryDirectory() as folder:
        result = in_child(work, Path(folder))
    if result == "skip" and otherwise:
        in_child(body, otherwise)
    elif result == "skip":
        pytest.skip("no mount namespace may be made here")


def test_ten_thousand_entries_are_not_listed_at_every_write(tmp_path: Path) -> None:
    def body(root: Path) -> None:
        for fan in range(256):
            (root / f"{fan:02x}").mkdir()
        for number in range(10_000):
            name = hashlib.sha256(b"%d" % number).hexdigest()
            with open(f"{root}/{name[:2]}/{name}.chunk", "wb", buffering=0) as file:
                file.write(bytes(100))
        disk, events = Disk(root, 10_000 * 100), Counter[str]()  # full: only evictions let a chunk in
        sys.addaudithook(lambda name, values: events.update([name]))
        for number in range(2_000):
            keep(disk, number, 100)
        assert 256 * 2 <= events["os.listdir"] <= 260 * 4  # the first count, then one per thousand chunks
        assert 2_000 <= events["os.remove"] - 2_000 <= 4_000  # each write tries to remove its partial file
        assert events["open"] <= 2_000 * 5 + events["os.listdir"]
        assert held(root) <= 10_000 * 100

    on_tmpfs("mode=700,size=4g", body, tmp_path)


def test_some_of_the_disk_stays_free_and_the_cache_yields_to_others() -> None:
    def body(root: Path) -> None:
        def free() -> int:
            return os.statvfs(root).f_bavail * os.statvfs(root).f_frsize

        def others(size: int) -> None:
            with open(root / "others", "ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)

        heard, disk = Heard(), Disk(root / "cache", 10**12)
        for number in range(40):  # four times what there is room for
            keep(disk, number, 4 * MIB)
            assert free() >= FREE
        assert held(disk.folder) > 20 * MIB
        assert has(disk, 39, 4 * MIB)
        others(20 * MIB)
        keep(disk, 40, 4 * MIB)
        assert free() >= FREE
        assert has(disk, 40, 4 * MIB)
        assert heard.lines == []
        others(60 * MIB)
        for number in range(50, 53):
            keep(disk, number, 4 * MIB)
        assert held(disk.folder) == 0  # all that it had, but others have taken more
        assert len(heard.lines) == 1
        (root / "others").unlink()
        keep(disk, 60, 4 * MIB)
        assert has(disk, 60, 4 * MIB)

    on_tmpfs(f"size={FREE + 40 * MIB}", body)


def said(heard: Heard, folder: Path, reason: str) -> None:
    """One sentence, that names the folder, the reason, and what to change."""
    assert len(heard.lines) == 1, heard.lines
    assert all(word in heard.lines[0] for word in (str(folder), reason, "make room", "another folder")), heard.lines


def test_a_disk_that_has_no_room_for_a_file_ends_writing() -> None:
    def body(root: Path) -> None:
        heard, disk = Heard(), Disk(root, 10**9)
        for number in range(30):
            keep(disk, number)
        said(heard, root, "No space left")
        found = [has(disk, number) for number in range(30)]
        assert found[0]
        assert not found[-1]
        assert partials(root) == []

    on_tmpfs("mode=700,size=4g,nr_inodes=20", body)


def test_a_disk_that_turns_read_only_is_still_read() -> None:
    def body(root: Path) -> None:
        heard, disk = Heard(), Disk(root, 10**9)
        keep(disk, 1)
        os.utime(path_of(disk, chunk(1)[0]), (0, 0))
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        for number in (2, 3):
            keep(disk, number)
            disk.discard(chunk(1)[0])
        assert has(disk, 1)
        said(heard, root, "Read-only")
        assert has(Disk(root, 10**9), 1)

    on_tmpfs("mode=700,size=4g", body)


def test_a_write_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        heard, disk = Heard(), Disk(tmp_path / "cache", 10**9)
        keep(disk, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
        keep(disk, 2, 2 * MIB)
        said(heard, disk.folder, "File too large")
        keep(disk, 3)
        assert [has(disk, 1), has(disk, 2, 2 * MIB), has(disk, 3)] == [True, False, False]
        assert partials(disk.folder) == []

    in_child(work)


def test_a_folder_without_permission_to_write() -> None:
    def work(folder: Path) -> None:
        if os.geteuid() == 0:  # root may always write
            os.chown(folder, 65534, 65534)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        heard, disk = Heard(), Disk(folder, 10**9)
        for number in range(3):
            keep(disk, number)
            assert not has(disk, number)
            disk.discard(chunk(number)[0])
        said(heard, folder, "Permission denied")

    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o711)
        Path(root, "cache").mkdir(mode=0o500)
        in_child(work, Path(root, "cache"))


# ------------------------------------------------------------------------------------------- a hostile folder


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    refused = ["file", "file/below", "link", "nowhere", "nowhere/below", "open"]
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir(mode=0o700)
        os.chown(tmp_path / "theirs", 65534, 65534)
        refused.append("theirs")
    for name in refused:
        with pytest.raises(ConfigError, match=f"(?s){tmp_path / name} .*name a folder") as caught:
            Disk(tmp_path / name, MIB)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"/proc/x .*name a folder"):
        Disk(Path("/proc/x"), MIB)  # where mkdir says that there is no such file
    with pytest.raises(ConfigError, match="limit"):
        Disk(tmp_path / "mine", 0)
    Disk(tmp_path / "mine", 1)


@pytest.mark.parametrize(
    "digest", ["", "..", "../" * 6, "ab/" + "0" * 61, "A" * 64, "0" * 15, "0" * 129, "0" * 64 + "\n"]
)
def test_only_a_hex_digest_names_a_chunk(tmp_path: Path, digest: str) -> None:
    disk = Disk(tmp_path, MIB)
    for call in (disk.read, disk.write):
        with pytest.raises(DataError, match="no digest"):
            call(digest, memoryview(bytearray(8)))
    with pytest.raises(DataError, match="no digest"):
        disk.discard(digest)
    assert list(tmp_path.iterdir()) == []


def test_links_that_somebody_planted_are_not_followed(tmp_path: Path) -> None:
    folder, victim = tmp_path / "cache", tmp_path / "victim"
    digest, data = chunk(1)
    name = f"{digest}.chunk"
    victim.mkdir()
    (victim / name).write_bytes(data)
    (victim / "other").write_bytes(bytes(len(data)))

    def planted(path: Path, target: Path) -> tuple[Disk, Heard]:
        shutil.rmtree(folder, ignore_errors=True)
        disk = Disk(folder, 10 * MIB)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target)
        return disk, Heard()

    disk, heard = planted(folder / digest[:2] / name, victim / name)
    assert not has(disk, 1)
    disk.write(digest, data)  # replaces the link itself
    assert has(disk, 1)
    assert heard.lines == []
    (victim / name).write_bytes(data)

    for path, target in (
        (folder / digest[:2], victim),
        (folder / "total", victim / "other"),
        (folder / ".partial-x", victim / "other"),
    ):
        disk, heard = planted(path, target)
        assert not has(disk, 1)
        disk.write(digest, data)
        disk.discard(digest)
        assert not has(disk, 1)
        said(heard, folder, "")
        assert sorted(item.name for item in victim.iterdir()) == sorted([name, "other"])
        assert (victim / name).read_bytes() == data
        assert (victim / "other").read_bytes() == bytes(len(data))


def test_a_pipe_or_a_folder_in_the_place_of_a_chunk_is_a_miss(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 10 * MIB)
    digest, data = chunk(1)
    path_of(disk, digest).parent.mkdir()
    (tmp_path / ".partial-x").mkdir()  # folders that nobody here has made are left alone
    path_of(disk, "ab" * 32).mkdir(parents=True)
    os.mkfifo(path_of(disk, digest))
    assert not has(disk, 1)  # and no waiting for somebody to write into it
    disk.write(digest, data)
    assert has(disk, 1)
    disk.discard(digest)
    path_of(disk, digest).mkdir()
    assert not disk.read(digest, memoryview(bytearray(path_of(disk, digest).stat().st_size)))
    disk.write(digest, data)
    disk.discard(digest)
