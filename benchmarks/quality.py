"""Figures of quality control on data sets: `python -m benchmarks.quality BIDS [BIDS ...]` prints a table.

Each row is a figure: its limits, then smallest and largest value in each data set. Below the table stand the scans that
would be rejected or flagged, with the reasons.
"""

import argparse
import statistics
import time
from pathlib import Path

from shards.nifti import read
from shards.qc.limits import LIMITS, verdict, violated


def table(folders: list[Path]) -> list[str]:
    """The lines of the table, in Markdown, and of the notes below it."""
    found, notes = [], []
    for folder in folders:
        rows, seconds = [], []
        for path in sorted(folder.glob("sub-*/**/anat/*_T1w.nii*")):
            scan = read(path)
            start = time.perf_counter()
            rows.append(scan.figures())
            seconds.append(time.perf_counter() - start)
            flags = [limit.figure for limit in violated(rows[-1], rejects=False)]
            reasons = verdict(rows[-1]) or [f"flagged: {', '.join(flags)}"] * bool(flags)
            notes += [f"{path.name}: {'; '.join(reasons)}"] * bool(reasons)
        if not rows:
            raise SystemExit(f"{folder}: no sub-*/anat/*_T1w.nii[.gz]")
        notes.append(f"{folder.name}: {len(rows)} scans, median {statistics.median(seconds):.2f} s each")
        found.append(rows)
    lines = [
        f"| figure | limits | {' | '.join(folder.name for folder in folders)} |",
        "|---|---:|" + "---:|" * len(folders),
    ]
    for figure in dict.fromkeys(limit.figure for limit in LIMITS if limit.step != "registered"):
        low = max(limit.low for limit in LIMITS if limit.figure == figure)
        high = min(limit.high for limit in LIMITS if limit.figure == figure)
        ranges = []
        for rows in found:
            values = [row[figure] for row in rows if figure in row]
            ranges.append(f"{min(values):.3g} to {max(values):.3g}" if values else "")
        lines.append(f"| `{figure}` | {low:g} to {high:g} | {' | '.join(ranges)} |")
    return [*lines, "", *notes]


def main() -> None:
    """Print the table of the folders that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="BIDS", nargs="+", type=Path, help="folder with sub-*/anat/*_T1w.nii.gz")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the lines there too")
    args = parser.parse_args()
    text = "\n".join(table(args.folders)) + "\n"
    print(text, end="")
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
