"""What is wrong with a database is said in words, and what was saved before stays."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from skyline.bench.store import StoreError, open_store, schema
from tests.bench.store.conftest import Server
from tests.bench.store.records import make_point, make_run, make_table

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, and long enough to be looked at as one. " * 50)
    with pytest.raises(StoreError, match=r"notes\.txt: the file is not a result store .* Name another file"):
        open_store(file)
    assert file.read_text().startswith("not a database")


def test_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.sqlite3"
    run = make_run()
    with open_store(file) as store:
        store.save_run(run)
        for number in range(30):
            store.save_point(make_point(run, requests=make_table(300)).model_copy(update={"key": str(number)}))
    content = bytearray(file.read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"the file is damaged\. Move it away"), open_store(file) as store:
        store.points(with_samples=True)


def test_a_folder_and_a_file_as_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened or created"):
        open_store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"the folder of the store .* cannot be made"):
        open_store(tmp_path / "file" / "bench.sqlite3")


def _as_nobody(file: Path, save: bool) -> str:
    """What a user without rights gets: the message of the StoreError, or nothing."""
    outer, inner = os.pipe()
    # Imported before the fork: the other user may not read this user's Python.
    import skyline.bench.store.store

    child = os.fork()
    if child == 0:
        message = ""
        try:
            os.setgid(65534)
            os.setuid(65534)
            with skyline.bench.store.open_store(file) as store:
                if save:
                    store.save_run(make_run())
        except StoreError as error:
            message = str(error)
        except BaseException as error:
            message = repr(error)
        os.write(inner, message.encode())
        os._exit(0)
    os.close(inner)
    os.waitpid(child, 0)
    with os.fdopen(outer) as pipe:
        return pipe.read()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter but not write, as pytest's are not."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="skyline-store-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@needs_root
def test_a_folder_that_cannot_be_written(open_folder: Path) -> None:
    message = _as_nobody(open_folder / "bench.sqlite3", save=False)
    assert "cannot be opened or created" in message and "SKYLINE_BENCH_STORE" in message
    message = _as_nobody(open_folder / "deeper" / "bench.sqlite3", save=False)
    assert "cannot be made (Permission denied)" in message
    with open_store(open_folder / "bench.sqlite3"):
        pass
    message = _as_nobody(open_folder / "bench.sqlite3", save=True)
    assert "cannot be written" in message or "cannot be opened" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@needs_root
def test_a_full_disk(small_disk: Path) -> None:
    run = make_run()
    noise = make_table(0).model_copy(update={"start": [i * 0.1234567890123 for i in range(2000)]})
    saved = []
    with open_store(small_disk / "bench.sqlite3") as store:
        store.save_run(run)
        with pytest.raises(StoreError, match=r"the disk is full\. What was saved before is safe"):
            for number in range(1000):
                point = make_point(run, requests=noise).model_copy(update={"key": str(number)})
                store.save_point(point)
                saved.append(point)
        assert len(saved) > 3
        # The lists alone, and the whole of each: what was acknowledged is all there.
        assert {p.key for p in store.points()} == {p.key for p in saved}
        assert store.points(with_samples=True)[0].requests == noise
        subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
        store.save_point(make_point(run).model_copy(update={"key": "with room again"}))
    with open_store(small_disk / "bench.sqlite3") as store:
        assert len(store.points()) == len(saved) + 1


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A limit on files' sizes, as a quota is: what SQLite calls an I/O error."""
    code = """
import resource, signal, sys
from skyline.bench.store import StoreError, open_store
from tests.bench.store.records import make_point, make_run, make_table
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run, saved = make_run(), 0
with open_store(sys.argv[1]) as store:
    store.save_run(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    try:
        for number in range(10_000):
            store.save_point(make_point(run, requests=make_table(300)).model_copy(update={"key": str(number)}))
            saved += 1
    except StoreError as error:
        print(saved, len(store.points(with_samples=True)), error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bench.sqlite3")], capture_output=True, text=True, check=True
    )
    saved, held, message = done.stdout.split(" ", 2)
    assert int(saved) == int(held) > 3
    assert "the disk cannot be written or read" in message or "the disk is full" in message
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_store_that_another_process_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skyline.bench.store.database.BUSY_S", 0.2)
    file = tmp_path / "bench.sqlite3"
    with open_store(file) as store:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process has held the store's lock for too long"):
            store.save_run(make_run())
        assert store.runs() == []
        other.rollback()
        other.close()
        store.save_run(make_run())


@pytest.mark.parametrize(
    "address", ["mysql://localhost/x", "sqlite://", "sqlite:///:memory:", "postgresql+pg8000://h/d"]
)
def test_addresses_of_no_store(address: str) -> None:
    with pytest.raises(StoreError, match="name a file, or an address such as postgresql://"):
        open_store(address)
    with pytest.raises(StoreError, match="is not an address"):
        open_store("://")


def test_no_password_is_shown() -> None:
    with pytest.raises(StoreError) as raised:
        open_store("mysql://user:s3cret@localhost/x")
    assert "s3cret" not in str(raised.value)


def test_a_server_that_is_not_there(postgres: Server, tmp_path: Path) -> None:
    for address in (
        "postgresql://me:hidden@127.0.0.1:1/bench",
        f"postgresql+psycopg://me:hidden@/bench?host={tmp_path}",
    ):
        with pytest.raises(StoreError, match=r"cannot be reached\. Check that the server runs") as raised:
            open_store(address)
        assert "hidden" not in str(raised.value)


def test_a_wrong_password_and_a_missing_database(postgres: Server) -> None:
    with pytest.raises(StoreError, match="refused the user or the password") as raised:
        open_store(postgres.url("postgres", password="wrong"))
    assert "wrong" not in str(raised.value)
    with pytest.raises(StoreError, match=r"there is no such database .* Create it with createdb"):
        open_store(postgres.url("missing"))


def test_the_three_ways_to_write_postgresql(postgres: Server) -> None:
    address = postgres.url(postgres.new_database())
    stamps = set()
    for scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        with open_store(address.replace("postgresql", scheme, 1)) as store:
            stamps.add(store.stamp())
    assert len(stamps) == 1


def test_a_server_that_stops_and_comes_back(postgres: Server) -> None:
    run = make_run()
    with open_store(postgres.url(postgres.new_database())) as store:
        store.save_run(run)
        store.save_point(make_point(run))
        postgres.stop()
        try:
            with pytest.raises(StoreError, match="cannot be reached"):
                store.save_point(make_point(run))
        finally:
            postgres.start()
        assert len(store.points()) == 1
        store.save_point(make_point(run, minutes=1))
        assert len(store.points()) == 1


def test_a_full_disk_of_the_server(postgres: Server) -> None:
    """The server's own error for it, raised by a trigger."""
    run = make_run()
    with open_store(postgres.url(postgres.new_database())) as store:
        store.save_run(run)
        store.save_point(make_point(run))
        with store._engine.begin() as connection:
            connection.execute(
                text(
                    "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                    " RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$"
                )
            )
            connection.execute(
                text("CREATE TRIGGER t BEFORE INSERT ON bench_points FOR EACH ROW EXECUTE FUNCTION full_disk()")
            )
        with pytest.raises(StoreError, match=r"the server's disk is full\. What was saved before is safe"):
            store.save_point(make_point(run, minutes=1))
        assert len(store.points()) == 1


