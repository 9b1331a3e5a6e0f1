"""What is saved comes back, is found again and is replaced as the store says: on SQLite and on PostgreSQL."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from skyline.bench.estimate import Estimate
from skyline.bench.results import Export, RequestTable, Timeline
from skyline.bench.store import StoreError, open_store
from tests.bench.store.records import MONDAY, make_accuracy, make_full_point, make_point, make_run, make_table, specs


def test_every_record_comes_back_as_it_was(where: str) -> None:
    run = make_run(label="a label: 'é' 模型", status="failed", finished=MONDAY)
    full, bare = make_full_point(run), make_point(run)
    result = make_accuracy(run, exact_match=None, standard_error=None, reason="\u0000 and \u2029")
    with open_store(where) as store:
        store.save_run(run)
        store.save_point(full)
        store.save_point(bare)
        store.save_accuracy(result)
    with open_store(where) as store:
        assert store.runs() == [run]
        assert store.run(run.id) == run
        assert store.point(full.id) == full
        assert store.point(bare.id) == bare
        assert {p.id: p for p in store.points(with_samples=True)} == {full.id: full, bare.id: bare}
        assert store.accuracy() == [result]


floats = st.floats(allow_nan=False, allow_infinity=False)
columns = st.lists(st.none() | floats, max_size=5)
texts = st.text(max_size=20)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reason=texts | st.none(),
    label=texts | st.none(),
    value=floats | st.none(),
    requests=st.none() | st.builds(RequestTable, start=columns, first=columns, error=st.lists(st.none() | texts)),
    timeline=st.none() | st.builds(Timeline, bin_s=floats, tokens=st.lists(floats), running=st.lists(floats)),
    finished=st.datetimes(timezones=st.just(datetime.UTC)),
)
def test_any_value_comes_back(
    where: str,
    reason: str | None,
    label: str | None,
    value: float | None,
    requests: RequestTable | None,
    timeline: Timeline | None,
    finished: datetime.datetime,
) -> None:
    run = make_run(label=label)
    point = make_point(
        run,
        reason=reason,
        metrics={"power": Estimate(value=value)},
        requests=requests,
        timeline=timeline,
    ).model_copy(update={"finished": finished})
    with open_store(where) as store:
        store.save_run(run)
        store.save_point(point)
        assert store.run(run.id) == run
        assert store.point(point.id) == point


def test_half_a_surrogate_pair_is_replaced(where: str) -> None:
    """As an engine's output may hold; no database and no JSON can."""
    run = make_run(label="\ud83d")
    with open_store(where) as store:
        store.save_run(run)
        store.save_point(make_point(run, status="failed", reason="crashed: \udcff"))
        assert store.run("\ud83d").label == "?"
        assert store.points()[0].reason == "crashed: ?"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(where: str, number: float) -> None:
    run = make_run()
    with open_store(where) as store:
        store.save_run(run)
        before = store.stamp()
        with pytest.raises(StoreError, match=r"metrics\.power\.low\.(nan|inf) is not a finite number"):
            store.save_point(make_point(run, metrics={"power": Estimate(value=1, low=number)}))
        with pytest.raises(StoreError, match=r"first\.1\.(nan|inf) is not a finite number"):
            store.save_point(make_point(run, requests=RequestTable(first=[0.0, number])))
        assert store.points() == []
        assert store.stamp() == before


def test_points_without_samples_are_read_without_them(where: str) -> None:
    run = make_run()
    point = make_point(run, requests=make_table(500), timeline=Timeline(bin_s=1, tokens=[1.0], running=[1.0]))
    with open_store(where) as store:
        store.save_run(run)
        store.save_point(point)
        assert store.points() == [point.model_copy(update={"requests": None, "timeline": None})]
        with store._writer.begin() as connection:
            connection.execute(text("UPDATE bench_samples SET requests = timeline, timeline = requests"))
        assert len(store.points()) == 1
        with pytest.raises(StoreError, match="cannot be read"):
            store.points(with_samples=True)


def test_samples_are_small_on_disk(where: str) -> None:
    run = make_run()
    table = make_table(5000)
    with open_store(where) as store:
        store.save_run(run)
        store.save_point(make_point(run, requests=table))
        with store._engine.begin() as connection:
            stored = connection.execute(text("SELECT requests FROM bench_samples")).scalar_one()
    assert len(stored) < len(table.model_dump_json()) / 4


