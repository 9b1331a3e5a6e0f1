"""The committed record of the quick suite is of the suite that ships, and answers what the README asks it."""

from __future__ import annotations

from pathlib import Path

from skyline.bench.recommend import parse_objective, recommend
from skyline.bench.results import Export
from skyline.bench.stats.quantiles import required_samples
from skyline.bench.suite import load_suite

RECORD = max((Path(__file__).parents[2] / "benchmarks" / "results").glob("*-bench-quick.json"))


def test_the_quick_record_answers_what_the_readme_asks() -> None:
    export = Export.model_validate_json(RECORD.read_text("utf-8"))
    (run,) = export.runs
    assert run.suite == load_suite("quick"), "record the suite again: it has changed"
    assert {point.key for point in export.points} == {spec.key for spec in run.suite.points()}
    keeping, others = recommend(export.points, export.accuracy, parse_objective("ttft=500ms,tpot=50ms"))
    assert keeping and keeping[0].point.spec.engine.name == "skyline"
    # Where one is missing, its requests are too correlated; too few they are not.
    for candidate in keeping + others:
        for key in ("ttft_p90", "tpot_p90"):
            assert candidate.point.metrics[key].n >= required_samples(0.9)
            assert candidate.point.metrics[key].value is not None
