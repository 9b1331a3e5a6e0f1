"""Writes the page as a static site: a folder that works from any web server, and from disk without one."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import msgspec

from skyline.bench.dashboard import bundle


class ExportError(OSError):
    """The site could not be written; the message says where and what to do."""


def export_site(data: dict[str, Any], folder: Path) -> Path:
    """Write `data` (`page_data(...)`) and the page into `folder`; returns the path of its index.html.

    The folder is made if it is not there, and only files of the site are overwritten. Raises ExportError.
    """
    exported = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    body = msgspec.json.encode({**data, "exported": exported}).decode()
    policy = bundle.POLICY.format(connect="'none'")
    files = {
        "index.html": bundle.page(
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<script defer src="data.js"></script>\n',
        ),
        # Data that contains "</script>" or "<!--" must not matter even where someone inlines this file.
        "data.js": f"window.SKYLINE_DATA = {body.replace('<', chr(92) + 'u003c')};\n",
        "app.js": bundle.script(),
        "style.css": bundle.style(),
        "icon.svg": (bundle.ASSETS / "icon.svg").read_text("utf-8"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
        shutil.copyfile(bundle.plotly_path(), folder / "plotly.min.js")
    except OSError as error:
        raise ExportError(
            f"cannot write the site into {folder} ({error}); choose another folder or free space"
        ) from None
    return folder / "index.html"
