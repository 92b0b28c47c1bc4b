"""What MLflow gets of a journal: groups of curves, results as metrics, everything else as tags; and names of runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mvhpc.runs.mlflow_names import curve, translate
from mvhpc.runs.places import without_places
from mvhpc.stages import STAGES


@pytest.mark.parametrize(
    "name, shown",
    [
        ("train/loss", "loss/total"),
        ("train/loss_image", "loss/image"),
        ("train/kl", "loss/kl"),
        ("train/lr_discriminator", "optimizer/lr_discriminator"),
        ("train/grad_norm", "optimizer/grad_norm"),
        ("train/damaged_samples", "optimizer/damaged_samples"),
        ("validation/loss", "validation/loss"),
        ("system/memory_gib", "system/memory_gib"),
    ],
)
def test_curves_are_in_groups_that_begin_with_the_loss(name: str, shown: str) -> None:
    assert curve(name) == shown
    assert min("loss/", shown) == "loss/"  # MLflow shows sections in the order of their names


def test_a_scalar_without_a_curve_is_no_chart() -> None:
    events = [
        {"event": "start", "time": 0.0, "step": 0, "total": 2},
        {"event": "metrics", "time": 1.0, "step": 1, "metrics": {"train/loss": 2.0, "validation/loss": 3.0}},
        {
            "event": "summary",
            "time": 2.0,
            "metrics": {
                "best_step": 1,
                "validation/loss": 3.0,
                "test/age_mae": 9.5,
                "test/age_mae_low": 8.0,
                "test/age_mae_high": 11.0,
                "system/samples_per_second": 4.0,
                "note": "text",
            },
        },
    ]
    first, second, results, tags = translate(events)
    assert first == events[0]
    assert second["metrics"] == {"loss/total": 2.0, "validation/loss": 3.0}
    assert (results["event"], results["step"]) == ("metrics", 0)
    assert results["metrics"] == {"test/age_mae": 9.5, "system/samples_per_second": 4.0}
    assert tags["event"] == "tags"
    assert tags["tags"] == {
        "summary.best_step": "1",
        "summary.validation/loss": "3",
        "test/age_mae": "9.5 [8, 11]",
        "summary.note": "text",
    }


@pytest.mark.parametrize(
    "stage, out, values, name",
    [
        ("vae", "runs/demo/vae", {}, "vae"),
        ("vae", "runs/small/fold-2/vae", {}, "vae (fold-2)"),
        ("vae", "elsewhere", {}, "vae (elsewhere)"),
        ("predict", "runs/demo/predictions/age-given-image-sex.tsv", {}, "age | image, sex"),
        ("predict", "runs/small/fold-1/predictions/age-given-image-sex.tsv", {}, "age | image, sex (fold-1)"),
        ("predict", "answers.tsv", {}, "age | image, sex (answers)"),
        ("predict", "runs/demo/predictions/age-given-nothing.tsv", {"given": []}, "age | nothing"),
        (
            "baseline",
            "runs/demo/baselines/vit/age-given-image",
            {"name": "vit", "want": "age", "given": ["image"]},
            "vit: age | image",
        ),
        ("generate", "runs/demo/women70", {"given": {"sex": "F"}}, "generate (women70)"),
        ("inpaint", "runs/demo/inpainted.nii.gz", {"given": {}}, "inpaint"),
    ],
)
def test_a_run_is_named_after_what_it_answers(stage: str, out: str, values: dict, name: str) -> None:
    usual = {"want": ["age"], "given": ["image", "sex"]} if stage == "predict" else {}
    assert STAGES[stage].run_name(SimpleNamespace(out=out, **usual | values)) == name


def test_paths_lose_what_names_machines_and_people() -> None:
    """Absolute ones and stores at such, at any depth; those below the project keep their part of it."""
    root = Path("/home/alice/study")
    values = {
        "data": "/home/alice/study/packed",
        "tracking": {"uri": "sqlite:////home/alice/study/runs/mlflow.db"},
        "runs": ["/data/alice/joint", "joint"],
        "server": "https://mlflow.example.org",
        "steps": 3,
    }
    kept = {"server": values["server"], "steps": 3}
    below = {"data": "packed", "tracking": {"uri": "sqlite:///runs/mlflow.db"}, "runs": ["joint", "joint"]}
    assert without_places(values, root) == below | kept
    last = {"data": "packed", "tracking": {"uri": "sqlite:///mlflow.db"}, "runs": ["joint", "joint"]}
    assert without_places(values) == last | kept
