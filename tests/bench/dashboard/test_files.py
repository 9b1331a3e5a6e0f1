"""The page's files: one script of all modules, the server that sends them, and the static site."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from skyline.bench.dashboard import bundle
from skyline.bench.dashboard.app import create_app
from skyline.bench.dashboard.export import ExportError, export_site


def modules(folder: Path, **sources: str) -> Path:
    for name, text in sources.items():
        (folder / f"{name}.js").write_text(text)
    return folder


def test_modules_come_after_what_they_import(tmp_path: Path) -> None:
    modules(
        tmp_path,
        main='import { b } from "./b.js";\nimport { a } from "./a.js";\nb(a);\n',
        b='import { a } from "./a.js";\nexport function b() {}\nexport const c = 1;\nexport class D {}\n',
        a="export async function a() {}\n",
        unused="not even JavaScript",
    )
    script = bundle.script(tmp_path)
    assert [line[3:] for line in script.splitlines() if line.startswith("// ")] == ["a.js", "b.js", "main.js"]
    assert 'modules["b.js"] = { b, c, D };' in script
    assert "import" not in script and "export" not in script


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"main": 'import { a } from "./a.js";\n'}, "no module a.js"),
        (
            {"main": 'import { a } from "./a.js";\n', "a": 'import { m } from "./main.js";\nexport const a = 1;\n'},
            "circle",
        ),
        ({"main": 'import a from "./a.js";\n'}, "write import"),
        ({"main": "export default 1;\n"}, "write import"),
        ({"main": "export { a };\n"}, "write import"),
    ],
)
def test_what_the_bundler_does_not_know(tmp_path: Path, sources: dict[str, str], message: str) -> None:
    with pytest.raises(bundle.BundleError, match=message):
        bundle.script(modules(tmp_path, **sources))


def test_every_asset_is_used_and_of_readable_size() -> None:
    script, style = bundle.script(), bundle.style()
    for path in bundle.ASSETS.glob("*.js"):
        assert f"// {path.name}\n" in script
        assert len(path.read_text("utf-8").splitlines()) <= 300
    for path in bundle.ASSETS.glob("*.css"):
        assert path.read_text("utf-8") in style


def test_the_page_names_no_other_host_and_holds_no_script() -> None:
    page = bundle.page()
    assert "//" not in page.replace("<!doctype", "").replace("</", "")
    assert "<script>" not in page and "onclick" not in page and " style=" not in page
    assert "http" not in bundle.style()


class Source:
    """A store that counts its loads."""

    def __init__(self) -> None:
        self.loads, self.stamp = 0, "1"

    def load(self) -> dict[str, Any]:
        self.loads += 1
        return {"points": [self.loads]}


def client(source: Source) -> TestClient:
    return TestClient(create_app(source.load, lambda: source.stamp), base_url="http://127.0.0.1")


def test_unchanged_data_is_neither_loaded_nor_sent() -> None:
    source = Source()
    http = client(source)
    first = http.get("/api/data")
    assert (first.status_code, first.json()) == (200, {"points": [1]})
    again = http.get("/api/data", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content, source.loads) == (304, b"", 1)
    assert http.get("/api/data").json() == {"points": [1]}
    source.stamp = "2"
    changed = http.get("/api/data", headers={"If-None-Match": first.headers["etag"]})
    assert (changed.status_code, changed.json(), source.loads) == (200, {"points": [2]}, 2)


def test_many_pages_make_one_load() -> None:
    source = Source()
    inside = threading.Event()
    original = source.load

    def slow() -> dict[str, Any]:
        inside.wait(2)
        return original()

    http = TestClient(create_app(slow, lambda: source.stamp), base_url="http://127.0.0.1")
    answers: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: answers.append(http.get("/api/data").json())) for _ in range(6)]
    for thread in threads:
        thread.start()
    inside.set()
    for thread in threads:
        thread.join()
    assert (answers, source.loads) == ([{"points": [1]}] * 6, 1)


def test_a_store_that_cannot_be_read_is_said() -> None:
    def broken() -> dict[str, Any]:
        raise OSError("bench.db is not a database")

    http = TestClient(create_app(broken, lambda: "1"), base_url="http://127.0.0.1")
    answer = http.get("/api/data")
    assert (answer.status_code, answer.json()) == (500, {"error": "bench.db is not a database"})


@pytest.mark.parametrize("path", ["/", "/app.js", "/style.css", "/icon.svg", "/plotly.min.js", "/api/data"])
def test_every_answer_carries_the_policy(path: str) -> None:
    http = client(Source())
    answer = http.get(path)
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "connect-src 'self'" in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert http.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


def test_a_foreign_name_of_this_machine_is_turned_down() -> None:
    http = client(Source())
    assert http.get("/api/data", headers={"Host": "evil.example"}).status_code == 400
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert http.get("/api/data", headers={"Host": host}).status_code == 200
    open_to_all = TestClient(create_app(Source().load, lambda: "1", hosts=["bench.example"]))
    assert open_to_all.get("/api/data", headers={"Host": "bench.example"}).status_code == 200


def test_a_site_is_a_folder_of_files(tmp_path: Path, data: dict[str, Any]) -> None:
    hostile = {**data, "note": "</script><!-- \u2028 é"}
    index = export_site(hostile, tmp_path / "deep" / "site")
    folder = index.parent
    names = {"index.html", "data.js", "app.js", "style.css", "icon.svg", "plotly.min.js"}
    assert index.name == "index.html" and {path.name for path in folder.iterdir()} == names
    text = (folder / "data.js").read_text("utf-8")
    assert "<" not in text
    read = json.loads(text.removeprefix("window.SKYLINE_DATA = ").removesuffix(";\n"))
    assert read.pop("exported").endswith("+00:00")
    assert read == hostile
    assert (folder / "plotly.min.js").read_bytes() == bundle.plotly_path().read_bytes()


def test_a_site_is_written_over_the_last(tmp_path: Path) -> None:
    (tmp_path / "CNAME").write_text("mine")
    for _ in range(2):
        export_site({"points": []}, tmp_path)
    assert (tmp_path / "CNAME").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="choose another folder"):
        export_site({}, tmp_path / "file" / "site")
