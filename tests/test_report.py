"""Pages of predictions show what was predicted, and nothing that a name or a flag could inject."""

from pathlib import Path

import numpy as np
import pytest

from mvhpc.evaluation.paper_tables import digits_of_values
from mvhpc.evaluation.report import Answer, Subject, write_pages
from shards.schema import Schema
from tests.ellipsoids import ellipsoid

VOLUME = ellipsoid(np.random.default_rng(0), (24, 28, 24))[0]
AGE = Answer("age", "years", 47.25, (38.0, 57.5), (np.linspace(0, 120, 50), np.exp(-(np.linspace(-3, 3, 50) ** 2))))
SEX = Answer("sex", probabilities={"F": 0.2, "M": 0.8})


def test_pages_say_the_answers_and_the_flags(tmp_path: Path) -> None:
    volume = VOLUME
    good = Subject(
        "sub-01", [AGE, SEX], volume=volume, mask=volume > 0, template=volume > 0.2, figures={"gm_ml": 612.3}
    )
    bad = Subject("sub-02_ses-1", [Answer("age", "years"), Answer("sex")], flags=["a CT <b>, not MR"])
    write_pages(tmp_path, [good, bad], "model M; given image")
    first, second, group = ((tmp_path / f"{n}.html").read_text() for n in ("sub-01", "sub-02_ses-1", "index"))
    assert "47.2 years (90 % interval 38.0 to 57.5)" in first and "M (probability 0.80)" in first
    assert "612.3" in first and "No flags" in first and first.count("<img") == 3
    assert "not answered" in second and "a CT &lt;b&gt;, not MR" in second and "<img" not in second
    assert "1 of 2 scans are flagged" in group and 'href="sub-02_ses-1.html"' in group
    assert not any("http" in page for page in (first, second, group)), "a page loads something"


def test_classes_are_no_markup_and_no_mathematics(tmp_path: Path) -> None:
    site = Answer("site", probabilities={"<b>&": 0.2, "$ and $%$": 0.8})
    write_pages(tmp_path, [Subject("sub-01", [site])], "model <i>")
    page = (tmp_path / "sub-01.html").read_text()
    assert "<i>" not in page and "$ and $%$ (probability 0.80)" in page and page.count("<img") == 1


def test_the_same_answers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pages(tmp_path / name, [Subject("sub-01", [AGE, SEX], volume=VOLUME)], "model M")
    assert (tmp_path / "a" / "sub-01.html").read_bytes() == (tmp_path / "b" / "sub-01.html").read_bytes()


def test_figures_of_quality_stand_in_words_with_unit_and_limit_and_others_are_folded(tmp_path: Path) -> None:
    figures = {"typicality": 0.5, "volume_ml": 2082.0, "preprocess.volume_ml": 3251.0, "preprocess.brain.gap": 0.123}
    figures |= {"preprocess.volume_ratio": 1.452, "box": 1.0}
    write_pages(tmp_path, [Subject("sub-01", [AGE], figures=figures)], "model M")
    shown, _, folded = (tmp_path / "sub-01.html").read_text().partition("<details>")
    for cell in ("500 to 2400 ml", "2082 ml", "at most 25 %", "12.3 %", "at most 0"):
        assert f">{cell}<" in shown
    assert "p = 0.500; below 0.005" in shown and "3251" not in shown and "preprocess." not in shown
    assert "3251" in folded and "<code>preprocess.volume_ratio</code>" in folded and "open" not in folded


def test_a_number_of_a_narrow_range_has_the_places_that_tell_people_apart() -> None:
    answer = Answer("share", "", 0.0312, (0.021, 0.0448), digits=3)
    assert answer.text() == "0.031 (90 % interval 0.021 to 0.045)"
    names = {"age": [0, 120], "share": [0, 1], "size": [0, 5000]}
    schema = Schema.from_dict({name: {"kind": "continuous", "range": ends} for name, ends in names.items()})
    assert [digits_of_values(v) for v in schema] == [1, 3, 1]


@pytest.mark.parametrize("answer", [Answer("age"), Answer("sex")])
def test_an_answer_that_is_not_given_says_so(answer: Answer) -> None:
    assert not answer.given and answer.text() == "not answered"
