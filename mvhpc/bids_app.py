"""Commands that answer for raw scans: ``mvhpc predict --bids`` and, with the command line of BIDS Apps (Gorgolewski et
al. 2017), ``mvhpc-app``."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError
from shards.__main__ import OneLineParser, pairs
from shards.errors import DataError, explain
from shards.help_texts import ENTITIES, FILES_ROOT, RENAME

ABOUT = "From raw scans to predictions: the preprocessing that the model's data had, quality control, answers, pages."


def summary(rows: Sequence[Mapping[str, Any]], want: Sequence[str]) -> str:
    """How many scans were answered and how many are flagged; and which were not answered, with the reasons."""
    from mvhpc.inference.prediction_tables import without_answer
    from mvhpc.scans import OK

    unanswered = without_answer(rows, want)
    flagged = sum(row["flag"] != OK for row in rows)
    head = f"{len(rows) - len(unanswered)} of {len(rows)} scans answered, {flagged} flagged"
    return "\n".join([head, *(": ".join(filter(None, ("not answered", *row))) for row in unanswered)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``mvhpc-app``, with the command line of BIDS Apps; returns the exit status."""
    parser = OneLineParser("mvhpc-app", description=ABOUT)
    parser.add_argument("bids_dir", type=Path, help="BIDS folder or CSV of raw scans")
    parser.add_argument("output_dir", type=Path, help="folder of the results")
    parser.add_argument("analysis_level", choices=["participant"], help="of BIDS Apps; there is no other")
    _add_options(parser)
    options = parser.parse_args(arguments)
    return _run(options, options.bids_dir, options.output_dir)


def predict_command(arguments: Sequence[str]) -> int:
    """``mvhpc predict --bids``; returns the exit status, 1 where nobody is answered."""
    parser = OneLineParser("mvhpc predict", description=ABOUT)
    parser.add_argument("--bids", type=Path, required=True, metavar="FOLDER", help="BIDS folder or CSV of raw scans")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the results")
    _add_options(parser)
    if {"-h", "--help"}.intersection(arguments):  # --bids --help too
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    return _run(options, options.bids, options.out)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="FOLDER", help="run folder of stage scalars or joint")
    parser.add_argument("--given", default="", metavar="A,B", help="known variables (default: the scan)")
    parser.add_argument("--want", default="", metavar="A,B", help="variables to predict (default: all others)")
    parser.add_argument(
        "--participant-label",
        "--participant_label",
        nargs="+",
        default=[],
        metavar="LABEL",
        help="participants to answer, with or without sub- (default: all)",
    )
    parser.add_argument("--entities", type=pairs, default={}, metavar="KEY=VALUE,...", help=ENTITIES)
    parser.add_argument("--rename", type=pairs, default={}, metavar="COLUMN=NAME,...", help=RENAME)
    parser.add_argument("--files-root", type=Path, metavar="FOLDER", help=FILES_ROOT)
    parser.add_argument("--keep-suspect", action="store_true", help="answer for scans that fail quality control too")
    parser.add_argument("--template", type=Path, metavar="FILE", help="that of the model's preprocessing, if a file")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of HD-BET, if the model's preprocessing used it")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0 for one per core")
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="for brain extraction and model"
    )


def _run(options: argparse.Namespace, bids: Path, out: Path) -> int:
    from mvhpc.inference.prediction_tables import without_answer  # torch: not for --help
    from mvhpc.scans import TABLE, Request, predict_scans  # imports matplotlib, after its backend is chosen

    request = Request(
        bids,
        out,
        options.model,
        labels=options.participant_label,
        given=_names(options.given),
        want=_names(options.want),
        workers=options.workers,
        device=options.device,
        entities=options.entities,
        rename=options.rename,
        files_root=options.files_root,
        keep_suspect=options.keep_suspect,
        template=options.template,
        weights=options.weights,
    )
    try:
        rows, want = predict_scans(request)
    except (ConfigError, DataError) as error:
        print(f"mvhpc: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"mvhpc: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mvhpc: interrupted; the same command continues", file=sys.stderr)
        return 130
    print(f"{summary(rows, want)}\nsee {out / TABLE} and {out / 'index.html'}")
    return int(len(without_answer(rows, want)) == len(rows))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
