"""Laws of pseudonyms, and of paths that must stay in their folder."""

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from shards.dataset import open_dataset
from shards.errors import DataError, IntegrityError, TooManyRejects
from shards.header import read_header, write_header
from shards.index import Index
from shards.inside import inside
from shards.participant_rows import Reject, Row, Table
from shards.participants import read_table
from shards.pseudonyms import pseudonymised, read_key
from shards.schema import Schema
from shards.verify import verify
from tests.packing import PEOPLE, bids, content, head, packed, save

SCHEMA = Schema.load()
STORAGES = ("zarr", "webdataset")


def make_key(path: Path, content: bytes = bytes(range(32)), mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def named_people(folder: Path) -> tuple[Path, list[str]]:
    """A BIDS tree whose ids, sessions, groups, faulty cells, file names and headers are names; and all these names."""
    secrets = [
        "DoeJane",
        "RoeRichard",
        "PoeEdgar",
        "visit19620303",
        "DoeFamily",
        "Jane^Doe",
        "StMaryHospital",
        "Epilepsy",
    ]
    secrets += ["1931", "MissTypo", "BrownBob", "SmithSam", "LaneLois"]
    people = [(f"sub-{name}", str(40 + i), "FM"[i % 2]) for i, name in enumerate(secrets[:3])]
    source = bids(folder, people, {"sub-DoeJane": secrets[4], "sub-RoeRichard": secrets[4]})
    (source / "sub-PoeEdgar/anat").rename(source / "sub-PoeEdgar/anat.old")
    for name in (
        "sub-DoeJane/anat/sub-DoeJane_T1w.nii.gz",
        f"sub-PoeEdgar/ses-{secrets[3]}/anat/sub-PoeEdgar_ses-{secrets[3]}_T1w.nii.gz",
    ):
        image = nib.Nifti1Image(head(3), np.diag([2.0, 2, 2, 1]))
        image.header["descrip"], image.header["db_name"] = b"Jane^Doe", b"StMaryHospital"
        image.header["aux_file"], image.header["intent_name"] = b"Jane^Doe", b"StMaryHospital"
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Epilepsy"))
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, source / name)
    save(source / "sub-SmithSam/anat/sub-SmithSam_acq-DoeJane_T1w.nii.gz", head(5))
    save(source / "sub-SmithSam/anat/sub-SmithSam_acq-BrownBob_T1w.nii.gz", head(5))
    save(source / "sub-BrownBob/anat/MissTypo_T1w.nii.gz", head(6))
    rows = [
        "sub-SmithSam\t50\tF\tn/a",
        "sub-BrownBob\t50\tF\tn/a",
        "sub-DoeJane\t41\tF\tn/a",
        "sub-Miss Typo\t41\tF\tn/a",
    ]
    save(source / "sub-LaneLois/anat/sub-LaneLois_T1w.nii.gz", head(7))  # without a row
    rows += ["sub-RoeRichard2\tSmithSam\tF\tn/a", "sub-RoeRichard3\t1931\tF\tn/a", "sub-RoeRichard4\t31\tBrownBob\tn/a"]
    with (source / "participants.tsv").open("a") as table:
        table.write("\n".join(rows) + "\n")
    return source, secrets


