"""`skyline profile` as a user runs it."""

from __future__ import annotations

import json

from tests.cli.test_commands import one_red_line, skyline


def test_the_demonstration_model_as_json_and_table() -> None:
    sizes = ("--steps", "1", "--context", "32", "--prefill", "32", "--threads", "1")
    done = skyline("profile", "--json", *sizes)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert set(facts) == {"model", "report", "machine", "steps"}
    for step in facts["steps"].values():
        assert step["measured"] == 1 and step["ops"]
        assert set(step["parts_us"]) == {"kernels", "python", "sampling", "preparation", "idle"}
    shown = skyline("profile", *sizes)
    assert shown.returncode == 0, shown.stderr
    assert all(text in shown.stdout for text in ("Prefill", "Decode", "roofline", "paged_attention"))


def test_errors_are_one_line() -> None:
    assert "no-such" in one_red_line(skyline("profile", "./no-such-model"))
    assert "context of" in one_red_line(skyline("profile", "--context", "1000000"))
