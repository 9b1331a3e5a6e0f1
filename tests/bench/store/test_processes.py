"""Several processes use one store, and some of them die."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import text

from skyline.bench.store import open_store
from tests.bench.store.records import make_point, make_run, make_table


def _writer(where: str, run: str, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bench.store.writer", where, run, str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_writers_and_a_reader_at_once(where: str) -> None:
    """All open a store that is not there yet, so that one of them makes it."""
    each, writers, run = 15, 3, make_run()
    started = [_writer(where, run.id, i * each, (i + 1) * each) for i in range(writers)]
    with open_store(where) as store:
        seen = [0]
        while any(process.poll() is None for process in started):
            seen.append(len(store.points()))
        said = [process.communicate()[0] for process in started]
        assert [process.returncode for process in started] == [0] * writers
        assert "\n".join(said).split() == [str(i) for i in range(each * writers)]
        assert seen == sorted(seen)
        assert {p.key for p in store.points(with_samples=True)} == {str(i) for i in range(each * writers)}
        # Each saving was counted once: none was lost between two that wrote at once.
        assert store.stamp().endswith(f"-{writers + each * writers}")


def test_threads_share_a_store(where: str) -> None:
    run = make_run()
    with open_store(where) as store, ThreadPoolExecutor(8) as pool:
        store.save_run(run)
        points = [make_point(run).model_copy(update={"key": str(i)}) for i in range(40)]
        list(pool.map(store.save_point, points))
        assert {p.id for p in store.points()} == {p.id for p in points}


def test_what_a_killed_writer_had_saved_is_there(where: str) -> None:
    run = make_run()
    process = _writer(where, run.id, 0, 100_000)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(20)]
    process.kill()
    said += [int(line) for line in process.stdout.read().split("\n") if line]
    process.wait()
    process.stdout.close()
    with open_store(where) as store:
        points = store.points(with_samples=True)
        kept = {int(point.key) for point in points}
        # What it said it had saved, and at most one more that it had no time left to speak of.
        assert set(said) <= kept <= {*said, said[-1] + 1}
        assert all(point.requests == make_table(20) for point in points)
        store.save_point(make_point(run))
        if where.startswith("/"):
            with store._engine.begin() as connection:
                assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
