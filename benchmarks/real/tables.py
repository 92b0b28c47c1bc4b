"""The paper's specialists in the folds of real people, beside the models of scalars, in the paper's tables.

    python -m benchmarks.real.tables runs/real/ixi runs/real/ixi-folds [--rows "3D DenseNet121 (MSE)" ...] [--first N]

Both folders are of ``python -m benchmarks.real.answers``: people packed with ten folds, and the models of scalars of
these folds, beside which DenseNet121, ViT and BRAID are trained. ``mvhpc evaluate`` adds the linear reading and
predicting the mean. Writes ``tables/results.md`` to the second folder. Trainings that are complete are reused.
"""

import argparse
from pathlib import Path

from benchmarks.stages import Stage, complete, complete_chains

SPECIALISTS = {  # row of the table -> network, wanted, given, epochs (by the validation part of the first fold)
    "3D DenseNet121 (MSE)": ("densenet", "age", ["image", "sex"], 40),
    "3D ViT (MSE)": ("vit", "age", ["image", "sex"], 20),
    "3D ViT (CE)": ("vit", "sex", ["image", "age"], 20),
    "BRAID (MSE)": ("braid", "age", ["image", "sex"], 20),
    "3D DenseNet121 (CE)": ("densenet", "sex", ["image", "age"], 20),
}


def training(data: Path, fold: Path, split: str, name: str, want: str, given: list[str], epochs: int) -> Stage:
    """One specialist of one fold."""
    values = {"data": data, "split": split, "name": name, "want": want, "given": given, "out": fold / f"{name}-{want}"}
    few = {"training.epochs": epochs, "optimizer.warmup": 20, "compute.threads": 1, "compute.precision": "auto"}
    return "baseline", "default", values | few


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("people", type=Path, help="folder of the packed people")
    parser.add_argument("folds", type=Path, help="folder of the folds")
    parser.add_argument("--rows", nargs="+", choices=SPECIALISTS, default=list(SPECIALISTS), help="specialists")
    parser.add_argument("--first", type=int, metavar="N", help="the first N folds alone")
    options = parser.parse_args()
    chosen = {row: SPECIALISTS[row] for row in options.rows}
    data, root = options.people.resolve() / "packed", options.folds.resolve()
    folds = sorted(root.glob("fold-*"), key=lambda path: int(path.name.removeprefix("fold-")))
    splits = [f"{fold.name}-of-{len(folds)}" for fold in folds]
    folds, splits = folds[: options.first], splits[: options.first]
    complete_chains(
        root,
        [
            [training(data, fold, split, *specialist)]
            for specialist in chosen.values()
            for fold, split in zip(folds, splits, strict=True)
        ],
    )
    rows = {"model of scalars": "scalars"} | {row: f"{name}-{want}" for row, (name, want, *_) in chosen.items()}
    runs = [(row, fold / run) for row, run in rows.items() for fold in folds]
    values = {
        "runs": [str(path) for _, path in runs],
        "names": [row for row, _ in runs],
        "data": data,
        "split": "test",
        "out": root / "tables",
    }
    complete(root, "evaluate", "default", values)
    print((root / "tables" / "results.md").read_text())


if __name__ == "__main__":
    main()
