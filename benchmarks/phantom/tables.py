"""The paper's tables on the phantoms of the demo: every method trained, evaluated, and its drawings judged.

    python -m benchmarks.phantom.tables [--root runs/tables] [--people 2000]

375 people for training, 25 for validation, 100 for testing, or 2,000, 50 and 100; 32 x 32 x 32 voxels. Rows: the
default (model of scalars and joint model), the paper's procedure and its variant with the sex as a number (one shared
time, prediction of the noise, scalars in the U-Net, repainting), latent diffusion of the volume alone, DenseNet121,
ViT, BRAID. `mvhpc evaluate` adds the linear reading and predicting the mean. Writes ``evaluation/results.md`` and
``times.tsv`` to the root. Stages that are complete are reused.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.stages import Stage, complete, complete_chains
from mvhpc.runs.folder import read_record
from shards.files import write_text

PAPER: dict[str, Any] = {
    "scaling": "range",
    "model.scalars": "early",
    "model.linear_components": 0,
    "diffusion.time": "shared",
    "diffusion.volume": "eps",
    "diffusion.continuous": "eps",
}
ONE_VARIABLE = {"model.scalars": "auto", "diffusion.time": "independent"}  # which has one time in any case
# People for training: those for validation, and epochs of the paper's procedure. The default has ten: its linear
# denoiser is in closed form.
SIZES = {375: (25, 60), 2000: (50, 30)}
TEST = 100
NAMES = {
    "joint": "mvhpc",
    "paper": "the paper's procedure",
    "continuous-sex": "Continuous-Sex",
    "ldm": "LDM",
    "densenet-age": "3D DenseNet121 (MSE)",
    "densenet-sex": "3D DenseNet121 (CE)",
    "vit-age": "3D ViT (MSE)",
    "vit-sex": "3D ViT (CE)",
    "braid-age": "BRAID (MSE)",
}
READER = "densenet-image"  # its features are those of the FID
DRAWN = ("joint", "paper", "continuous-sex", "ldm")


def trainings(root: Path, paper_epochs: int) -> list[list[list[Stage]]]:
    """Rounds of chains of stages. A chain depends on those of the rounds before; long ones come first.

    ``paper_epochs`` are those of the paper's procedure and of its variants.
    """
    core = {"compute.workers": 1, "compute.threads": 1, "compute.zero_stage": 0}

    def train(stage: str, out: str, **values: Any) -> Stage:
        return stage, "demo", core | {"out": root / out} | values

    def joint(out: str, vae: str, **values: Any) -> Stage:
        return train("joint", out, latents=root / f"latents-{vae}", vae=root / vae, **values)

    def encode(vae: str) -> Stage:
        values = {"data": root / "packed", "vae": root / vae, "out": root / f"latents-{vae}", "compute.threads": 1}
        return "encode", "demo", values

    def baseline(out: str, name: str, want: str, given: list[str], epochs: int) -> list[Stage]:
        values: dict[str, Any] = {"name": name, "want": want, "given": given, "training.epochs": epochs}
        return [train("baseline", out, data=root / "packed", **values)]

    as_in_paper = PAPER | {"training.epochs": paper_epochs}
    few_channels = {  # the paper's U-Net predicts scalars from latents, of which it needs few
        "model.latent_channels": 8,
        "model.shortcut": False,
        "optimizer.lr": 2.0e-3,
        "training.batch": 4,
        "training.epochs": 5,
    }
    ours = [
        train("scalars", "scalars", data=root / "packed"),
        train("vae", "vae", data=root / "packed"),
        encode("vae"),
    ]
    paper = [train("vae", "vae-paper", data=root / "packed", **few_channels), encode("vae-paper")]
    age, sex = ["image", "sex"], ["image", "age"]
    models = [
        [joint("continuous-sex", "vae-paper", schema="continuous-sex", **as_in_paper)],
        [joint("paper", "vae-paper", **as_in_paper)],
        [joint("ldm", "vae-paper", schema="image-only", **as_in_paper | ONE_VARIABLE)],
        baseline("densenet-age", "densenet", "age", age, 8),
        baseline("densenet-sex", "densenet", "sex", sex, 8),
        baseline(READER, "densenet", "age", ["image"], 8),
        [joint("joint", "vae", scalars=root / "scalars")],
        baseline("braid-age", "braid", "age", age, 10),
        baseline("vit-age", "vit", "age", age, 16),
        baseline("vit-sex", "vit", "sex", sex, 16),
    ]
    return [[ours, paper], models]


def drawing(root: Path, name: str) -> Stage:
    """The stage that draws by a joint model and judges what it drew."""
    values = {"model": root / name, "data": root / "packed", "features": root / READER, "out": root / f"drawn-{name}"}
    return "evaluate-generation", "demo", values | {"compute.threads": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/tables"))
    parser.add_argument("--people", type=int, choices=SIZES, default=375, help="for training")
    options = parser.parse_args()
    root, start = options.root.resolve(), time.monotonic()
    validation, paper_epochs = SIZES[options.people]
    everybody = options.people + validation + TEST
    split = [options.people / everybody, validation / everybody, TEST / everybody]
    complete(root, "phantom", "demo", {"out": root / "source", "subjects": everybody})
    complete(root, "pack", "demo", {"source": root / "source", "out": root / "packed", "split": split})
    for chains in (*trainings(root, paper_epochs), [[drawing(root, name)] for name in DRAWN]):
        complete_chains(root, chains)
    values = {
        "runs": [str(root / name) for name in NAMES],
        "names": list(NAMES.values()),
        "generation": [str(root / f"drawn-{name}") for name in DRAWN],
        "data": root / "packed",
        "split": "test",
        "out": root / "evaluation",
    }
    complete(root, "evaluate", "default", values)
    marks = sorted(root.glob("*/stage.json"), key=lambda path: path.stat().st_mtime)
    rows = [f"{mark.parent.name.removesuffix('.run')}\t{read_record(mark.parent)['seconds']:.0f}" for mark in marks]
    write_text(root / "times.tsv", "\n".join(["stage\tseconds", *rows, f"all\t{time.monotonic() - start:.0f}"]) + "\n")
    print((root / "evaluation" / "results.md").read_text())


if __name__ == "__main__":
    main()
