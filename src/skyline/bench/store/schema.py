"""Tables, and how a store of an older version becomes one of this version.

What is filtered on is a column; the whole record stands beside it as JSON. Times are microseconds since 1970 (UTC).
Request tables and timelines are compressed, in a table of their own, so that lists of points do not read them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
    text,
    update,
)

from skyline.bench.store.errors import StoreError

VERSION = 1

# MIGRATIONS[n] makes a store of version n one of version n + 1.
MIGRATIONS: dict[int, Callable[[Connection], None]] = {}

metadata = MetaData()

# One row. `changes` counts transactions that wrote, so that readers see cheaply whether there is something new;
# `identity` tells a store from another one that was put in its place.
state = Table(
    "bench_store",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("identity", Text, nullable=False),
    Column("changes", BigInteger, nullable=False),
)

runs = Table(
    "bench_runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("label", Text),
    Column("suite", Text, nullable=False),
    Column("suite_hash", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("started", BigInteger, nullable=False),
    Column("record", Text, nullable=False),
    Index("bench_runs_label", "label"),
    Index("bench_runs_started", "started"),
)

points = Table(
    "bench_points",
    metadata,
    Column("id", Text, primary_key=True),
    Column("run", Text, ForeignKey("bench_runs.id", ondelete="CASCADE"), nullable=False),
    Column("key", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("engine", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("workload", Text, nullable=False),
    Column("hardware", Text, nullable=False),
    Column("started", BigInteger, nullable=False),
    Column("finished", BigInteger, nullable=False),
    Column("record", Text, nullable=False),
    # The same key is the same measurement: a point that is measured again in its run replaces the former.
    UniqueConstraint("run", "key", name="bench_points_run_key"),
    Index("bench_points_engine", "engine"),
    Index("bench_points_model", "model"),
    Index("bench_points_workload", "workload"),
    Index("bench_points_started", "started"),
)

samples = Table(
    "bench_samples",
    metadata,
    Column("point", Text, ForeignKey("bench_points.id", ondelete="CASCADE"), primary_key=True),
    Column("requests", LargeBinary),
    Column("timeline", LargeBinary),
)

accuracy = Table(
    "bench_accuracy",
    metadata,
    Column("id", Text, primary_key=True),
    Column("run", Text, ForeignKey("bench_runs.id", ondelete="CASCADE"), nullable=False),
    Column("engine", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("finished", BigInteger, nullable=False),
    Column("record", Text, nullable=False),
    UniqueConstraint("run", "engine", "model", "task", name="bench_accuracy_configuration"),
)


def version_of(connection: Connection) -> int | None:
    """The store's version; None where there are no tables of a store yet."""
    if not inspect(connection).has_table(state.name):
        return None
    version: int = connection.execute(select(state.c.version)).scalar_one()
    return version


def current(version: int | None, where: str) -> bool:
    """Whether a store of this version can be used as it is. Raises StoreError if a newer program wrote it."""
    if version is not None and version > VERSION:
        raise StoreError(
            f"the store {where} has schema version {version}, and this program knows {VERSION}: a newer Skyline wrote"
            " it. Upgrade with `pip install -U skyline-llm`, or name another store"
        )
    return version == VERSION


def upgrade(connection: Connection, where: str) -> None:
    """Creates the tables, or migrates those of an older version, within the connection's transaction."""
    if connection.dialect.name == "postgresql":
        # Two programs that open a new store at once would both create its tables. The number only has to be ours.
        connection.execute(text("SELECT pg_advisory_xact_lock(7215061)"))
    version = version_of(connection)
    if current(version, where):
        return
    if version is None:
        metadata.create_all(connection)
        connection.execute(state.insert().values(id=1, version=VERSION, identity=uuid.uuid4().hex, changes=0))
        return
    for step in range(version, VERSION):
        MIGRATIONS[step](connection)
    connection.execute(update(state).values(version=VERSION, changes=state.c.changes + 1))
