"""The joint law of age, sex and brain anatomy behind the phantom, and its exact posterior.

Age is uniform over 20-82 years, either sex has probability one half, independent of age. Five anatomical
quantities are then drawn from the regressions in :data:`LAW`, **independent of one another given age and sex**;
their residuals are Gaussian (of the logarithm, for the ventricles) and not truncated, so the density has a closed form
and every posterior is one quadrature over age.

Sources: intracranial volume, OASIS-1 (316 healthy adults, 18-94 y); ventricles, IXI (588 adults, 20-86 y); grey and
white matter and hippocampi, IXI (291 adults, 40-86 y; used down to 20 y, which extrapolates).

Grey % + white % is the brain's share of the head; the rest is CSF. The law of that sum,
85.3 % - 1.35a - 0.26a^2 - 0.96 male with residual SD 2.1 %, agrees in slope, curvature, sex and spread with the
brain/intracranial ratio measured in OASIS-1, 82.0 % - 1.8a - 0.2a^2 - 1.1 male [2.3 %]; the level differs by 3 points
because the two segmentations place the boundary to the CSF differently. So the ratio is not drawn separately.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

AGES = (20.0, 82.0)  # years
SEXES = ("F", "M")


@dataclass(frozen=True)
class Regression:
    """quantity = constant + age a + square a^2 + male [sex = M] + N(0, sd^2), a = (age - 50 y) / 10 y."""

    constant: float
    age: float
    square: float
    male: float
    sd: float
    log: bool = False  # the regression is one of the logarithm

    def mean(self, age: ArrayLike, male: ArrayLike) -> NDArray[np.float64]:
        """Expectation (of the logarithm where ``log``) at ``age`` (years) and ``male`` (0 or 1), broadcast."""
        a = (np.asarray(age, np.float64) - 50) / 10
        return self.constant + self.age * a + self.square * a**2 + self.male * np.asarray(male, np.float64)


LAW: dict[str, Regression] = {
    "icv_ml": Regression(1408, -7, 0, 181, 125),
    "ventricles_ml": Regression(2.60, 0.19, 0.033, 0.22, 0.43, log=True),  # both lateral ventricles
    "grey_percent": Regression(46.3, -1.43, -0.10, -0.96, 1.6),  # of the intracranial volume
    "white_percent": Regression(39.0, 0.08, -0.16, 0, 1.4),
    "hippocampus_ml": Regression(7.40, -0.15, -0.01, 0.65, 0.70),  # left + right
}

Anatomy = Mapping[str, float]


def draw_person(rng: np.random.Generator) -> tuple[float, str]:
    """Age in years (to two decimals) and sex of one subject."""
    return round(float(rng.uniform(*AGES)), 2), SEXES[int(rng.integers(2))]


def draw_anatomy(rng: np.random.Generator, age: float, sex: str) -> dict[str, float]:
    """One draw of every quantity of :data:`LAW` given ``age`` (years) and ``sex`` (F or M)."""
    draws = {name: r.mean(age, sex == "M") + r.sd * rng.standard_normal() for name, r in LAW.items()}
    return {name: float(np.exp(value) if LAW[name].log else value) for name, value in draws.items()}


@dataclass(frozen=True)
class Posterior:
    """p(age, sex | given values) of N subjects on a grid of age.

    ``mass`` (N, 2, A) is the probability of each sex (F, M) and age cell; a row sums to one. The A cells of equal
    width tile 20-82 years; ``ages`` (A,) holds their centres.
    """

    ages: NDArray[np.float64]
    mass: NDArray[np.float64]

    @property
    def age_mass(self) -> NDArray[np.float64]:
        """Probability of each age cell, (N, A)."""
        return self.mass.sum(1)

    @property
    def sex(self) -> NDArray[np.float64]:
        """p(F), p(M) of each subject, (N, 2)."""
        return self.mass.sum(2)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Expected age in years, (N,)."""
        return self.age_mass @ self.ages

    @property
    def sd(self) -> NDArray[np.float64]:
        """Standard deviation of age in years, (N,)."""
        return np.sqrt(np.maximum(self.age_mass @ self.ages**2 - self.mean**2, 0))

    def cdf(self, age: ArrayLike) -> NDArray[np.float64]:
        """P(age <= ``age``) with one ``age`` (years) a subject, (N,)."""
        mass, count = self.age_mass, len(self.ages)
        position = (np.asarray(age, np.float64) - AGES[0]) / (AGES[1] - AGES[0]) * count
        cell = np.clip(position.astype(int), 0, count - 1)
        rows = np.arange(len(mass))
        below = np.cumsum(mass, 1)[rows, cell] - mass[rows, cell]
        return np.clip(below + mass[rows, cell] * np.clip(position - cell, 0, 1), 0, 1)

    def quantile(self, p: float) -> NDArray[np.float64]:
        """Age in years below which a share ``p`` of the probability lies, (N,)."""
        edges = np.linspace(*AGES, len(self.ages) + 1)
        cumulative = np.pad(np.cumsum(self.age_mass, 1), ((0, 0), (1, 0)))
        return np.array([np.interp(p, row, edges) for row in cumulative])


