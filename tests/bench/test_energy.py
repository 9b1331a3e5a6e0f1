"""Energy from a sysfs tree of the test, whose counters a thread moves as hardware would; the machine's CPU time is a
file of the test too, so that what else runs here does not matter."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyline.bench.energy import EnergyMeter

RANGE = 262_143_328_850  # microjoules, a usual one


class Machine:
    """Packages with `watts` each. This process's work is its work too; `other_cores` are kept busy by others."""

    def __init__(self, root: Path, *, start: int = 0, limit: int = RANGE, flags: str = "avx2") -> None:
        self.root, self.limit = root, limit
        self.watts = {"intel-rapl:0": 100.0, "intel-rapl:1": 50.0}
        self.other_cores = 0.0
        self._microjoules = dict.fromkeys(self.watts, float(start))
        self._busy = 0.0
        for zone, name in (
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "dram"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:2", "psys"),
        ):
            folder = root / "sys/class/powercap" / zone
            folder.mkdir(parents=True)
            (folder / "name").write_text(f"{name}\n")
            (folder / "max_energy_range_uj").write_text(f"{limit}\n")
            (folder / "energy_uj").write_text("7000000\n")
        (root / "proc").mkdir()
        (root / "proc/cpuinfo").write_text(f"flags : {flags}\n")
        self._write()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def file(self, zone: str = "intel-rapl:0") -> Path:
        return self.root / "sys/class/powercap" / zone / "energy_uj"

    def _run(self) -> None:
        last = time.monotonic()
        while not self._done.wait(0.005):
            now = time.monotonic()
            for zone, watts in self.watts.items():
                self._microjoules[zone] = (self._microjoules[zone] + watts * (now - last) * 1e6) % (self.limit + 1)
            self._busy += self.other_cores * (now - last)
            last = now
            self._write()

    def _write(self) -> None:
        for zone, value in self._microjoules.items():
            self._replace(self.file(zone), f"{int(value)}\n")
        ticks = int((self._busy + time.process_time()) * os.sysconf("SC_CLK_TCK"))
        self._replace(self.root / "proc/stat", f"cpu  {ticks} 0 0 999 0 0 0 0 0 0\n")

    def _replace(self, path: Path, text: str) -> None:
        """At once, so that no reader sees an empty file."""
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").rename(path)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.stop()


def _meter(machine: Machine) -> EnergyMeter:
    return EnergyMeter(root=machine.root, nvidia_smi="none", interval_s=0.05)


def test_packages_and_dram_are_added_up(machine: Machine) -> None:
    with _meter(machine) as meter:
        began = time.monotonic()
        time.sleep(0.6)
        seconds = time.monotonic() - began
    energy = meter.energy()
    assert energy.source == "RAPL (package-0, dram, package-1)"
    assert energy.joules == pytest.approx(150 * seconds, rel=0.15)
    assert energy.verdict.status == "valid"
    assert "of the machine's CPU time" in energy.verdict.reason


def test_a_counter_that_begins_again(tmp_path: Path) -> None:
    """It turns every 0.2 s, and begins just before its end."""
    machine = Machine(tmp_path, start=19_900_000, limit=20_000_000)
    try:
        with _meter(machine) as meter:
            began = time.monotonic()
            time.sleep(0.7)
            seconds = time.monotonic() - began
    finally:
        machine.stop()
    assert meter.energy().joules == pytest.approx(150 * seconds, rel=0.15)


def test_a_part_of_the_time(machine: Machine) -> None:
    with _meter(machine) as meter:
        time.sleep(0.2)
        begin = time.monotonic()
        machine.watts = {"intel-rapl:0": 1000.0, "intel-rapl:1": 0.0}
        time.sleep(0.5)
        end = time.monotonic()
        machine.watts = {"intel-rapl:0": 0.0, "intel-rapl:1": 0.0}
        time.sleep(0.2)
    part = meter.energy(begin, end)
    assert part.joules == pytest.approx(1000 * (end - begin), rel=0.2)
    assert part.verdict.status == "valid"
    outside = meter.energy(begin, end + 60)
    assert outside.verdict.status == "invalid" and "does not cover the window" in outside.verdict.reason


def test_others_work_makes_it_invalid(machine: Machine) -> None:
    machine.other_cores = 0.5 * (os.cpu_count() or 1)
    with _meter(machine) as meter:
        time.sleep(0.5)
    energy = meter.energy()
    assert energy.joules is not None
    assert energy.verdict.status == "invalid" and "% of the machine's CPU time" in energy.verdict.reason


def test_our_own_work_does_not(machine: Machine) -> None:
    before = time.process_time()
    with _meter(machine) as meter:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            sum(range(1000))
    assert time.process_time() - before > 0.05
    assert meter.energy().verdict.status == "valid"


