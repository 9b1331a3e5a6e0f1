"""Joules that a machine takes, and whether they mean anything.

    with EnergyMeter() as meter:
        ...
    meter.energy()                 of the whole block
    meter.energy(begin, end)       of a part of it; seconds of time.monotonic()

Sources: RAPL, the processors' own counters (https://docs.kernel.org/power/powercap/powercap.html), of packages and
DRAM; and NVIDIA GPUs, by their total energy counter where pynvml is installed, else by the power that nvidia-smi
reports, integrated. What fans, disks and power supplies take is in neither.

Both count the whole machine, whoever used it. So the result is valid only if little else ran beside the benchmark and
the servers that it started, and if the window is long against the counters' resolution.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from skyline.bench.engines.memory import below
from skyline.bench.hardware import cpu_flags
from skyline.bench.results import Energy, Verdict
from skyline.bench.wording import number_of

INTERVAL_S = 1.0
# Of the machine's CPU time, while the window lasted.
MAX_OTHER_SHARE = 0.1
# A window must hold so many updates of a counter, so that one more or less is at most 2 %.
MIN_UPDATES = 50

_RAPL_UPDATE_S = 0.001
_NVML_UPDATE_S = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")


class Source(Protocol):
    """Something that counts. `update_s`: how often its number changes."""

    name: str
    update_s: float

    def joules(self) -> float:
        """Since some fixed moment. Raises OSError if it can be read no longer."""

    def close(self) -> None: ...


class Rapl:
    """Sum over packages and their DRAM. Cores and graphics are parts of a package; psys counts packages again.

    Raises FileNotFoundError if there is none, PermissionError if it may not be read (since 2020 only root may, because
    it gives away what others compute: CVE-2020-8694)."""

    update_s = _RAPL_UPDATE_S

    def __init__(self, powercap: Path) -> None:
        self._zones: list[_Zone] = []
        names = []
        for folder in sorted(powercap.glob("*-rapl:*")):
            name = (folder / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                self._zones.append(_Zone(folder))
                names.append(name)
        if not self._zones:
            raise FileNotFoundError(f"no energy counters of packages in {powercap}")
        self.name = f"RAPL ({', '.join(names)})"

    def joules(self) -> float:
        return sum(zone.joules() for zone in self._zones)

    def close(self) -> None:
        pass


class _Zone:
    """A counter of microjoules that begins again at 0 after `max_energy_range_uj`: within minutes on large machines."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._read()
        self._total = 0

    def joules(self) -> float:
        now = self._read()
        # At most one turn lies between two readings.
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


class Nvml:
    """The GPUs' total energy counters, through pynvml. Raises OSError if there are none."""

    update_s = _NVML_UPDATE_S

    def __init__(self) -> None:
        if importlib.util.find_spec("pynvml") is None:
            raise FileNotFoundError("pynvml is not installed")
        self._nvml: Any = importlib.import_module("pynvml")
        try:
            self._nvml.nvmlInit()
            indices = range(self._nvml.nvmlDeviceGetCount())
            self._devices = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in indices]
        except self._nvml.NVMLError as error:
            raise FileNotFoundError(f"NVML: {error}") from None
        if not self._devices:
            raise FileNotFoundError("NVML knows no GPU")
        self.name = f"NVML ({number_of(len(self._devices), 'GPU')})"
        self.joules()

    def joules(self) -> float:
        try:
            return float(sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(each) for each in self._devices)) / 1000
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None

    def close(self) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


