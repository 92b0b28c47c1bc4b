"""Laws of the encodings: they invert each other, and missing values are marked."""

import pytest
import torch

from mvhpc.variables import Categorical, Continuous, Variables, Volume, check_known, standard_intervals
from shards.errors import DataError
from shards.schema import Schema, Value

SCHEMA = Schema.from_dict(
    {
        "image": {"kind": "volume", "suffix": "T1w"},
        "age": {"kind": "continuous", "range": [0, 120], "unit": "years"},
        "site": {"kind": "categorical", "classes": ["oslo", "lima", "pune"]},
    }
)
VARIABLES = Variables.from_schema(
    SCHEMA, {"image": {"shape": [2, 3, 4, 5], "mean": torch.rand(2, 3, 4, 5), "sd": 0.5 + torch.rand(2, 3, 4, 5)}}
)


def test_ordinal_values_are_brought_to_whole_numbers_alone_where_drawn() -> None:
    score = Variables.from_schema(Schema.from_dict({"score": {"kind": "ordinal", "range": [0, 30]}}), {})["score"]
    assert isinstance(score, Continuous)
    z = score.encode([0.0, 7.0, 30.0])
    assert score.decode(z).tolist() == pytest.approx([0, 7, 30])
    assert score.snap(score.decode(z + 0.02)).tolist() == [0, 7, 30]
    assert score.snap(score.decode(3 * z)).tolist() == [0, 0, 30]  # no level beyond the ends


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.2, -3.3])
def test_a_number_that_does_not_vary_keeps_its_schemas_range(constant: float) -> None:
    rows: list[dict[str, Value]] = [{"age": constant}] * 77 + [{"age": None}, {}]
    assert standard_intervals(SCHEMA, rows) == {}
    low, high = standard_intervals(SCHEMA, [*rows, {"age": constant + 1}])["age"]
    assert low < constant < high < constant + 1


def test_schema_keeps_order_and_kinds() -> None:
    assert VARIABLES.names == ["image", "age", "site"]
    assert [(v.name, v.shape) for v in VARIABLES.volumes] == [("image", (2, 3, 4, 5))]
    assert VARIABLES.scalars == [
        Continuous("age", 0, 120, "years", range=(0, 120)),
        Categorical("site", ("oslo", "lima", "pune")),
    ]


def test_ends_of_the_range_become_minus_one_and_one() -> None:
    assert Continuous("age", 20, 100).encode([20, 60, 100]).tolist() == [[-1.0], [0.0], [1.0]]


def test_encodings_invert() -> None:
    ages = [0.0, 33.3, 119.0, 131.0]  # the last out of its range: neither refused nor clipped here
    age = Continuous("age", 0, 120)
    torch.testing.assert_close(age.decode(age.encode(ages)), torch.tensor(ages, dtype=torch.float64), atol=1e-5, rtol=0)
    site = Categorical("site", ("oslo", "lima", "pune"))
    assert site.decode(site.encode(["pune", "oslo"])) == ["pune", "oslo"]
    latents = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(VARIABLES.volumes[0].decode(VARIABLES.volumes[0].encode(latents)), latents)


def test_what_is_reported_is_within_the_schemas_range() -> None:
    variables = Variables.from_schema(
        Schema.from_dict({"age": {"kind": "continuous", "range": [0, 120]}}), {}, {"age": [40.0, 60.0]}
    )
    age = variables["age"]
    assert isinstance(age, Continuous)
    far = age.decode(torch.tensor([[-170.0], [0.5], [90.0]]))
    assert far.tolist() == [-1650.0, 55.0, 950.0]
    assert age.clip(far).tolist() == age.snap(far).tolist() == [0.0, 55.0, 120.0]


def test_a_variable_that_nobody_has_is_refused() -> None:
    check_known(SCHEMA, [{"age": None, "site": "lima"}, {"age": 40.0}])
    with pytest.raises(DataError, match="none of the 2 training subjects has age: "):
        check_known(SCHEMA, [{"age": None, "site": "lima"}, {"site": "oslo"}])


def test_a_variable_of_a_single_value_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    check_known(SCHEMA, [{"age": 40.0, "site": "lima"}, {"age": 41.0, "site": "lima"}, {"age": 41.0}])
    (note,) = capsys.readouterr().err.splitlines()
    assert note == "note: all training subjects that have site have lima: it is not predicted"


def test_moments_standardise_each_element() -> None:
    g = torch.Generator().manual_seed(0)
    latents = 3 + 7 * torch.rand(2, 3, 4, 5, generator=g) * torch.randn(50, 2, 3, 4, 5, generator=g)
    z = Volume("image", (2, 3, 4, 5), latents.mean(0), latents.std(0)).encode(latents)
    torch.testing.assert_close(z.mean(0), torch.zeros(2, 3, 4, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(2, 3, 4, 5))


def test_missing_values_are_marked_and_harmless() -> None:
    rows: list[dict[str, Value]] = [
        {"age": 60.0, "site": None},
        {"age": float("nan"), "site": "lima"},
        {"site": "pune"},
    ]
    batch, present = VARIABLES.encode_scalars(rows)
    assert present["age"].tolist() == [True, False, False]
    assert present["site"].tolist() == [False, True, True]
    assert batch["age"].isfinite().all()
    assert batch["site"].tolist()[1:] == [1, 2]


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"site: unknown class 'limma'. Did you mean 'lima'"):
        VARIABLES.encode_scalars([{"age": 3.0, "site": "limma"}])
    with pytest.raises(KeyError, match="Did you mean 'age'"):
        VARIABLES["agee"]


def test_a_volume_without_latents_is_named() -> None:
    with pytest.raises(ValueError, match="no latents of volume 'image'"):
        Variables.from_schema(SCHEMA, {})


def test_two_variables_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="share a name"):
        Variables([Continuous("a", 0, 1), Categorical("a", ("x", "y"))])
