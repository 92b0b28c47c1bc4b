"""The tables of a results file, in Markdown, for the documents."""

from pathlib import Path
from typing import Any

from shards.files import write_text

BEGIN, END = "<!-- gpu.json -->", "<!-- end -->"
COLUMNS = {  # section -> key of a result -> heading
    "training": {
        "batch": "batch",
        "step_ms": "ms a step",
        "samples_per_second": "samples/s",
        "tflops": "TFLOP/s",
        "peak_percent": "% of peak",
        "memory_gib": "GiB",
        "first_step_s": "first step, compiled, s",
    },
    "inference": {"people": "at a time", "ms_per_person": "ms a person", "people_per_second": "people/s"},
    "extraction": {"ms_per_person": "ms a scan", "dice": "Dice with the template's own mask"},
    "repeatability": {"tensors": "tensors", "different": "different in the second run"},
    "loop": {"bare_step_ms": "bare loop, ms a step", "ours_step_ms": "ours, ms a step", "ratio": "ratio"},
}
COLUMNS["autoencoder"] = COLUMNS["training"] | {"micro_batches": "micro-batches"}


def render(report: dict[str, Any]) -> str:
    """All tables of a report, each under the name of its section, with what failed."""
    device = report["device"]
    parts = [
        f"{device['name']}, PyTorch {device['torch']}, commit {report['commit']}, {report['date']}; "
        f"`python benchmarks/gpu.py{' --tiny' * report['tiny']}`, {report['seconds']:.0f} s."
    ]
    for name, section in report["sections"].items():
        columns = {k: text for k, text in COLUMNS[name].items() if any(k in r for r in section["results"].values())}
        lines = [f"| {name} | {' | '.join(columns.values())} |", "|---|" + "---:|" * len(columns)]
        for label, result in section["results"].items():
            lines.append(f"| {label} | {' | '.join(_cell(result.get(key)) for key in columns)} |")
        parts += ["\n".join(lines)] if section["results"] else []
        parts += [f"**{label}** failed: {error}" for label, error in section["errors"].items()]
    return "\n\n".join(parts) + "\n"


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def insert(text: str, path: Path) -> None:
    """Put ``text`` between the two markers of a document.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}; add them where the tables belong")
    write_text(path, f"{before}{BEGIN}\n\n{text}\n{END}{after}")
