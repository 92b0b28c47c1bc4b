"""`benchmarks/gpu.py` at its tiny size, run as a user runs it."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import section
from benchmarks.gpu_sections.tables import BEGIN, END, insert, render

pytestmark = pytest.mark.timeout(1500)  # two minutes of computing, on a machine with other load
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    done = run(
        "--tiny", "--seconds", "1200", "--out", "gpu.json", cwd=folder
    )  # from another folder than the repository's
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads((folder / "gpu.json").read_text()))


def numbers(tree: Any) -> Iterator[float]:
    """Every number in nested dictionaries and lists."""
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, dict | list):
            yield from numbers(value)
        elif isinstance(value, int | float):
            yield value


@pytest.mark.slow
def test_every_section_has_finite_results_and_no_error(report: dict[str, Any]) -> None:
    expected = {"training": 3, "autoencoder": 2, "inference": 7, "extraction": 1, "repeatability": 4, "loop": 1}
    assert {name: len(part["results"]) for name, part in report["sections"].items()} == expected
    assert not any(part["errors"] for part in report["sections"].values())
    assert all(math.isfinite(x) and x >= 0 for x in numbers(report))
    assert report["seconds"] >= max(part["seconds"] for part in report["sections"].values())


@pytest.mark.slow
def test_rates_agree_with_times(report: dict[str, Any]) -> None:
    for name in ("training", "autoencoder"):
        for result in report["sections"][name]["results"].values():
            if "step_ms" in result:
                assert result["samples_per_second"] == pytest.approx(1000 * result["batch"] / result["step_ms"])
                assert result["slowest_block_ms"] >= result["step_ms"]
                assert result["peak_percent"] is None  # that of a CPU is not known
    for name in ("inference", "extraction"):
        for result in report["sections"][name]["results"].values():
            assert result["people_per_second"] == pytest.approx(1000 / result["ms_per_person"])


@pytest.mark.slow
def test_blocks_are_compiled_whole(report: dict[str, Any]) -> None:
    for name, label in (("training", "joint"), ("autoencoder", "autoencoder")):
        result = report["sections"][name]["results"][f"{label}, blocks compiled"]
        assert result["graph_breaks"] == 0
        assert 0 < result["graphs"] <= result["regions"]
        eager = report["sections"][name]["results"][f"{label}, eager"]
        assert eager["tflops"] * eager["step_ms"] == pytest.approx(result["tflops"] * result["step_ms"])  # operations


@pytest.mark.slow
def test_the_extracted_brain_is_the_templates_own(report: dict[str, Any]) -> None:
    (result,) = report["sections"]["extraction"]["results"].values()
    assert result["dice"] > 0.9


@pytest.mark.slow
def test_two_runs_end_with_equal_bits(report: dict[str, Any]) -> None:
    results = report["sections"]["repeatability"]["results"]
    assert set(results) == {"vae", "baseline", "scalars", "joint"}
    assert all(result["different"] == 0 < result["tensors"] for result in results.values())
    assert len({result["sha256"] for result in results.values()}) == 4


@pytest.mark.slow
def test_tables_go_between_the_markers_of_a_document(report: dict[str, Any], tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text(f"Before.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    text = render(report)
    for _ in range(2):  # the second time changes nothing
        insert(text, document)
        assert document.read_text() == f"Before.\n\n{BEGIN}\n\n{text}\n{END}\n\nAfter.\n"
    for part in report["sections"].values():
        assert all(f"| {label} |" in text for label in part["results"])
    document.write_text("no markers")
    with pytest.raises(ValueError, match="no lines"):
        insert(text, document)


def test_what_fails_is_recorded_and_ends_with_status_1(tmp_path: Path) -> None:
    done = run("--tiny", "--only", "loop", "training", "--seconds", "0.1", "--out", "late.json", cwd=tmp_path)
    assert done.returncode == 1
    sections = json.loads((tmp_path / "late.json").read_text())["sections"]
    assert {name: part["errors"] for name, part in sections.items()} == {
        name: {"time": "not started: no time was left"} for name in ("loop", "training")
    }
    assert "**time** failed: not started" in done.stdout


@pytest.mark.slow
def test_a_section_is_stopped_at_its_limit_with_what_it_has(tmp_path: Path) -> None:
    found = section("loop", True, tmp_path, 0.1)
    assert found["errors"]["time"].startswith("stopped after") and not found["results"]
