"""What number format and compressor cost and lose, and what a number format does to training.

python -m benchmarks.storage DERIVATIVE... [--scans 12] [--effects [--epochs 6]]

A derivative of ``shards preprocess``, or a BIDS folder of brain-extracted scans. Times are process time of one thread.
"""

import argparse
from pathlib import Path

from benchmarks.storage.effects import effects
from benchmarks.storage.formats import SHAPES, tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__)
    parser.add_argument("source", nargs="+", type=Path)
    parser.add_argument("--scans", type=int, default=12, help="of each source, for bytes and times")
    parser.add_argument("--effects", action="store_true", help="on predictions and training, of the first source")
    parser.add_argument("--epochs", type=int, default=6, help="of the autoencoders")
    arguments = parser.parse_args()
    if arguments.effects:
        print(effects(arguments.source[0], arguments.epochs))
        return
    for spacing in SHAPES:
        print(tables(arguments.source, spacing, arguments.scans), flush=True)


if __name__ == "__main__":
    main()