def test_points_are_filtered(where: str) -> None:
    first, second = make_run(), make_run(days=1)
    with open_store(where) as store:
        for run in (first, second):
            store.save_run(run)
            for minute, spec in enumerate(specs()):
                store.save_point(make_point(run, spec, minutes=minute))
        assert len(specs()) == 12
        assert len(store.points()) == 24
        assert [p.spec for p in store.points(first.id)] == specs()
        assert {p.spec.engine.name for p in store.points(engine="another's")} == {"another's"}
        assert len(store.points(engine="another's")) == 12
        assert len(store.points(model="größer 模型", workload="chat")) == 4
        assert len(store.points(second.id, engine="skyline", model="demo", workload="1k/1k")) == 2
        assert store.points(engine="%") == []
        day = second.started
        assert {p.run for p in store.points(since=day)} == {second.id}
        assert len(store.points(since=day + datetime.timedelta(minutes=1))) == 11
        # Another zone's clock, and none, which is taken as UTC.
        elsewhere = day.astimezone(datetime.timezone(datetime.timedelta(hours=-7)))
        assert len(store.points(since=elsewhere)) == len(store.points(since=day.replace(tzinfo=None))) == 12


def test_runs_are_named_by_id_label_or_beginning(where: str) -> None:
    with open_store(where) as store:
        with pytest.raises(StoreError, match=r"there is no run 'main' in .*, which is empty"):
            store.run("main")
        old = make_run(label="main", id="aa11" + "0" * 28)
        new = make_run(days=1, label="main", id="aa22" + "0" * 28)
        other = make_run(days=2, id="bb00" + "0" * 28)
        for run in (new, other, old):
            store.save_run(run)
        assert store.runs() == [other, new, old]
        assert store.run("main") == new
        assert store.run("aa1") == old
        assert store.run("b") == other
        with pytest.raises(StoreError, match=r"several runs begin with 'aa' .*give more"):
            store.run("aa")
        with pytest.raises(StoreError, match=r"there is no run 'A'.*the newest are bb000000 \(stored\)"):
            store.run("A")
        for nothing in ("", "_", "%"):
            with pytest.raises(StoreError, match="there is no run"):
                store.run(nothing)
        point = make_point(old, requests=make_table())
        store.save_point(point)
        assert store.points("aa1", with_samples=True) == [store.point(point.id[:10])] == [point]
        with pytest.raises(StoreError, match="there is no point 'zz'"):
            store.point("zz")


def test_a_point_is_measured_again(where: str) -> None:
    run = make_run()
    one, two, three = specs()[:3]
    failed = make_point(run, one, status="failed", reason="crashed", requests=make_table())
    with open_store(where) as store:
        store.save_run(run)
        store.save_point(failed)
        store.save_point(make_point(run, two, status="invalid"))
        store.save_point(make_point(run, three))
        assert store.finished_keys(run.id) == {two.key, three.key}
        again = make_point(run, one, minutes=9)
        store.save_point(again)
        assert store.finished_keys(run.id) == {one.key, two.key, three.key}
        assert [p for p in store.points(run.id, with_samples=True) if p.key == one.key] == [again]
        changed = again.model_copy(update={"reason": "noted", "key": "another"})
        store.save_point(changed)
        assert store.point(again.id) == changed
        assert len(store.points()) == 3


def test_the_same_key_in_two_runs_is_two_points(where: str) -> None:
    first, second = make_run(), make_run(days=1)
    with open_store(where) as store:
        for run in (first, second):
            store.save_run(run)
            store.save_point(make_point(run))
        assert len(store.points()) == 2


def test_a_run_ends_and_keeps_its_points(where: str) -> None:
    run = make_run(label="before")
    with open_store(where) as store:
        store.save_run(run)
        store.save_point(make_point(run))
        store.save_run(run.model_copy(update={"label": "after"}))
        store.finish_run(run.id, "finished")
        ended = store.run("after")
        assert ended.status == "finished"
        assert ended.finished is not None and ended.finished > run.started
        assert len(store.points(run.id)) == 1
        with pytest.raises(StoreError, match="no run"):
            store.finish_run("0000", "failed")


def test_accuracy_is_replaced_for_its_configuration(where: str) -> None:
    run = make_run()
    with open_store(where) as store:
        store.save_run(run)
        store.save_accuracy(make_accuracy(run, passed=False))
        again = make_accuracy(run, finished=run.started + datetime.timedelta(hours=1))
        earlier = make_accuracy(run, engine="another's")
        for result in (again, earlier):
            store.save_accuracy(result)
        assert store.accuracy(run.id) == [earlier, again]


