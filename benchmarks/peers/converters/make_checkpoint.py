"""A random-weight checkpoint of a shape of benchmarks/shapes.py (runs with Skyline's interpreter).

    python make_checkpoint.py SHAPE FOLDER

The embedded model's tokenizer is filled up to the size of the embedding with a word for every id: random weights
generate any id and a server streams text: an id without a text would be a token that no client sees.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from shapes import SHAPES, write_checkpoint

    shape, folder = sys.argv[1], Path(sys.argv[2])
    write_checkpoint(shape, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    taken = set(vocabulary.values()) | {entry["id"] for entry in content["added_tokens"]}
    for index in range(SHAPES[shape]["vocab_size"]):
        if index not in taken:
            vocabulary[f"Ġw{index}"] = index
    path.write_text(json.dumps(content, ensure_ascii=False))


if __name__ == "__main__":
    main()
