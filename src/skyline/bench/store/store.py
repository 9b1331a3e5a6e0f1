"""The store's operations. Each saving is one transaction, and durable when it returns."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from sqlalchemy import URL, Connection, Table, delete, func, insert, select, update

from skyline.bench.results import SCHEMA_VERSION, AccuracyResult, Export, PointResult, RequestTable, Run, Timeline, now
from skyline.bench.store import codec, schema
from skyline.bench.store.database import connect, locate
from skyline.bench.store.errors import StoreError, explained
from skyline.bench.store.schema import accuracy, points, runs, samples, state


class Counts(NamedTuple):
    """How many records an import added: those that the store did not hold before."""

    runs: int
    points: int
    accuracy: int


def open_store(where: str | Path | None = None) -> Store:
    """Opens a store, and creates it where there is none; one of an older version is migrated.

    `where`: a file or a URL, see `locate`. Raises StoreError if it cannot be reached, or a newer Skyline wrote it.
    """
    return Store(locate(where))


class Store:
    """Results in a database. Threads and processes may use one at once: readers do not wait for a writer.

    Runs and points are named by id; where a run is asked for, the beginning of its id or its label will do. Every
    method raises StoreError if the database fails; what was saved before stays.
    """

    def __init__(self, url: URL) -> None:
        is_file = url.get_backend_name() == "sqlite"
        self.where = str(url.database) if is_file else url.render_as_string(hide_password=True)
        self._engine = connect(url)
        self._writer = self._engine.execution_options(write=True)
        try:
            with explained(self.where):
                with self._engine.begin() as connection:
                    usable = schema.current(schema.version_of(connection), self.where)
                if not usable:
                    with self._writer.begin() as connection:
                        schema.upgrade(connection, self.where)
        except StoreError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    # Saving

    def save_run(self, run: Run) -> None:
        """Adds the run, or replaces it by its id; its points stay."""
        with self._write() as connection:
            _put_run(connection, run)

    def finish_run(self, run: str, status: Literal["finished", "failed"]) -> None:
        """Notes that the run ended now."""
        with self._write() as connection:
            found = self._run(connection, run)
            _put_run(connection, found.model_copy(update={"status": status, "finished": now()}))

    def save_point(self, point: PointResult) -> None:
        """Adds the point, or replaces it: by its id, and what its run held under the same key."""
        with self._write() as connection:
            _put_point(connection, point)

    def save_accuracy(self, result: AccuracyResult) -> None:
        """Adds the result, or replaces it: by its id, and what its run held of the same engine, model and task."""
        with self._write() as connection:
            _put_accuracy(connection, result)

    def delete_run(self, run: str) -> None:
        """Deletes the run with its points and accuracy results."""
        with self._write() as connection:
            connection.execute(delete(runs).where(runs.c.id == self._run_id(connection, run)))

    # Reading

    def runs(self) -> list[Run]:
        """All runs, the newest first."""
        with self._read() as connection:
            rows = connection.execute(select(runs.c.record).order_by(runs.c.started.desc(), runs.c.id)).scalars()
            return [codec.decode(Run, record) for record in rows]

    def run(self, which: str) -> Run:
        """The run of this id, the newest with this label, or the one whose id begins so."""
        with self._read() as connection:
            return self._run(connection, which)

    def points(
        self,
        run: str | None = None,
        *,
        engine: str | None = None,
        model: str | None = None,
        workload: str | None = None,
        since: datetime.datetime | None = None,
        with_samples: bool = False,
    ) -> list[PointResult]:
        """Points in the order in which they were begun. `engine` is the name that the suite gives it.

        Without `with_samples` their `requests` and `timeline` are None, and are not read from the disk."""
        with self._read() as connection:
            query = select(points.c.record, *([samples.c.requests, samples.c.timeline] if with_samples else []))
            if with_samples:
                query = query.select_from(points.outerjoin(samples))
            if run is not None:
                query = query.where(points.c.run == self._run_id(connection, run))
            for column, wanted in ((points.c.engine, engine), (points.c.model, model), (points.c.workload, workload)):
                if wanted is not None:
                    query = query.where(column == codec.name(wanted))
            if since is not None:
                query = query.where(points.c.started >= codec.micros(since))
            return [_point(*row) for row in connection.execute(query.order_by(points.c.started, points.c.id))]

    def point(self, which: str) -> PointResult:
        """The point of this id, or whose id begins so, with its samples."""
        with self._read() as connection:
            query = (
                select(points.c.record, samples.c.requests, samples.c.timeline)
                .select_from(points.outerjoin(samples))
                .where(points.c.id == self._by_prefix(connection, points, which))
            )
            return _point(*connection.execute(query).one())

    def finished_keys(self, run: str) -> set[str]:
        """Keys of the points that a resumed run need not repeat: all that were measured, the invalid among them."""
        with self._read() as connection:
            query = select(points.c.key).where(
                points.c.run == self._run_id(connection, run), points.c.status.in_(("ok", "invalid"))
            )
            return set(connection.execute(query).scalars())

    def accuracy(self, run: str | None = None) -> list[AccuracyResult]:
        """Accuracy results, the oldest first."""
        with self._read() as connection:
            query = select(accuracy.c.record).order_by(accuracy.c.finished, accuracy.c.id)
            if run is not None:
                query = query.where(accuracy.c.run == self._run_id(connection, run))
            return [codec.decode(AccuracyResult, record) for record in connection.execute(query).scalars()]

    def stamp(self) -> str:
        """Another text whenever something was saved or deleted, by any process. Reads one row."""
        with self._read() as connection:
            identity, changes = connection.execute(select(state.c.identity, state.c.changes)).one()
            return f"{identity}-{changes}"

    # Files

    def export(self, runs: Sequence[str] | None = None) -> Export:
        """These runs (all by default) with everything that belongs to them."""
        found = self.runs() if runs is None else [self.run(which) for which in runs]
        ids = list(dict.fromkeys(run.id for run in found))
        return Export(
            runs=[next(run for run in found if run.id == each) for each in ids],
            points=[point for each in ids for point in self.points(each, with_samples=True)],
            accuracy=[result for each in ids for result in self.accuracy(each)],
        )

    def import_(self, export: Export) -> Counts:
        """Takes in what another store exported, in one transaction. Records are told apart by id, so that a second
        import adds nothing; where a point was measured in both stores, the later measurement stays.
        """
        if export.schema_version > SCHEMA_VERSION:
            raise StoreError(
                f"this export has schema version {export.schema_version}, and this program knows {SCHEMA_VERSION}: a"
                " newer Skyline wrote it. Upgrade with `pip install -U skyline-llm`"
            )
        with self._write() as connection:
            before = _count(connection)
            for run in export.runs:
                _put_run(connection, run)
            for point in export.points:
                held = connection.execute(
                    select(points.c.finished).where(points.c.run == point.run, points.c.key == point.key)
                ).scalar()
                if held is None or held <= codec.micros(point.finished):
                    _put_point(connection, point)
            for result in export.accuracy:
                _put_accuracy(connection, result)
            return Counts(*(after - earlier for after, earlier in zip(_count(connection), before, strict=True)))

    # Within

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with explained(self.where), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """One transaction. Counting it first has PostgreSQL order writers, as SQLite does: none can deadlock."""
        with explained(self.where), self._writer.begin() as connection:
            connection.execute(update(state).values(changes=state.c.changes + 1))
            yield connection

    def _run(self, connection: Connection, which: str) -> Run:
        run = self._run_id(connection, which)
        return codec.decode(Run, connection.execute(select(runs.c.record).where(runs.c.id == run)).scalar_one())

    def _run_id(self, connection: Connection, which: str) -> str:
        label = select(runs.c.id).where(runs.c.label == codec.name(which)).order_by(runs.c.started.desc(), runs.c.id)
        exact = connection.execute(select(runs.c.id).where(runs.c.id == codec.name(which))).scalar()
        found: str | None = exact or connection.execute(label.limit(1)).scalar()
        return found or self._by_prefix(connection, runs, which)

    def _by_prefix(self, connection: Connection, table: Table, which: str) -> str:
        """The id that is `which`, or the only one that begins so."""
        what, prefix = ("run", "point")[table is points], codec.name(which)
        begins = func.substr(table.c.id, 1, len(prefix)) == prefix
        query = select(table.c.id).where(begins).order_by(table.c.id).limit(5)
        ids = list(connection.execute(query).scalars()) if prefix else []
        if prefix in ids or len(ids) == 1:
            return prefix if prefix in ids else str(ids[0])
        if ids:
            raise StoreError(f"several {what}s begin with {which!r} ({', '.join(ids)}): give more of the id")
        raise StoreError(f"there is no {what} {which!r} in {self.where}{_newest(connection) if table is runs else ''}")


def _newest(connection: Connection) -> str:
    """What could have been meant."""
    query = select(runs.c.id, runs.c.label, runs.c.suite).order_by(runs.c.started.desc()).limit(5)
    names = [f"{id_[:8]} ({label or suite})" for id_, label, suite in connection.execute(query)]
    return f"; the newest are {', '.join(names)}" if names else ", which is empty"


def _put_run(connection: Connection, run: Run) -> None:
    values = {
        "label": None if run.label is None else codec.name(run.label),
        "suite": codec.name(run.suite.name),
        "suite_hash": codec.name(run.suite_hash),
        "status": run.status,
        "started": codec.micros(run.started),
        "record": codec.encode(run),
    }
    changed = connection.execute(update(runs).where(runs.c.id == run.id).values(values))
    if changed.rowcount == 0:
        connection.execute(insert(runs).values(id=run.id, **values))


def _put_point(connection: Connection, point: PointResult) -> None:
    same = (points.c.run == point.run) & (points.c.key == point.key)
    connection.execute(delete(points).where((points.c.id == point.id) | same))
    connection.execute(
        insert(points).values(
            id=point.id,
            run=point.run,
            key=point.key,
            status=point.status,
            engine=codec.name(point.spec.engine.name),
            model=codec.name(point.spec.model.name),
            workload=codec.name(point.spec.workload.name),
            hardware=codec.name(point.provenance.hardware.name),
            started=codec.micros(point.started),
            finished=codec.micros(point.finished),
            record=codec.encode(point, without={"requests", "timeline"}),
        )
    )
    if point.requests is not None or point.timeline is not None:
        packed = {"requests": codec.pack(point.requests), "timeline": codec.pack(point.timeline)}
        connection.execute(insert(samples).values(point=point.id, **packed))


def _put_accuracy(connection: Connection, result: AccuracyResult) -> None:
    named = {what: codec.name(getattr(result, what)) for what in ("engine", "model", "task")}
    same = (accuracy.c.run == result.run) & (accuracy.c.engine == named["engine"])
    same &= (accuracy.c.model == named["model"]) & (accuracy.c.task == named["task"])
    connection.execute(delete(accuracy).where((accuracy.c.id == result.id) | same))
    connection.execute(
        insert(accuracy).values(
            id=result.id,
            run=result.run,
            finished=codec.micros(result.finished),
            record=codec.encode(result),
            **named,
        )
    )


def _point(record: str, requests: bytes | None = None, timeline: bytes | None = None) -> PointResult:
    point = codec.decode(PointResult, record)
    if requests is None and timeline is None:
        return point
    unpacked: dict[str, Any] = {
        "requests": codec.unpack(RequestTable, requests),
        "timeline": codec.unpack(Timeline, timeline),
    }
    return point.model_copy(update=unpacked)


def _count(connection: Connection) -> list[int]:
    return [
        connection.execute(select(func.count()).select_from(each)).scalar_one() for each in (runs, points, accuracy)
    ]
