"""What a recipe needs on this machine, checked before any work starts."""

from importlib.util import find_spec
from pathlib import Path

from shards.errors import DataError
from shards.files import sha256
from shards.preprocess.recipe import MNI, Recipe

INSTALL = "pip install 'mvhpc[preprocess]'"


def check_packages(recipe: Recipe) -> None:
    """Check that the packages of the recipe's steps are installed.

    Raises:
        DataError: naming the package, the step that needs it, and how to install it.
    """
    needs = {"antspyx": ("ants", "the step bias")} if "bias" in recipe.steps else {}
    if "registration" in recipe.steps:
        needs["antspyx"] = ("ants", "the step registration")
        if recipe.template == MNI:
            needs["nilearn"] = ("nilearn", "the MNI152 template")
    if "tissue" in recipe.steps:
        needs["scikit-learn"] = ("sklearn", "the step tissue")
    if "brain" in recipe.steps and recipe.brain in {"auto", "deepbet"}:
        needs["deepbet"] = ("deepbet", "the step brain")
    if "brain" in recipe.steps and recipe.brain == "hd-bet":
        needs["hd-bet"] = ("nnunetv2", "brain: hd-bet")
    for package, (module, purpose) in needs.items():
        if find_spec(module) is None:
            how = "pip install hd-bet" if package == "hd-bet" else INSTALL
            raise DataError(f"package {package} is missing, which {purpose} needs: {how}")


def check_weights(recipe: Recipe, weights: Path | None) -> None:
    """Check the file of weights against the hash in the recipe; these files hold code (pickle) that loading would run.

    Raises:
        DataError: no file, no hash, or another hash.
    """
    if "brain" not in recipe.steps or recipe.brain != "hd-bet":
        return
    if weights is None or not weights.is_file():
        raise DataError(
            f"{weights or 'brain: hd-bet'}: no file of weights; give the zip file of HD-BET's release with --weights"
        )
    if not recipe.weights:
        raise DataError("brain: hd-bet: give the SHA-256 of the weights as published, with --weights-sha256")
    found = sha256(weights)
    if found != recipe.weights.lower():
        raise DataError(f"{weights}: SHA-256 is {found}, expected {recipe.weights}; do not use this file")


def find_device(device: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is ``cuda`` where a GPU is at hand.

    Raises:
        DataError: no GPU for ``cuda``.
    """
    if device == "cpu":
        return device
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DataError("device cuda: no GPU is available; take cpu or auto")
    return "cuda" if available else "cpu"
