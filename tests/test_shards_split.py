"""Laws of splits: by group, stable, everyone tested once, or as a column of the table says."""

import itertools
from pathlib import Path

import pytest

from shards.__main__ import main
from shards.dataset import open_dataset
from shards.errors import DataError
from shards.index import Index, Record
from shards.split import default_fractions, draw_folds, draw_fractions, merge_groups
from shards.verify import verify
from tests.packing import PEOPLE, SIZE, bids, head, packed, save


def people(n: int, per_group: int = 1, visits: int = 1) -> list[Record]:
    return [
        Record(f"sub-{i}_ses-{v}", f"sub-{i}", f"sub-{i - i % per_group}", {}, {}, "", {})
        for i in range(n)
        for v in range(visits)
    ]


def sides(assignment: dict[str, str]) -> dict[str, set[str]]:
    return {part: {k for k, p in assignment.items() if p == part} for part in ("train", "validation", "test")}


@pytest.mark.parametrize(("n", "per_group", "visits"), [(3, 1, 1), (4, 1, 2), (10, 1, 1), (100, 1, 3), (200, 7, 2)])
def test_splits_are_by_group_never_empty_and_of_the_configured_size(n: int, per_group: int, visits: int) -> None:
    records = people(n, per_group, visits)
    for seed in range(20):
        assignment = draw_fractions(records, (0.89, 0.01, 0.10), seed).assignment
        assert list(assignment) == [r.key for r in records]
        for attribute in ("group", "subject"):
            assert len({(getattr(r, attribute), assignment[r.key]) for r in records}) == len(
                {getattr(r, attribute) for r in records}
            )
        assert all(sides(assignment).values())
        tested = len({r.subject for r in records if assignment[r.key] == "test"})
        assert tested == max(1, round(n / 10)) if per_group == 1 else 14 <= tested <= 20


def test_splits_are_stable() -> None:
    records = people(300)
    split = draw_fractions(records, (0.8, 0.1, 0.1), 5)
    assert draw_fractions(records[::-1], (0.8, 0.1, 0.1), 5).assignment == split.assignment
    assert draw_fractions(records, (0.8, 0.1, 0.1), 6).assignment != split.assignment
    more = draw_fractions(people(303), (0.8, 0.1, 0.1), 5).assignment
    assert sum(more[k] != part for k, part in split.assignment.items()) <= 6
    assert not sides(draw_fractions(records, (0.9, 0.0, 0.1), 5).assignment)["validation"]
    for n in (1, 2):
        assert "train" in draw_fractions(people(n), (0.89, 0.01, 0.1), 0).assignment.values()


@pytest.mark.parametrize(("n", "validation"), [(12, 2), (60, 12), (145, 20), (500, 20), (5000, 50)])
def test_the_default_split_leaves_enough_for_validation(n: int, validation: int) -> None:
    before = draw_fractions(people(n), default_fractions(n), 0).assignment
    found = {part: len(keys) for part, keys in sides(before).items()}
    assert found["validation"] == validation and found["test"] == max(1, round(n / 10))
    after = draw_fractions(people(n + 1), default_fractions(n + 1), 0).assignment
    assert sum(after[key] != part for key, part in before.items()) <= 3  # one person more moves few
    assert not [key for key, part in before.items() if part == "train" and after[key] == "test"]


def test_the_default_split_is_shown_and_another_is_drawn_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = bids(tmp_path / "source", [(f"sub-{i:02d}", "40", "F") for i in range(20)])
    summary = packed(source, tmp_path / "a")
    assert summary["split"] == {"train": 14, "validation": 4, "test": 2}
    assert any("4 of 20 subjects are for validation" in note for note in summary["notes"])
    summary = packed(source, tmp_path / "b", fractions=(0.89, 0.01, 0.10))
    assert summary["split"] == {"train": 17, "validation": 1, "test": 2}
    assert not any("for validation" in note for note in summary["notes"])
    command = ["pack", str(source), str(tmp_path / "c"), "--keep-suspect", "--workers", "1", "--spacing", "2"]
    assert main([*command, "--shape", *map(str, SIZE)]) == 0
    assert "split of the subjects: train 14, validation 4, test 2" in capsys.readouterr().out


@pytest.mark.parametrize(("n", "folds", "per_group"), [(141, 5, 1), (6, 3, 1), (3, 3, 1), (60, 4, 5), (900, 3, 1)])
def test_folds_test_everyone_once(n: int, folds: int, per_group: int) -> None:
    records = people(n, per_group, visits=2)
    splits = draw_folds(records, folds, seed=0)
    assert list(splits) == [f"fold-{k}-of-{folds}" for k in range(1, folds + 1)]
    tests = [sides(s.assignment)["test"] for s in splits.values()]
    assert sorted(itertools.chain(*tests)) == sorted(r.key for r in records)
    assert max(map(len, tests)) - min(map(len, tests)) <= 2 * per_group
    for split, test in zip(splits.values(), tests, strict=True):
        assert all(sides(split.assignment).values())
        rest = len(records) - len(test)
        validation = len(sides(split.assignment)["validation"])
        expected = 2 * max(rest / 2 * 0.05, min(20, rest / 2 * 0.2))  # of two visits each
        assert abs(validation - max(2, expected)) <= 2 * per_group
        for group in {r.group for r in records}:
            assert len({split.assignment[r.key] for r in records if r.group == group}) == 1


def test_groups_chain() -> None:
    rows = [("a", "1"), ("b", ""), ("c", "1"), ("d", "2"), ("c", "2"), ("e", "3"), ("b", "")]
    assert merge_groups(rows) == {"a": "a", "b": "b", "c": "a", "d": "a", "e": "e"}


