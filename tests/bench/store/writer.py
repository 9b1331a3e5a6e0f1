"""A process that saves a run and its points FIRST to LAST, and says so after each of them:

python -m tests.bench.store.writer WHERE RUN FIRST LAST
"""

from __future__ import annotations

import sys

from skyline.bench.store import open_store
from tests.bench.store.records import make_point, make_run, make_table


def main(where: str, run: str, first: int, last: int) -> None:
    with open_store(where) as store:
        owner = make_run(id=run)
        store.save_run(owner)
        for number in range(first, last):
            point = make_point(owner, requests=make_table(20)).model_copy(
                update={"id": f"{number:032x}", "key": str(number)}
            )
            store.save_point(point)
            print(number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