@pytest.mark.parametrize("storage", STORAGES)
def test_no_byte_of_a_data_set_holds_a_name(tmp_path: Path, storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    source, secrets = named_people(tmp_path / "SecretFolder")
    key = make_key(tmp_path / "key")
    summary = packed(source, tmp_path / "out", storage=storage, group="family", pseudonymise=key)
    assert summary["packed"] == 3 and summary["rejected"] == 7
    assert (
        "skipped 1 subject folder that has no row in participants.tsv, until one is added [names are left out]"
        in (summary["notes"])
    )
    shown = capfd.readouterr()
    everything = [*content(tmp_path / "out").values(), *map(str.encode, content(tmp_path / "out"))]
    everything += [str(summary).encode(), (shown.out + shown.err).encode()]
    words = [*secrets, "SecretFolder", str(tmp_path), "T1w.nii"]
    found = {word for word in words for part in everything if word.lower().encode() in part.lower()}
    assert found == set()
    assert key.read_bytes() not in b"".join(everything)
    lines = (tmp_path / "out/rejected.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[0] for line in lines] == [str(n) for n in range(5, 12)]  # those of the table


def test_nothing_but_the_names_changes(tmp_path: Path) -> None:
    source, _ = named_people(tmp_path / "source")
    packed(source, tmp_path / "plain", group="family")
    packed(source, tmp_path / "hidden", group="family", pseudonymise=make_key(tmp_path / "key"))
    plain, hidden = open_dataset(tmp_path / "plain"), open_dataset(tmp_path / "hidden")
    for one, two in zip(plain.index.records, hidden.index.records, strict=True):
        assert one.values == two.values and one.checksums == two.checksums and one.affines == two.affines
        assert two.key.startswith(two.subject) and len(two.subject) == len("sub-") + 16
        np.testing.assert_array_equal(plain.read(one.key, "image"), hidden.read(two.key, "image"))
    groups = [[r.group for r in d.index.records] for d in (plain, hidden)]
    assert groups[0][0] == groups[0][1] != groups[0][2] and groups[1][0] == groups[1][1] != groups[1][2]
    assert len({r.key for r in hidden.index.records}) == len(hidden)


def test_neither_a_conversion_nor_a_note_gives_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an error of a library says, and whatever keys a table of verdicts has."""
    source = bids(tmp_path / "source", [(f"sub-{name}", "40", "F") for name in ("DoeJane", "RoeRichard")])
    rows = ["participant_id,path,age,sex"]
    for person, name in enumerate(("DoeJane", "PoeEdgar")):
        file = source / f"sub-{name}/anat/sub-{name}_T1w.nii.gz"
        rows.append(f"p{person},{file if file.exists() else save(tmp_path / f'{name}.nii.gz', head(1))},40,F")
    (tmp_path / "scans.csv").write_text("\n".join(rows))
    (tmp_path / "verdicts.tsv").write_text("key\tverdict\nsub-DoeJane\treject\n")

    def failing(path: Path, *arguments: object) -> None:
        raise ValueError(f"damaged in slice 3 of 5: {path.name if 'Poe' in str(path) else path}, see its header")

    key = make_key(tmp_path / "key")
    monkeypatch.setattr("shards.convert.canonical", failing)
    with pytest.raises(TooManyRejects) as refused:
        packed(tmp_path / "scans.csv", tmp_path / "out", pseudonymise=key)
    found = b"".join(content(tmp_path / "out").values()) + str(refused.value).encode()
    assert (
        b"damaged in slice 3 of 5 [the name of a file is left out]" in found
        and b"Jane" not in found
        and b"Poe" not in found
    )
    monkeypatch.undo()
    notes = packed(source, tmp_path / "noted", pseudonymise=key, exclusions=tmp_path / "verdicts.tsv")["notes"]
    assert any("1 keys to exclude are in no row of the table" in note for note in notes) and "Jane" not in str(notes)


def test_pseudonyms_depend_on_the_key_and_the_id_alone(tmp_path: Path) -> None:
    """Rows that are added, and follow-ups in another table, agree with what was packed before."""
    people = [(f"sub-{name}", "40", "F") for name in ("a", "b", "c")]
    first = read_table(bids(tmp_path / "first", people), SCHEMA)
    second = read_table(bids(tmp_path / "second", [("sub-new", "30", "M"), *reversed(people)]), SCHEMA)
    (tmp_path / "second/sub-b/anat").rename(tmp_path / "second/sub-b/anat.old")
    save(tmp_path / "second/sub-b/ses-2/anat/sub-b_ses-2_T1w.nii.gz", head())
    later = read_table(tmp_path / "second", SCHEMA)

    def names(table: Table, key: bytes) -> dict[str, tuple[str, str]]:
        rows = pseudonymised(table, key).rows
        return {old.key: (new.key, new.subject) for old, new in zip(table.rows, rows, strict=True)}

    one, two = b"k" * 16, b"l" * 16
    known = names(first, one)
    assert known.items() <= names(second, one).items()
    assert names(later, one)["sub-b_ses-2"][1] == known["sub-b"][1]
    assert names(later, one)["sub-b_ses-2"][0].startswith(known["sub-b"][0] + "_ses-")
    assert not set(names(first, two).values()) & set(known.values())


def test_two_ids_with_one_pseudonym_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_table(bids(tmp_path, PEOPLE), SCHEMA)
    monkeypatch.setattr("shards.pseudonyms.LETTERS", 1)  # of 32 letters, seven people share one
    with pytest.raises(DataError, match=r"^line \d+: its pseudonym is that of another row; take another key$"):
        for number in range(20):
            pseudonymised(table, number.to_bytes(16))


@pytest.mark.parametrize(
    ("size", "mode", "reason"),
    [
        (32, 0o640, r"others may read this key \(mode 0640\): chmod 600"),
        (32, 0o604, "others may read"),
        (15, 0o600, "15 bytes; a key has 16 at least"),
        (None, 0, "No such file or directory; make a key"),
    ],
)
def test_a_key_that_is_no_secret_is_refused(tmp_path: Path, size: int | None, mode: int, reason: str) -> None:
    path = tmp_path / "key"
    if size is not None:
        make_key(path, bytes(size), mode)
    with pytest.raises(DataError, match=reason):
        read_key(path)
    with pytest.raises(DataError, match=reason):
        packed(bids(tmp_path / "source", PEOPLE[:1]), tmp_path / "out", pseudonymise=path)
    assert not (tmp_path / "out").exists()


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV in a folder of its own, with a scan beside it and one outside."""
    save(tmp_path / "lists/near.nii.gz", head(0))
    save(tmp_path / "scans/far.nii.gz", head(1))
    return tmp_path / "lists/t.csv"


def read(table: Path, cell: str, **options: Path) -> list[Row | Reject]:
    table.write_text(f"participant_id,path,age,sex\na,{cell},40,F\n")
    return read_table(table, SCHEMA, **options).rows


@pytest.mark.parametrize("cell", ["../scans/far.nii.gz", "x/../../scans/far.nii.gz", "../lists2"])
def test_a_relative_path_does_not_leave_the_folder_of_its_table(
    table: Path, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"line 2, column 'path': the path leads out of .*lists; .* by --files-root"):
        read(table, cell)
    monkeypatch.chdir(table.parent)
    with pytest.raises(DataError, match="leads out"):
        read(Path("t.csv"), cell)


def test_an_absolute_path_lies_in_the_folder_that_is_given(table: Path) -> None:
    root = table.parent.parent
    (row,) = read(table, f"{root}/scans/far.nii.gz")
    assert isinstance(row, Row) and row.files["image"] == root / "scans/far.nii.gz"
    for outside in (f"{root}/scans/far.nii.gz", f"{root}/lists2"):
        with pytest.raises(DataError, match="leads out"):
            read(table, outside, files_root=table.parent)


def test_a_folder_that_holds_all_files_can_be_given(table: Path) -> None:
    root = table.parent.parent
    for cell in (
        "scans/far.nii.gz",
        f"{root}/scans/far.nii.gz",
        f"{root}/lists/near.nii.gz",
        "lists/../scans/far.nii.gz",
    ):
        (row,) = read(table, cell, files_root=root)
        assert isinstance(row, Row) and row.files["image"].is_file()
    for cell in ("near.nii.gz", f"{root}/lists/near.nii.gz", "x/../near.nii.gz"):
        (row,) = read(table, cell)
        assert isinstance(row, Row) and row.files["image"] == root / "lists/near.nii.gz"


def test_what_is_checked_is_what_is_opened(table: Path) -> None:
    """A link in the folder is followed, as DataLad needs; ``..`` behind it does not lead elsewhere."""
    root = table.parent.parent
    (table.parent / "link").symlink_to(root / "scans")
    (row,) = read(table, "link/far.nii.gz")
    assert isinstance(row, Row)
    assert inside(table.parent, "link/../near.nii.gz") == table.parent / "near.nii.gz"


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "a/../../x", "a\0b", "a/b/../../../x"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path, name)
    assert inside(tmp_path, "a/./b") == tmp_path / "a/b" and inside(Path(), "x").is_absolute()


@pytest.mark.parametrize("storage", STORAGES)
def test_an_index_names_no_file_outside_of_its_folder(tmp_path: Path, storage: str) -> None:
    out = tmp_path / "out"
    packed(bids(tmp_path / "source", PEOPLE), out, storage=storage)
    index = Index.load(out)
    (tmp_path / "outside").write_bytes(b"x")
    name = "../outside"
    dataclasses.replace(index, files={**index.files, name: {"bytes": 1, "sha256": "0" * 64}}).save(out)
    with pytest.raises(DataError, match=r"file '\.\./outside' leads out of"):
        list(verify(out))
    if storage == "webdataset":
        dataclasses.replace(index, records=[dataclasses.replace(r, shard=name) for r in index.records]).save(out)
        with pytest.raises(IntegrityError, match="no file of this data set"):
            open_dataset(out).read("sub-00", "image")
    header = read_header(out)
    header["tables"]["records"]["file"] = f"../out/{header['tables']['records']['file']}"
    write_header(out, {k: v for k, v in header.items() if k != "version"})
    with pytest.raises(IntegrityError, match="leads out of"):
        open_dataset(out)
