"""What can go wrong with a database, in words that say what to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import exc


class StoreError(RuntimeError):
    """The store cannot be used, or does not hold what was asked for; the message says what to do."""


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns what SQLAlchemy and the drivers raise into StoreError. `where` names the database, without its password."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        raise StoreError(explain(where, error)) from error


def explain(where: str, error: exc.SQLAlchemyError) -> str:
    original = error.orig if isinstance(error, exc.DBAPIError) else error
    if isinstance(original, sqlite3.Error):
        return _sqlite(where, original)
    return _postgres(where, original or error)


def _sqlite(where: str, error: sqlite3.Error) -> str:
    # https://www.sqlite.org/rescode.html; an extended code's name begins with its primary code's.
    name = getattr(error, "sqlite_errorname", "") or ""
    advice = {
        "SQLITE_FULL": "the disk is full. What was saved before is safe and can be read; free some space, or keep"
        " results elsewhere with SKYLINE_BENCH_STORE",
        "SQLITE_IOERR": "the disk cannot be written or read (full, over a quota, or broken). What was saved before is"
        " safe; free some space, or keep results elsewhere with SKYLINE_BENCH_STORE",
        "SQLITE_NOTADB": "the file is not a result store (not an SQLite database). Name another file, or move this one"
        " away",
        "SQLITE_CORRUPT": "the file is damaged. Move it away and import a JSON export, or save what can be read with"
        " `sqlite3 FILE .recover`",
        "SQLITE_READONLY": "the file or its folder cannot be written by this user. Change its permissions, or name"
        " another place with SKYLINE_BENCH_STORE",
        "SQLITE_CANTOPEN": "the file cannot be opened or created. Check that the folder exists and that this user may"
        " write there, or name another place with SKYLINE_BENCH_STORE",
        "SQLITE_BUSY": "another process has held the store's lock for too long. End it, or try again",
        "SQLITE_CONSTRAINT_FOREIGNKEY": "the run that this belongs to is not in the store. Save the run first",
    }
    for code, text in advice.items():
        if name.startswith(code):
            return f"the store {where}: {text} ({error})"
    return f"the store {where}: {error} ({name or type(error).__name__})"


def _postgres(where: str, error: BaseException) -> str:
    # https://www.postgresql.org/docs/current/errcodes-appendix.html. A connection that fails has no code, only text.
    code = getattr(error, "sqlstate", None) or ""
    advice = {
        "28": "the server refused the user or the password. Correct them in the address, or in ~/.pgpass",
        "3D": "there is no such database on the server. Create it with createdb, or correct the name in the address",
        "42501": "the user lacks a privilege. Grant CREATE on the schema, and access to the bench_ tables",
        "25006": "the database is read-only (a standby?). Name one that can be written",
        "53100": "the server's disk is full. What was saved before is safe and can be read; free some space there",
        "53300": "the server has no connection left. End other clients, or raise max_connections",
        "23503": "the run that this belongs to is not in the store. Save the run first",
        "XX001": "a page of the database is damaged. Restore a backup, or import a JSON export into another store",
    }
    text = " ".join(str(error).split())
    for prefix, words in advice.items():
        if code.startswith(prefix):
            return f"the store {where}: {words} ({text})"
    if not code and ("authentication failed" in text or "no password supplied" in text):
        return f"the store {where}: {advice['28']} ({text})"
    if not code and "does not exist" in text:
        return f"the store {where}: {advice['3D']} ({text})"
    if not code or code.startswith(("08", "57P")):
        return (
            f"the store {where} cannot be reached. Check that the server runs and that the address is right"
            f" (postgresql://USER:PASSWORD@HOST:PORT/DATABASE) ({text})"
        )
    return f"the store {where}: {text} (SQLSTATE {code})"
