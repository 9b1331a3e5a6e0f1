"""Where the store is, and connections to it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

from skyline.bench.store.errors import StoreError

VARIABLE = "SKYLINE_BENCH_STORE"

# Seconds that a writer waits for the others, and that a PostgreSQL server may take to answer a new connection.
BUSY_S = 60
CONNECT_S = 10


def locate(where: str | Path | None = None) -> URL:
    """The address of the store. Raises StoreError if it is none that can be used.

    `where`: a file, or a URL (sqlite:///FILE, postgresql://...). Without it the variable SKYLINE_BENCH_STORE, else
    skyline/bench.sqlite3 in the user's data folder
    (https://specifications.freedesktop.org/basedir-spec/latest: $XDG_DATA_HOME, or ~/.local/share).
    """
    if where is None:
        where = os.environ.get(VARIABLE) or data_folder() / "skyline" / "bench.sqlite3"
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(Path(where).expanduser()))
    try:
        url = make_url(where)
    except ArgumentError:
        raise StoreError(f"{where} is not an address: name a file, or postgresql://USER@HOST/DATABASE") from None
    match url.drivername:
        case "sqlite" if url.database not in (None, "", ":memory:"):
            return url
        case "postgresql" | "postgres" | "postgresql+psycopg":
            return url.set(drivername="postgresql+psycopg")
    raise StoreError(
        f"results cannot be stored at {url.render_as_string(hide_password=True)}: name a file, or an address such as"
        " postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    )


def data_folder() -> Path:
    configured = os.environ.get("XDG_DATA_HOME", "")
    # The specification has relative paths ignored.
    return Path(configured) if os.path.isabs(configured) else Path.home() / ".local" / "share"


def connect(url: URL) -> Engine:
    """An engine that begins transactions as the store needs them. Nothing is opened yet.

    With the execution option `write=True` a transaction takes SQLite's write lock at its begin, where waiting for it
    is safe, and not at its first write, where it would fail if another process has written since
    (https://www.sqlite.org/lang_transaction.html).
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite(url)
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise StoreError(
            f"PostgreSQL needs a driver ({error}): install it with `pip install 'skyline-llm[postgres]'`"
        ) from None
    # pre_ping: a server that was restarted costs a reconnection, not the next result.
    return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_S})


def _sqlite(url: URL) -> Engine:
    path = Path(url.database or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the folder of the store {path} cannot be made ({error.strerror}); name another place with {VARIABLE}"
        ) from None
    engine = create_engine(url, connect_args={"timeout": BUSY_S})
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: sqlite3.Connection, _: Any) -> None:
    # Python's own handling of transactions begins none before DDL and SELECT; `_begin` does it instead.
    connection.isolation_level = None
    for pragma in (
        # Readers and one writer at once.
        "journal_mode=WAL",
        # In WAL mode only FULL has a result on disk when its saving returns (https://www.sqlite.org/pragma.html).
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