class NvidiaSmi:
    """Power of all GPUs as nvidia-smi reports it five times a second, integrated over time. Raises OSError if there is
    no nvidia-smi or it reports no power."""

    update_s = 0.2

    def __init__(self, program: str = "nvidia-smi") -> None:
        found = shutil.which(program)
        if found is None:
            raise FileNotFoundError("there is no nvidia-smi")
        asked = [found, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        try:
            once = subprocess.run(asked, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
            count = len([float(line) for line in once.stdout.split()])
        except (ValueError, subprocess.TimeoutExpired):
            count = 0
        if count == 0 or once.returncode != 0:
            raise FileNotFoundError("nvidia-smi reports no power")
        self.name = f"nvidia-smi ({number_of(count, 'GPU')})"
        self._count = count
        self._total = 0.0
        self._last: tuple[float, float] | None = None
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [*asked, f"-lms={round(self.update_s * 1000)}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        threading.Thread(target=self._follow, name="power of the GPUs", daemon=True).start()

    def joules(self) -> float:
        if self._process.poll() is not None:
            raise OSError("nvidia-smi ended")
        with self._lock:
            since = 0.0 if self._last is None else (time.monotonic() - self._last[0]) * self._last[1]
            return self._total + since

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _follow(self) -> None:
        """A line for each GPU, all GPUs again and again."""
        assert self._process.stdout
        round_of: list[float] = []
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                round_of.append(float(line))
            if len(round_of) == self._count:
                now, watts = time.monotonic(), sum(round_of)
                with self._lock:
                    if self._last is not None:
                        self._total += (now - self._last[0]) * self._last[1]
                    self._last = now, watts
                round_of = []


@dataclass
class _Series:
    """Cumulative numbers at moments, with straight lines between them."""

    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, moment: float, value: float) -> None:
        self.times.append(moment)
        self.values.append(value)

    def between(self, begin: float, end: float) -> float:
        return self._at(end) - self._at(begin)

    def _at(self, moment: float) -> float:
        after = bisect.bisect_right(self.times, moment)
        if after == 0:
            return self.values[0]
        if after == len(self.times):
            return self.values[-1]
        (t0, t1), (v0, v1) = self.times[after - 1 : after + 1], self.values[after - 1 : after + 1]
        return v0 + (v1 - v0) * (moment - t0) / (t1 - t0)


class EnergyMeter:
    """Reads the counters once a second, from a thread, between `start` and `stop`."""

    def __init__(
        self, *, root: Path = Path("/"), nvidia_smi: str = "nvidia-smi", interval_s: float = INTERVAL_S
    ) -> None:
        self._root, self._interval_s = root, interval_s
        self._sources: list[Source] = []
        self._missing: list[str] = []
        openers: tuple[Callable[[], Source], ...] = (
            lambda: Rapl(root / "sys/class/powercap"),
            lambda: _gpus(nvidia_smi),
        )
        for opener in openers:
            try:
                self._sources.append(opener())
            except PermissionError:
                self._missing.append("RAPL may only be read by root")
            except (OSError, ValueError) as error:
                self._missing.append(str(error))
        self._energy = [_Series() for _ in self._sources]
        self._machine, self._ours = _Series(), _Series()
        self._lost: str | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> EnergyMeter:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Does nothing if it has been started, or if there is nothing to read."""
        if self._sources and self._thread is None:
            self._sample()
            self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
            self._thread.start()

    def stop(self) -> Energy:
        """The energy between start and stop. May be called again."""
        if not self._done.is_set():
            self._done.set()
            if self._thread is not None:
                self._thread.join()
                self._sample()
            for source in self._sources:
                source.close()
        return self.energy()

    def energy(self, begin: float | None = None, end: float | None = None) -> Energy:
        """Of the time between these moments (seconds of time.monotonic()), by default all the time that was measured.

        `joules` is None where no counter could be read; an invalid result has its number all the same."""
        if not self._sources:
            return Energy(joules=None, source=None, verdict=_verdict("unknown", "; ".join(self._missing)))
        if len(self._machine.times) < 2:
            return Energy(joules=None, source=None, verdict=_verdict("unknown", "nothing was measured"))
        begin = self._machine.times[0] if begin is None else begin
        end = self._machine.times[-1] if end is None else end
        if self._lost is not None:
            return Energy(joules=None, source=None, verdict=_verdict("invalid", self._lost))
        parts = [series.between(begin, end) for series in self._energy]
        source = " + ".join(source.name for source in self._sources)
        return Energy(joules=sum(parts), source=source, verdict=self._judge(parts, begin, end))

    def _judge(self, parts: Sequence[float], begin: float, end: float) -> Verdict:
        first, last = self._machine.times[0], self._machine.times[-1]
        # The samples at the ends are taken a moment before and after what is measured.
        if begin < first - 0.1 or end > last + 0.1:
            return _verdict("invalid", f"measured for {last - first:.1f} s, which does not cover the window")
        needed = max(source.update_s for source in self._sources) * MIN_UPDATES
        if end - begin < needed:
            return _verdict(
                "invalid", f"the window of {end - begin:.2f} s is short against the counter; it needs {needed:g} s"
            )
        still = [source.name for source, part in zip(self._sources, parts, strict=True) if part <= 0]
        if still:
            return _verdict("invalid", f"{' and '.join(still)} did not count")
        if "hypervisor" in cpu_flags(self._root) and any(isinstance(source, Rapl) for source in self._sources):
            return _verdict("invalid", "a virtual machine shares its processors; RAPL counts all that run on them")
        busy = self._machine.between(begin, end)
        other = max(0.0, busy - self._ours.between(begin, end))
        share = other / ((end - begin) * (os.cpu_count() or 1))
        if share > MAX_OTHER_SHARE:
            return _verdict("invalid", f"other processes used {share:.0%} of the machine's CPU time meanwhile")
        return _verdict("valid", f"other processes used {share:.0%} of the machine's CPU time")

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        moment = time.monotonic()
        self._machine.add(moment, _machine_seconds(self._root))
        self._ours.add(moment, _our_seconds())
        for source, series in zip(self._sources, self._energy, strict=True):
            try:
                series.add(time.monotonic(), source.joules())
            except (OSError, ValueError) as error:
                self._lost = f"{source.name} could be read no longer: {error}"


def _gpus(nvidia_smi: str) -> Source:
    try:
        return Nvml()
    except OSError:
        return NvidiaSmi(nvidia_smi)


def _machine_seconds(root: Path) -> float:
    """CPU time that all processors of the machine have spent working, since it was started."""
    fields = (root / "proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(value) for value in fields[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _our_seconds() -> float:
    """CPU time of this process and its descendants, with those that have ended and were waited for."""
    total = 0
    for process in [os.getpid(), *below(os.getpid())]:
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
            total += sum(int(value) for value in fields[11:15])
    return total / _TICKS


def _verdict(status: str, reason: str) -> Verdict:
    return Verdict.model_validate({"status": status, "reason": reason})
