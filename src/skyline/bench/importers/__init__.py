"""Result files of other tools in this project's schema, so that they stand on the same frontier.

    store.import_(import_file(Path("benchmarks.json"), engine="vllm", hardware="H100", devices=8))

Numbers are the tools' own, in seconds and tokens per second, without an interval, since a file of percentiles does not
say how they spread. What a tool defines otherwise than skyline.bench.metrics is converted, computed from its requests,
or left out; each importer's module says which. What only follows from a file's requests is computed as here.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pydantic

from skyline.bench.importers import aiperf, guidellm, inferencex, vllm
from skyline.bench.importers.build import build
from skyline.bench.importers.draft import Draft, Facts
from skyline.bench.importers.fields import Fields, ResultFileError
from skyline.bench.results import Export

__all__ = ["TOOLS", "ResultFileError", "import_file"]

TOOLS = ("vllm", "guidellm", "aiperf", "inferencex")


def import_file(path: Path, tool: str | None = None, **overrides: Any) -> Export:
    """One run with the points that the file holds.

    `tool` is one of TOOLS, recognized by the content if it is not given. `overrides` is what the caller knows better
    than the file, see `Facts`: label, engine, engine_version, model, hardware, devices, precision, speculation, input,
    output, ratio, date. Raises ResultFileError.
    """
    if tool is not None and tool not in TOOLS:
        raise ResultFileError(f"{tool!r} is no tool whose results can be imported: there are {', '.join(TOOLS)}")
    try:
        facts = Facts.model_validate(overrides)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(Facts.model_fields)
        raise ResultFileError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (there are {known})") from None
    try:
        content = path.read_bytes()
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror}") from None
    objects = _objects(path, content)
    tool = tool or _recognize(path, objects)
    try:
        drafts = _drafts(path, tool, objects, facts.date or written, facts)
        if not drafts:
            raise ResultFileError(f"{path} holds no result")
        return build(tool, path.name, content, drafts, facts)
    except ArithmeticError as error:
        raise ResultFileError(f"{path.name}: what it holds is out of range ({error})") from None


def _objects(path: Path, content: bytes) -> list[Fields]:
    """The file's objects: of a JSON document, of its list, or of JSON lines, as `vllm bench serve --append-result`
    writes them."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ResultFileError(f"{path} is not text, and so no result file that can be imported") from None
    if not text.strip():
        raise ResultFileError(f"{path} is empty")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise ResultFileError(
                f"{path} is not JSON ({error}); of the tools' formats only JSON can be imported"
            ) from None
    if isinstance(data, dict) and isinstance(data.get("benchmarks"), list) and "metadata" not in data:
        data = data["benchmarks"]
    if not isinstance(data, list):
        return [Fields(data, path.name)]
    return [Fields(item, f"{path.name} entry {number}") for number, item in enumerate(data, 1)]


def _recognize(path: Path, objects: list[Fields]) -> str:
    for tool, module in (("guidellm", guidellm), ("aiperf", aiperf), ("inferencex", inferencex), ("vllm", vllm)):
        if objects and module.recognizes(objects[0]):
            return tool
    if objects and aiperf.is_record(objects[0]):
        raise ResultFileError(
            f"{path} holds AIPerf's requests alone: import profile_export_aiperf.json, which takes them from beside it"
        )
    if objects and {"runs", "points"} <= set(objects[0].data):
        raise ResultFileError(f"{path} is an export of a Skyline store: take it in with `skyline bench store import`")
    raise ResultFileError(f"{path} is no result file of {', '.join(TOOLS)}, as far as its content shows")


def _drafts(path: Path, tool: str, objects: list[Fields], when: datetime.datetime, facts: Facts) -> list[Draft]:
    match tool:
        case "guidellm":
            return [draft for data in objects for draft in guidellm.read(data)]
        case "aiperf":
            return [aiperf.read(data, aiperf.records_beside(path)) for data in objects]
        case "inferencex":
            # Its raw results are in the format of vLLM's bench.
            return [inferencex.read(d, when, facts) if inferencex.recognizes(d) else vllm.read(d) for d in objects]
    return [vllm.read(data) for data in objects]
