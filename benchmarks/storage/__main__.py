"""What number formats, compressors and ways of reading cost, what a number format loses, and what it does to training.

python -m benchmarks.storage WHAT SOURCE... [--scans N] [--epochs N]

WHAT is `formats` (bytes, time and error), `access` (volumes, crops, the cache) or `effects` (predictions of age and
sex, and an autoencoder). A source is a derivative of `shards preprocess`, or a BIDS folder of brain-extracted scans;
`access` and `effects` take the first one. Times are process time of one thread, medians.
"""

import argparse
from pathlib import Path

from benchmarks.storage import access, effects, formats
from benchmarks.storage.formats import SHAPES


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__, formatter_class=style)
    parser.add_argument("what", metavar="WHAT", choices=["formats", "access", "effects"])
    parser.add_argument("source", metavar="SOURCE", nargs="+", type=Path)
    parser.add_argument(
        "--scans", metavar="N", type=int, default=8, help="of each source, for bytes and times; default 8"
    )
    parser.add_argument("--epochs", metavar="N", type=int, default=6, help="of the autoencoders; default 6")
    options = parser.parse_args()
    if options.what == "effects":
        print(effects.tables(options.source[0], options.epochs))
        return
    for spacing in SHAPES:
        if options.what == "formats":
            print(formats.tables(options.source, spacing, options.scans), flush=True)
        else:
            print(access.table(options.source[0], spacing, options.scans), flush=True)


if __name__ == "__main__":
    main()
