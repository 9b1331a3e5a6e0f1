"""Every test of the store runs on SQLite and on a real PostgreSQL server that the session starts for itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

_numbers = count()


def _programs() -> Path | None:
    """The folder of PostgreSQL's server programs; distributions keep them off PATH."""
    found = shutil.which("initdb")
    if found and shutil.which("pg_ctl"):
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    return folders[-1] if folders and (folders[-1] / "initdb").exists() else None


@dataclass(frozen=True)
class Server:
    """A PostgreSQL cluster in `folder`, at a Unix socket there. It refuses root, so `user` runs it then."""

    programs: Path
    folder: Path
    user: str | None
    password: str = "s3cret/@:%"

    def run(self, program: str, *args: str) -> None:
        done = subprocess.run(
            [self.programs / program, *args],
            user=self.user,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{program} failed: {done.stdout}{done.stderr}"

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -c fsync=off"
        log = str(self.folder / "log")
        self.run("pg_ctl", "start", "-w", "-D", str(self.folder / "data"), "-l", log, "-o", options)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", str(self.folder / "data"))

    def url(self, database: str, password: str | None = None, host: str | None = None) -> str:
        from urllib.parse import quote

        secret = quote(password or self.password, safe="")
        return f"postgresql://tester:{secret}@/{database}?host={host or self.folder}"

    def new_database(self) -> str:
        import psycopg

        name = f"store_{next(_numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return name


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    programs = _programs()
    if programs is None:
        # Where the project is checked, a missing server must not pass for a passed test.
        (pytest.fail if "CI" in os.environ else pytest.skip)("there is no PostgreSQL server: install `postgresql`")
    # Not under tmp_path, whose parents only this user may enter.
    folder = Path(tempfile.mkdtemp(prefix="skyline-pg-"))
    user = None
    if os.geteuid() == 0:
        user = "nobody"
        shutil.chown(folder, user)
    server = Server(programs, folder, user)
    secret = folder / "secret"
    secret.write_text(server.password)
    secret.chmod(0o644)
    try:
        where = ["-D", str(folder / "data")]
        how = ["-U", "tester", "-A", "scram-sha-256", "--pwfile", str(secret), "-E", "UTF8", "--locale", "C", "-N"]
        server.run("initdb", *where, *how)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a store that does not exist yet."""
    if request.param == "sqlite":
        return str(tmp_path / "folder" / "bench.sqlite3")
    server: Server = request.getfixturevalue("postgres")
    return server.url(server.new_database())