def test_a_window_that_is_short_against_the_counter(machine: Machine) -> None:
    with _meter(machine) as meter:
        time.sleep(0.2)
        begin = time.monotonic()
    short = meter.energy(begin, begin + 0.01)
    assert short.verdict.status == "invalid"
    assert "short against the counter; it needs 0.05 s" in short.verdict.reason


def test_a_counter_that_stands_still(machine: Machine) -> None:
    machine.watts = {"intel-rapl:0": 0.0, "intel-rapl:1": 0.0}
    with _meter(machine) as meter:
        time.sleep(0.2)
    assert meter.energy().verdict.status == "invalid" and "did not count" in meter.energy().verdict.reason


def test_a_virtual_machine_shares_its_processors(tmp_path: Path) -> None:
    machine = Machine(tmp_path, flags="avx2 hypervisor")
    try:
        with _meter(machine) as meter:
            time.sleep(0.2)
    finally:
        machine.stop()
    assert meter.energy().verdict.status == "invalid"
    assert "a virtual machine shares its processors" in meter.energy().verdict.reason


def test_a_counter_that_disappears(machine: Machine) -> None:
    with _meter(machine) as meter:
        time.sleep(0.1)
        machine.stop()
        machine.file("intel-rapl:0").unlink()
        time.sleep(0.2)
    energy = meter.energy()
    assert energy.joules is None and energy.verdict.status == "invalid"
    assert "could be read no longer" in energy.verdict.reason


def test_no_counters(tmp_path: Path) -> None:
    meter = EnergyMeter(root=tmp_path, nvidia_smi="none")
    with meter:
        pass
    energy = meter.energy()
    assert energy.joules is None and energy.source is None and energy.verdict.status == "unknown"
    assert "no energy counters" in energy.verdict.reason and "there is no nvidia-smi" in energy.verdict.reason


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody")
def test_counters_that_only_root_may_read(machine: Machine) -> None:
    machine.stop()
    for path in machine.root.rglob("energy_uj"):
        path.chmod(0o400)
    for folder in [machine.root, *machine.root.parents][:-2]:
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        meter = EnergyMeter(root=machine.root, nvidia_smi="none")
    finally:
        os.seteuid(0)
    assert meter.energy().verdict.status == "unknown"
    assert "RAPL may only be read by root" in meter.energy().verdict.reason


def test_start_and_stop_may_be_repeated(machine: Machine) -> None:
    meter = _meter(machine)
    for _ in range(3):
        meter.start()
    time.sleep(0.2)
    assert meter.stop() == meter.stop()
    assert meter.energy().joules is not None


def test_never_started(machine: Machine) -> None:
    energy = _meter(machine).stop()
    assert energy.joules is None and energy.verdict.reason == "nothing was measured"


def _smi(folder: Path, watts: list[str], *, follow: str) -> str:
    program = folder / "nvidia-smi"
    lines = "\n".join(watts)
    program.write_text(f"#!/bin/sh\ncase \"$*\" in *lms*) {follow} ;; *) cat <<'END'\n{lines}\nEND\n;; esac\n", "utf-8")
    program.chmod(0o755)
    return str(program)


def test_gpus_by_their_power(tmp_path: Path) -> None:
    follow = "while true; do printf '300.5\\n199.5\\n'; sleep 0.05; done"
    smi = _smi(tmp_path, ["300.5", "199.5"], follow=follow)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
    with EnergyMeter(root=tmp_path, nvidia_smi=smi, interval_s=0.05) as meter:
        time.sleep(0.3)
        begin = time.monotonic()
        time.sleep(0.8)
        end = time.monotonic()
    energy = meter.energy(begin, end)
    assert energy.source == "nvidia-smi (2 GPUs)"
    assert energy.joules == pytest.approx(500 * (end - begin), rel=0.1)
    assert energy.verdict.status == "invalid" and "it needs 10 s" in energy.verdict.reason


def test_an_nvidia_smi_that_ends(tmp_path: Path) -> None:
    smi = _smi(tmp_path, ["300"], follow="exit 1")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
    with EnergyMeter(root=tmp_path, nvidia_smi=smi, interval_s=0.05) as meter:
        time.sleep(0.3)
    assert "nvidia-smi ended" in meter.energy().verdict.reason


def test_gpus_that_report_no_power(tmp_path: Path) -> None:
    smi = _smi(tmp_path, ["[N/A]"], follow="exit 1")
    meter = EnergyMeter(root=tmp_path, nvidia_smi=smi)
    assert "reports no power" in meter.energy().verdict.reason
