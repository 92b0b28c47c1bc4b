"""All scans of one subject, in order: follow-ups are registered to the first session."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shards.errors import FULL
from shards.nifti import file_sha256, read
from shards.participant_rows import Row
from shards.preprocess.derivative import clear_visit, read_sidecar, result_files, write_result
from shards.preprocess.extraction import deepbet, hd_bet
from shards.preprocess.images import Volume
from shards.preprocess.recipe import Recipe
from shards.preprocess.registration import Template, load_template
from shards.preprocess.scan import Extractor, Result, preprocess_scan


@dataclass(frozen=True)
class Job:
    """What a process needs to preprocess subjects; see :func:`shards.preprocess.run.preprocess`."""

    out: Path
    recipe: Recipe
    suffix: str
    template: Path | None
    weights: Path | None
    device: str
    keep_suspect: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a scan.

    Attributes:
        key: ``sub-X`` or ``sub-X_ses-Y``.
        reason: why there is no result; empty where there is one.
        unchanged: the result was there.
    """

    key: str
    reason: str = ""
    unchanged: bool = False


class Worker:
    """Preprocesses subjects; template and network are loaded once, when they are needed."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def template(self) -> Template | None:
        """The template; None without registration."""
        recipe = self.job.recipe
        return load_template(self.job.template, recipe) if "registration" in recipe.steps else None

    @cached_property
    def network(self) -> Extractor:
        """The network that finds brains."""
        if self.job.recipe.brain == "hd-bet" and self.job.weights:
            return hd_bet(self.job.weights, self.job.device)
        return deepbet(self.job.device)

    def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        """Preprocess the scans of one subject; a scan that fails does not stop the others.

        Raises:
            OSError: the derivative cannot be written, or a disk is full, which is no fault of a scan.
        """
        outcomes = []
        first: tuple[Row, str] | None = None  # the first scan that could be registered, and the hash of its files
        for row in rows:
            result: Result | None = None
            unchanged, reason, sources = False, "", {}
            try:
                sources = {name: file_sha256(path) for name, path in row.files.items()}
                own = _identity(sources)
                if first and self.template is not None:
                    sources["reference"] = first[1]
                unchanged = self._is_unchanged(row, sources)
                if not unchanged:
                    result = self._preprocess(row, first[0] if first else None)
                first = first or (row, own)
            except ValueError as error:
                reason = str(error)
            except OSError as error:
                if error.errno in FULL:  # that of temporary files
                    raise
                reason = error.strerror or "file cannot be read"
            except MemoryError:
                reason = "too large for this machine's memory"
            except Exception as error:  # of a library; the other scans go on
                reason = f"{type(error).__name__}: {error}"
            if not unchanged:
                clear_visit(self.job.out, row)
            if result is not None:
                write_result(self.job.out, row, self.job.suffix, self.job.recipe, result, sources)
            outcomes.append(Outcome(row.key, reason, unchanged))
        return outcomes

    def _preprocess(self, row: Row, first: Row | None) -> Result:
        job = self.job
        if "image" not in row.files:
            raise ValueError(f"no file *_{job.suffix}")
        template = self.template
        if template is not None and first is not None:
            template = self._reference(first)
        return preprocess_scan(
            row.files["image"],
            job.recipe,
            template,
            lambda head: self.network(head),
            row.files.get("mask"),
            job.suffix,
            job.keep_suspect,
        )

    def _reference(self, row: Row) -> Template:
        """A registered scan of the subject, as a template."""
        files = result_files(self.job.out, row, self.job.suffix, self.job.recipe)
        brain, mask = read(files["image"]), read(files["mask"])
        return Template(Volume(brain.voxels, brain.affine), Volume(mask.voxels, mask.affine))

    def _is_unchanged(self, row: Row, sources: Mapping[str, str]) -> bool:
        """Whether the scan's results are complete and come from these files by this recipe."""
        job = self.job
        sidecar = read_sidecar(job.out, row, job.suffix, job.recipe)
        return (
            sidecar is not None
            and (job.keep_suspect or not sidecar.get("Suspect"))
            and sidecar.get("SourceSHA256") == sources
            and sidecar.get("Recipe") == json.loads(json.dumps(job.recipe.to_dict()))
            and all(path.is_file() for path in result_files(job.out, row, job.suffix, job.recipe).values())
        )


def _identity(sources: Mapping[str, str]) -> str:
    """A hash of all files that a result is made of; that of the scan itself where there is no other."""
    if [*sources] == ["image"]:
        return sources["image"]
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()
