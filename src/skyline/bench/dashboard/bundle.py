"""The page's assets: its JavaScript modules as one classic script, its style sheets as one.

Browsers load no modules from files (each file is an origin of its own), and the static site must work from a folder.
So both sites get the same single script: modules in the order of their imports, each in a function of its own.
"""

from __future__ import annotations

import functools
import re
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
STYLES = ("base", "page", "charts", "points", "narrow")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src {connect}; base-uri 'none'; form-action 'none'"
)

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class)\s+(\w+))", re.MULTILINE)


class BundleError(ValueError):
    """A module is written in a way that this small bundler does not know."""


def script(folder: Path = ASSETS) -> str:
    """All modules that `main.js` in `folder` needs, as one script.

    It knows two forms: `import { a, b } from "./other.js";` and `export` before a function, const or class. Raises
    BundleError for any other, for a missing module and for modules that import each other in a circle.
    """
    sources: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    waiting = ["main.js"]
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        try:
            sources[name] = (folder / name).read_text("utf-8")
        except OSError as error:
            raise BundleError(f"there is no module {name}: {error}") from None
        needs[name] = [match[1] for match in _IMPORT.findall(sources[name])]
        waiting += needs[name]
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise BundleError(f"modules import each other in a circle: {' -> '.join(error.args[1])}") from None
    parts = ['"use strict";\n{\nconst modules = {};\n']
    parts += [_wrapped(name, sources[name]) for name in order]
    return "".join([*parts, "}\n"])


def _wrapped(name: str, source: str) -> str:
    exported = _EXPORT.findall(source)
    body = _IMPORT.sub(lambda match: f'const {{{match[1]}}} = modules["{match[2]}"];\n', source)
    body = _EXPORT.sub("", body)
    left = re.search(r"^(?:import|export)\b.*", body, re.MULTILINE)
    if left:
        raise BundleError(f'{name}: {left[0]!r}: write import {{ name }} from "./module.js"; or export a declaration')
    return f'// {name}\n(() => {{\n{body}modules["{name}"] = {{ {", ".join(exported)} }};\n}})();\n'


def style() -> str:
    """The style sheets as one; what comes later prevails."""
    return "\n".join((ASSETS / f"{name}.css").read_text("utf-8") for name in STYLES)


def page(head: str = "", scripts: str = "") -> str:
    """The HTML, with more of the head and more scripts before the page's own."""
    html = (ASSETS / "index.html").read_text("utf-8")
    return html.replace("<!-- head -->", head + _placeholders()).replace("<!-- scripts -->", scripts)


def plotly_path() -> Path:
    """plotly.min.js, as the plotly package carries it. The package itself takes long to import and is not needed."""
    package = find_spec("plotly")
    assert package is not None and package.origin is not None, "plotly is among Skyline's dependencies"
    return Path(package.origin).parent / "package_data" / "plotly.min.js"


@functools.cache
def _placeholders() -> str:
    """Elements with the ids of style sheets that Plotly would insert for its maps when it loads.

    It leaves out what is there. The page has no maps, and its security policy forbids such style sheets.
    """
    ids = re.findall(r'document\.getElementById\("([0-9a-f]{64})"\)', plotly_path().read_text("utf-8"))
    return "".join(f'<meta id="{found}" name="plotly-style" content="unused">\n' for found in sorted(set(ids)))