def test_recorded_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = bids(tmp_path / "bids", PEOPLE, {"sub-01": "p", "sub-04": "p", "sub-05": "p"})
    out = str(tmp_path / "out")
    packed(source, Path(out), group="family", folds=2)
    digest = Index.load(out).digest
    assert main(["split", out, "--folds", "3", "--seed", "1"]) == 0
    assert main(["split", out, "--fractions", "0.4", "0.3", "0.3", "--group", "family", "--name", "wide"]) == 0
    assert main(["split", out, "--folds", "3", "--seed", "1"]) == 0  # the same again
    index = Index.load(out)
    names = ["default", "fold-1-of-2", "fold-2-of-2", "fold-1-of-3", "fold-2-of-3", "fold-3-of-3", "wide"]
    assert list(index.splits) == names and index.digest == digest
    for split in index.splits.values():
        assert len({split.assignment[k] for k in ("sub-01", "sub-04", "sub-05")}) == 1
    assert list(verify(out)) == []
    capsys.readouterr()
    for arguments, reason in [
        (["--folds", "3", "--seed", "2"], "another split named 'fold-1-of-3'"),
        (["--fractions", "0.5", "0.25", "0.25", "--name", "default"], "another split named 'default'"),
        (["--fractions", "0.5", "0.25", "0.25"], "--name"),
        (["--folds", "9"], "9 folds"),
        (["--folds", "2", "--group", "site"], "packed with --group family"),
    ]:
        assert main(["split", out, *arguments]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("fractions", [(0, 0, 1), (0, 1, 0), (0, 0.5, 0.5), (0, 0.1, 0.9)])
def test_a_data_set_may_have_no_training_part(fractions: tuple[float, ...]) -> None:
    records = people(40, visits=2)
    found = {
        name: len(keys) / len(records) for name, keys in sides(draw_fractions(records, fractions, 3).assignment).items()
    }
    assert found == dict(zip(("train", "validation", "test"), fractions))


def with_column(table: Path, name: str, cells: list[str]) -> None:
    """Append a column to a table."""
    lines, separator = table.read_text().splitlines(), "," if table.suffix == ".csv" else "\t"
    table.write_text("".join(f"{line}{separator}{cell}\n" for line, cell in zip(lines, [name, *cells], strict=True)))


@pytest.mark.parametrize("kind", ["bids", "csv"])
def test_a_split_is_taken_from_a_column(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    packed(source, tmp_path / "drawn")
    table = source / "participants.tsv"
    if kind == "csv":
        rows = [f"{name},{name}/anat/{name}_T1w.nii.gz,{age},{sex}\n" for name, age, sex in PEOPLE]
        source = table = source / "t.csv"
        table.write_text("participant_id,path,age,sex\n" + "".join(rows))
    with_column(table, "set", ["train", "Training", "val", "dev", "validation", "TEST", "n/a"])
    out = tmp_path / "out"
    command = ["pack", str(source), str(out), "--config", "demo", "--shape", *map(str, SIZE), "--spacing", "2"]
    assert main([*command, "--workers", "1", "--split-column", "set", "--folds", "2", "--keep-suspect"]) == 0
    assert "1 rows have no value in the split column and belong to no part: sub-06\n" in capsys.readouterr().out
    dataset = open_dataset(out)
    assert dataset.keys("train") == ["sub-00", "sub-01"] and dataset.keys("test") == ["sub-05"]
    assert dataset.keys("validation") == ["sub-02", "sub-03", "sub-04"] and len(dataset.keys("all")) == 7
    assert len(dataset.keys("test", "fold-1-of-2")) + len(dataset.keys("test", "fold-2-of-2")) == 7
    assert dataset.index.provenance["arguments"]["split_column"] == "set" and dataset.index.split().method == "column"
    assert dataset.index.digest == Index.load(tmp_path / "drawn").digest


def test_a_split_column_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path) -> None:
    family = {"sub-01": "p", "sub-04": "p"}
    for name, cells, reason in [
        ("word", ["train"] * 6 + ["held-out"], r"line 8, column 'word': unknown part of a split 'held-out'"),
        ("typo", ["train"] * 6 + ["tets"], "Did you mean 'test'"),
        ("empty", ["n/a", ""] * 3 + ["na"], "column 'empty' has no value"),
        ("group", ["train"] * 4 + ["test"] * 3, r"puts sub-01 and sub-04, one group, into both train and test"),
        ("sett", ["train"] * 7, "Did you mean 'sett'"),
    ]:
        source = bids(tmp_path / name, PEOPLE, family)
        with_column(source / "participants.tsv", name, cells)
        column = "set" if name == "sett" else name
        with pytest.raises(DataError, match=reason):
            packed(source, tmp_path / f"{name}-out", split_column=column, group="family")
        assert not (tmp_path / f"{name}-out").exists()
    packed(tmp_path / "group", tmp_path / "no-group", split_column="group")  # without families it is a good split


def test_sessions_of_one_subject_belong_to_one_part(tmp_path: Path) -> None:
    for session in ("ses-1", "ses-2"):
        save(tmp_path / "sub-two" / session / "anat" / f"sub-two_{session}_T1w.nii.gz", head())
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\nsub-two\t70\tF\n")
    sessions = tmp_path / "sub-two/sub-two_sessions.tsv"
    sessions.write_text("session_id\tset\nses-1\ttrain\nses-2\ttest\n")
    with pytest.raises(DataError, match="puts sub-two into both train and test"):
        packed(tmp_path, tmp_path / "out", split_column="set")
    sessions.write_text("session_id\tset\nses-1\ttrain\nses-2\tn/a\n")
    packed(tmp_path, tmp_path / "out", split_column="set")
    assert open_dataset(tmp_path / "out").keys("train") == ["sub-two_ses-1"]
