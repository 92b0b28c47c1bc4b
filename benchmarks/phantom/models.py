"""Data and models of the scoreboard, made where they are missing."""

from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.stages import Stage, complete, complete_chains

QUERIES = [  # wanted, given
    ("age", ("image", "sex")),
    ("age", ("image",)),
    ("age", ("sex",)),
    ("age", ()),
    ("sex", ("image", "age")),
    ("sex", ("image",)),
]
PEOPLE = {"train": 2000, "validation": 300, "test": 1700}  # many to test: the differences between methods are small
METHODS = ("ideal", "mean", "densenet", "paper", "ours")
EPOCHS = {"vae": 5, "joint": 40, "densenet": 8, "scalars": 20}
WIDTHS = {
    "model.channels": [32, 64],
    "model.attention": [False, True],
    "model.res_blocks": 1,
    "model.head_channels": 32,
    "model.norm_groups": 8,
    "model.embedding": 128,
}


def stages(root: Path, quick: bool, methods: Collection[str]) -> None:
    """Run every stage that is not complete: phantoms, packing, and for some methods their networks.

    Args:
        root: of all folders.
        quick: 60 people and one epoch.
        methods: among :data:`METHODS`.
    """
    people = 60 if quick else sum(PEOPLE.values())
    split = [n / sum(PEOPLE.values()) for n in PEOPLE.values()]
    epochs = {name: 1 if quick else n for name, n in EPOCHS.items()}
    joint = WIDTHS | {
        "latents": root / "latents",
        "vae": root / "vae",
        "out": root / "paper",
        "ema": 0.995,
        "optimizer.lr": 1.0e-3,
        "optimizer.warmup": 50,
        "training.epochs": epochs["joint"],
        "training.batch": 32,
        "training.validate_every": max(1, epochs["joint"] // 10),
        "training.log_every": 50,
        "compute.precision": "auto",
        "compute.threads": 1,
    }
    plan: list[Stage] = [
        ("phantom", "demo", {"out": root / "source", "subjects": people}),
        ("pack", "demo", {"source": root / "source", "out": root / "packed", "split": split}),
        (
            "vae",
            "demo",
            {
                "data": root / "packed",
                "out": root / "vae",
                "model.channels": [8, 16, 64],  # half of the demo's widths where voxels are many
                "model.latent_channels": 8,
                "model.shortcut": False,  # few channels: the paper's procedure reads latents
                "optimizer.lr": 2.0e-3,
                "training.batch": 4,
                "training.epochs": epochs["vae"],
                "training.validate_every": 1,
                "compute.workers": 1,
            },
        ),
        ("encode", "demo", {"data": root / "packed", "vae": root / "vae", "out": root / "latents"}),
    ]
    for part in plan if "paper" in methods else plan[:2]:
        complete(root, *part)
    voxels = {"data": root / "packed", "compute.precision": "auto", "compute.threads": 1}
    densenet, scalars = (voxels | {"training.epochs": epochs[name]} for name in ("densenet", "scalars"))
    models: list[Stage] = []
    if "paper" in methods:
        models.append(("joint", "paper", joint))
    if "ours" in methods:
        models.append(("scalars", "default", scalars | {"out": root / "scalars"}))
    if "densenet" in methods:
        models += [
            ("baseline", "default", densenet | {"want": w, "given": list(g), "out": root / densenet_name(w, g)})
            for w, g in QUERIES
            if "image" in g
        ]
    complete_chains(root, [[model] for model in models])


def densenet_name(want: str, given: Sequence[str]) -> str:
    return f"densenet-{want}-given-{'-'.join(given)}"