def test_what_belongs_to_no_run_is_refused(where: str) -> None:
    run = make_run()
    with open_store(where) as store:
        for save in (lambda: store.save_point(make_point(run)), lambda: store.save_accuracy(make_accuracy(run))):
            with pytest.raises(StoreError, match="Save the run first"):
                save()
        assert store.points() == []


def test_a_run_is_deleted_with_all_of_its_own(where: str) -> None:
    gone, kept = make_run(), make_run(days=1)
    with open_store(where) as store:
        for run in (gone, kept):
            store.save_run(run)
            store.save_point(make_full_point(run))
            store.save_accuracy(make_accuracy(run))
        store.delete_run(gone.id)
        assert store.runs() == [kept]
        assert [p.run for p in store.points()] == [r.run for r in store.accuracy()] == [kept.id]
        with store._engine.begin() as connection:
            assert connection.execute(text("SELECT count(*) FROM bench_samples")).scalar_one() == 1


def test_an_export_is_imported_once(where: str, tmp_path: Path) -> None:
    first, second = make_run(), make_run(days=1, label="second")
    with open_store(where) as store:
        for run in (first, second):
            store.save_run(run)
            store.save_point(make_full_point(run))
            store.save_point(make_point(run))
            store.save_accuracy(make_accuracy(run))
        everything = store.export()
        assert {len(everything.runs), len(everything.accuracy)} == {2}
        assert len(everything.points) == 4
        part = store.export(["second", second.id])
        assert part.runs == [second]
        assert {p.run for p in part.points} == {second.id}
        assert any(p.requests for p in part.points)
    read = Export.model_validate_json(everything.model_dump_json())
    with open_store(tmp_path / "other.sqlite3") as other:
        assert other.import_(part) == (1, 2, 1)
        assert other.import_(read) == (1, 2, 1)
        assert other.import_(read) == (0, 0, 0)
        assert other.export() == everything


def test_the_later_measurement_of_a_point_stays(where: str) -> None:
    run = make_run()
    early, late = make_point(run), make_point(run, minutes=5)
    with open_store(where) as store:
        store.save_run(run)
        store.save_point(late)
        store.import_(Export(runs=[run], points=[early]))
        assert store.points() == [late]
        store.save_point(early)
        store.import_(Export(runs=[run], points=[late]))
        assert store.points() == [late]


def test_an_import_is_whole_or_nothing(where: str) -> None:
    run, stranger = make_run(), make_run()
    with open_store(where) as store:
        with pytest.raises(StoreError, match="Save the run first"):
            store.import_(Export(runs=[run], points=[make_point(run), make_point(stranger)]))
        assert store.runs() == []
        with pytest.raises(StoreError, match="newer Skyline"):
            store.import_(Export(schema_version=99, runs=[], points=[]))


def test_the_stamp_changes_with_every_saving_and_with_nothing_else(where: str) -> None:
    run = make_run()
    with open_store(where) as store, open_store(where) as reader:
        stamps = [reader.stamp()]
        for save in (
            lambda: store.save_run(run),
            lambda: store.save_point(make_point(run)),
            lambda: store.save_accuracy(make_accuracy(run)),
            lambda: store.finish_run(run.id, "finished"),
            lambda: store.import_(store.export()),
            lambda: store.delete_run(run.id),
        ):
            save()
            store.runs()
            store.points()
            stamps.append(reader.stamp())
            assert stamps[-1] == store.stamp()
        assert len(set(stamps)) == len(stamps)


def test_the_stamp_tells_stores_apart(tmp_path: Path) -> None:
    with open_store(tmp_path / "a.sqlite3") as one, open_store(tmp_path / "b.sqlite3") as other:
        assert one.stamp() != other.stamp()


def test_where_the_store_is_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKYLINE_BENCH_STORE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with open_store() as store:
        store.save_run(make_run())
    assert (tmp_path / "data" / "skyline" / "bench.sqlite3").exists()
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with open_store():
        assert (tmp_path / "home" / ".local" / "share" / "skyline" / "bench.sqlite3").exists()
    monkeypatch.setenv("SKYLINE_BENCH_STORE", str(tmp_path / "named.sqlite3"))
    with open_store(), open_store(f"sqlite:///{tmp_path}/url.sqlite3"), open_store("~/mine.sqlite3"):
        assert all((tmp_path / name).exists() for name in ("named.sqlite3", "url.sqlite3", "home/mine.sqlite3"))
