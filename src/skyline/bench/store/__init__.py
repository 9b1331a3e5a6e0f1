"""Where results are kept: an SQLite file by default, a PostgreSQL server by URL.

    with open_store() as store:
        store.save_run(run)
        store.save_point(point)

Importing this imports SQLAlchemy: the command line does so only in commands that need it.
"""

from __future__ import annotations

from skyline.bench.store.errors import StoreError
from skyline.bench.store.store import Counts, Store, open_store

__all__ = ["Counts", "Store", "StoreError", "open_store"]