def test_a_user_without_rights(postgres: Server) -> None:
    import psycopg

    database = postgres.new_database()
    with psycopg.connect(postgres.url(database), autocommit=True) as connection:
        connection.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    address = postgres.url(database, password="guest").replace("tester:", "guest:")
    with pytest.raises(StoreError, match=r"lacks a privilege\. Grant CREATE"):
        open_store(address)


def test_a_store_of_a_newer_program_is_left_alone(where: str) -> None:
    with open_store(where) as store, store._writer.begin() as connection:
        connection.execute(text("UPDATE bench_store SET version = 2"))
    with pytest.raises(StoreError, match=r"schema version 2, and this program knows 1: .*pip install -U skyline-llm"):
        open_store(where)


def test_an_older_store_is_migrated(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    with open_store(where) as store:
        store.save_run(run)
        before = store.stamp()
    monkeypatch.setattr(schema, "VERSION", 3)
    steps = {
        1: lambda c: c.execute(text("ALTER TABLE bench_runs ADD COLUMN branch TEXT")),
        2: lambda c: c.execute(text("UPDATE bench_runs SET branch = suite")),
    }
    monkeypatch.setattr(schema, "MIGRATIONS", steps)
    for _ in range(2):
        with open_store(where) as store:
            assert store.runs() == [run]
            assert store.stamp() != before
            with store._engine.begin() as connection:
                row = connection.execute(text("SELECT branch, version FROM bench_runs, bench_store")).one()
            assert tuple(row) == ("stored", 3)


def test_a_migration_that_fails_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    with open_store(where) as store:
        store.save_run(run)
    with monkeypatch.context() as later:
        later.setattr(schema, "VERSION", 3)
        later.setitem(schema.MIGRATIONS, 1, lambda c: c.execute(text("ALTER TABLE bench_runs ADD COLUMN branch TEXT")))
        later.setitem(schema.MIGRATIONS, 2, lambda c: c.execute(text("SELECT nonsense FROM nowhere")))
        with pytest.raises(StoreError, match="nowhere"):
            open_store(where)
    with open_store(where) as store:
        assert store.runs() == [run]
        with store._engine.begin() as connection:
            assert "branch" not in connection.execute(text("SELECT * FROM bench_runs")).one()._mapping
