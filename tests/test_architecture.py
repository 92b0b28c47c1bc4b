"""The layers: imports point down, between the packages and inside of each; no two files import each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shards", "mvhpc", "launchers")  # the lowest first
# Inside mvhpc, the lowest first; rooms of one line do not know one another.
LAYERS = [
    ["config"],
    ["runtime"],
    ["runs", "variables", "checkpoints"],
    ["diffusion"],
    ["models", "records"],
    ["evaluation"],
    ["inference", "training", "data_stages"],
    ["stages"],
    ["execute"],
    ["pipeline", "export", "scans"],
    ["parsers", "bids_app"],
    ["api", "cli"],
    ["__main__", "pyfunc"],
]
ONLY = {  # slow or optional libraries, and who may import them
    "ray": {"mvhpc.runtime.ray_cluster", "mvhpc.runtime.ray_map", "mvhpc.inference.ray_pool"},
    "deepspeed": {"mvhpc.training.engines.deepspeed", "mvhpc.checkpoints.consolidate"},
    "mlflow": {"mvhpc.runs.mlflow_app", "mvhpc.runs.mlflow_store"},
}


def modules() -> dict[str, Path]:
    """Module name -> file, of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """What a file imports, also inside of functions: ``a.b`` of ``import a.b``, ``a.b`` and ``a.b.c`` of
    ``from a.b import c``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {t if t in known else t.rpartition(".")[0] for t in imported(path)}
        found[name] = {t for t in targets if t in known and t != name}
    return found


def room(module: str) -> str:
    """``mvhpc.training.engines.base`` -> ``training``."""
    return module.split(".")[1] if "." in module else ""


def test_no_two_files_import_each_other(arrows: dict[str, set[str]]) -> None:
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_arrows_between_packages_point_down(arrows: dict[str, set[str]]) -> None:
    height = {package: i for i, package in enumerate(PACKAGES)}
    for source, targets in arrows.items():
        for target in targets:
            assert height[target.split(".")[0]] <= height[source.split(".")[0]], f"{source} imports {target}"


def test_arrows_inside_the_model_plane_point_down(arrows: dict[str, set[str]]) -> None:
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for source, targets in arrows.items():
        if not source.startswith("mvhpc."):
            continue
        assert room(source) in height, f"{source}: name its layer in this test"
        for target in targets:
            if target.startswith("mvhpc.") and room(target) != room(source):
                assert height[room(target)] < height[room(source)], f"{source} imports {target}"


def test_slow_libraries_are_imported_where_they_are_used_alone() -> None:
    for name, path in modules().items():
        for target in imported(path):
            library = target.split(".")[0]
            assert name in ONLY.get(library, {name}), f"{name} imports {library}"


def test_the_data_plane_is_without_torch_but_for_its_torch_interface_and_brain_extraction() -> None:
    known = {"shards.torch", "shards.preprocess.extraction", "shards.preprocess.requirements"}
    found = {name for name, path in modules().items() if "torch" in {t.split(".")[0] for t in imported(path)}}
    assert {name for name in found if name.startswith("shards.")} == known


@pytest.mark.parametrize("command", ["mvhpc.cli", "mvhpc.bids_app", "shards.__main__"])
def test_a_command_says_what_it_does_before_torch_is_imported(command: str) -> None:
    code = f"import sys\ntry:\n    import {command}\n    {command}.main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "assert 'torch' not in sys.modules, 'torch is imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_every_module_can_be_imported_by_a_stranger_that_has_only_torch_and_monai() -> None:
    """Networks, samplers and single-process prediction need neither Ray nor DeepSpeed nor MLflow to be imported."""
    script = (
        "import sys\n"
        "for name in ('ray', 'deepspeed', 'mlflow', 'submitit'): sys.modules[name] = None\n"
        "import mvhpc.inference.predict, mvhpc.training.loop, mvhpc.pipeline.run, mvhpc.export, mvhpc.cli\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