def posterior(
    anatomy: Mapping[str, ArrayLike] | pd.DataFrame | None = None,
    age: ArrayLike | None = None,
    sex: Collection[str] | None = None,
    cells: int = 310,
) -> Posterior:
    """Exact p(age, sex | given values), by the midpoint rule over age.

    Args:
        anatomy: the quantities of :data:`LAW`, each a number or (N,); further columns are ignored. None: not given.
        age: years, (N,); all the mass of a row then lies in that age's cell, at the likelihood of the exact age.
        sex: F or M, (N,).
        cells: number of age cells; 310 makes them 0.2 years wide.

    Returns:
        The posterior of N subjects (N = 1 where nothing is given: the prior).

    Raises:
        KeyError: a quantity of the law is missing from ``anatomy``.
    """
    edges = np.linspace(*AGES, cells + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    male = np.array([0.0, 1.0])[None, :, None]  # (1, 2, 1)
    known = None if age is None else np.atleast_1d(np.asarray(age, np.float64))[:, None, None]  # (N, 1, 1)
    at = centres[None, None, :] if known is None else known  # (1, 1, A) or (N, 1, 1)

    log_density: NDArray[np.float64] = np.zeros((1, 2, 1))
    for name, law in LAW.items() if anatomy is not None else ():
        value = np.atleast_1d(np.asarray(anatomy[name], np.float64))  # type: ignore[index]
        residual = (np.log(value) if law.log else value)[:, None, None] - law.mean(at, male)
        log_density = log_density - 0.5 * (residual / law.sd) ** 2  # constants, and the log's Jacobian, cancel
    if sex is not None:
        given = np.asarray(list(sex))[:, None] == np.asarray(SEXES)  # (N, 2)
        log_density = np.where(given[:, :, None], log_density, -np.inf)
    if known is not None:
        cell = np.clip(np.searchsorted(edges, known, side="right") - 1, 0, cells - 1)
        log_density = np.where(np.arange(cells) == cell, log_density, -np.inf)
    log_density = np.broadcast_to(log_density, (*log_density.shape[:2], cells))  # (N, 2, A)
    mass = np.exp(log_density - log_density.max((1, 2), keepdims=True))
    return Posterior(centres, mass / mass.sum((1, 2), keepdims=True))


def best_possible(source: Path | pd.DataFrame, given: Collection[str]) -> pd.DataFrame:
    """The best possible predictions for each subject, from the exact posterior; a reference for models.

    Args:
        source: a folder written by :func:`shards.phantom.make.make_phantoms`, or a table with a row a subject:
            participant_id, age, sex and the columns of :data:`LAW`.
        given: any of "image" (the drawn anatomy), "age", "sex".

    Returns:
        A table indexed by participant_id: ``age`` (posterior mean, years), ``age_median`` (least absolute error),
        ``age_sd``, ``F`` and ``M`` (probabilities).

    Raises:
        ValueError: ``given`` names something else.
    """
    if unknown := set(given) - {"image", "age", "sex"}:
        raise ValueError(f"given {sorted(unknown)}: choose from image, age, sex")
    table = source if isinstance(source, pd.DataFrame) else read_tables(Path(source))
    answer = posterior(
        table if "image" in given else None,
        table["age"] if "age" in given else None,
        table["sex"] if "sex" in given else None,
    )
    columns = {
        "age": answer.mean,
        "age_median": answer.quantile(0.5),
        "age_sd": answer.sd,
        "F": answer.sex[:, 0],
        "M": answer.sex[:, 1],
    }
    rows = {name: np.broadcast_to(values, len(table)) for name, values in columns.items()}  # a prior is one row
    return pd.DataFrame(rows, index=pd.Index(table["participant_id"], name="participant_id"))


def read_tables(folder: Path) -> pd.DataFrame:
    """participants.tsv and anatomy.tsv of a phantom folder, joined on participant_id."""
    people = pd.read_csv(folder / "participants.tsv", sep="\t")
    anatomy = pd.read_csv(folder / "derivatives" / "phantom" / "anatomy.tsv", sep="\t")
    return people.merge(anatomy, on="participant_id", validate="one_to_one")
