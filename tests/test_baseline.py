"""The comparison: it learns its one query, from voxels and scalars, and predicts for that one alone."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import DenseNet121
from torch import nn

from mvhpc.cli import main
from mvhpc.config import ConfigError, load_config, to_yaml
from mvhpc.evaluation.tables import read_predictions
from mvhpc.inference import predict
from mvhpc.inference.baseline_predictor import BaselinePredictor
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.predictor import PredictConfig
from mvhpc.models.baseline import Baseline
from mvhpc.models.bundle import BaselineModel, JointModel, load
from mvhpc.models.kernels import normalization
from mvhpc.models.kernels.normalization import SyncedBatchNorm
from mvhpc.models.model_folder import ModelError
from mvhpc.runs.folder import Run
from mvhpc.training.baseline import BaselineConfig, BaselineTask
from mvhpc.training.loop import train
from shards.dataset import open_dataset
from shards.index import Split
from shards.schema import Schema
from shards.writer import DatasetWriter

SCHEMA = {
    "scan": {"kind": "volume", "suffix": "T2w"},
    "small": {"kind": "volume", "suffix": "FLAIR"},
    "level": {"kind": "continuous", "range": [0, 100], "unit": "points"},
    "group": {"kind": "categorical", "classes": ["A", "B"]},
    "nobody": {"kind": "continuous", "range": [0, 1]},
}
SHAPES = {"scan": (32, 32, 32), "small": (16, 16, 16)}
NARROW = partial(DenseNet121, init_features=8, growth_rate=4, block_config=(1, 1, 1, 1))
FEW = [
    "optimizer.lr=1e-2",
    "optimizer.warmup=5",
    "training.epochs=24",
    "training.batch=8",
    "training.validate_every=4",
    "training.checkpoint_every=1000",
    "compute.device=cpu",
    "compute.threads=1",
]


def pack(folder: Path, train: int, validation: int, test: int, spacing: float = 4.0) -> Path:
    """People whose level is half their scan's mean brightness, half their group, which no scan shows.

    The last has no scan, the one before no group; in each part there are both groups.
    """
    writer = DatasetWriter(
        folder,
        "zarr",
        "volumes",
        Schema.from_dict(SCHEMA),
        {name: {"shape": shape, "dtype": "float16"} for name, shape in SHAPES.items()},
        {"spacing": spacing, "shape": [32, 32, 32], "affine": np.diag([4.0, 4.0, 4.0, 1.0]).tolist()},
    )
    rng, parts = np.random.default_rng(0), ["train"] * train + ["validation"] * validation + ["test"] * test
    keys = [f"sub-{i:02d}" for i in range(len(parts))]
    for i, key in enumerate(keys):
        bright, group = rng.uniform(0.1, 0.9), "AB"[i % 2]
        arrays = {n: (bright + 0.1 * rng.uniform(-1, 1, s)).astype(np.float16) for n, s in SHAPES.items()}
        values = {"level": 50 * bright + 25 * (i % 2), "group": None if i == len(keys) - 2 else group, "nobody": None}
        writer.add(key, key, values, {} if i == len(keys) - 1 else arrays)
    writer.finish({"default": Split("fractions", 0, [0.8, 0.1, 0.1], [], "", dict(zip(keys, parts)))})
    return folder


def config(data: Path, out: Path, *overrides: str, want: str = "level", given: str = "[scan,group]") -> BaselineConfig:
    places = [f"data={data}", f"out={out}", f"want={want}", f"given={given}"]
    return load_config(BaselineConfig, "baseline", "default", [*places, *FEW, *overrides])


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """A narrow network of as many scales, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("monai.networks.nets.DenseNet121", NARROW)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("people") / "data", 24, 8, 8)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The run folder of ``level given scan, group``, and the output of training."""
    folder = tmp_path_factory.mktemp("runs") / "level"
    folder.mkdir()
    settings = config(data, folder)
    (folder / "config.yaml").write_text(to_yaml(settings))
    (folder / "stage.json").write_text(json.dumps({"stage": "baseline"}))
    return folder, train(BaselineTask(settings), settings, folder)


def query(model: Path, data: Path, folder: Path, **values: Any) -> PredictConfig:
    """The configuration of a query, by default that of the trained baseline."""
    places = {"model": str(model), "data": str(data), "out": str(folder / "a.tsv"), "compute.device": "cpu"}
    names = {"given": ["scan", "group"], "want": ["level"]}
    return load_config(PredictConfig, "predict", "default", (), places | names | values)


def answers(model: Path, data: Path, folder: Path, **values: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Run stage ``predict``: its summary, its table, and the description of the table."""
    folder.mkdir(exist_ok=True)
    summary = predict.run(query(model, data, folder, **values), Run(folder))
    return summary, *read_predictions(folder / "a.tsv")


def test_it_learns_a_law_of_the_image_and_of_a_scalar(
    data: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    """The error is well below what the image alone allows: the group, worth 25, is in no voxel."""
    folder, summary = trained
    assert summary["validation/mae"] < 5
    predictor = open_predictor(query(folder, data, tmp_path, given=["group", "scan"]))
    assert isinstance(predictor, BaselinePredictor)
    keys = predictor.dataset.keys("validation")
    voxels, values, present = predictor.inputs(keys)
    as_a, as_b = (predictor.predict(voxels, values | {"group": torch.full((8,), g)}, present) for g in (0, 1))
    assert float((as_b - as_a).mean()) == pytest.approx(25, abs=5)
    truth = torch.tensor([predictor.dataset.values(key)["level"] for key in keys], dtype=torch.float64)
    prediction = predictor.predict(voxels, values, present)
    assert float((prediction - truth).abs().mean()) == pytest.approx(summary["validation/mae"], rel=1e-4)
    unknown = {name: torch.zeros_like(there) for name, there in present.items()}
    assert not torch.equal(predictor.predict(voxels, values, unknown), prediction)
    scrambled = {"group": 1 - values["group"], "level": values["level"] + 7}  # what is missing, or wanted, is not seen
    assert torch.equal(predictor.predict(voxels, scrambled, unknown), predictor.predict(voxels, values, unknown))


def test_answers_are_points_whatever_the_batch(
    data: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder, _ = trained
    summary, frame, description = answers(folder, data, tmp_path / "one", batch=1)
    _, again, _ = answers(folder, data, tmp_path / "four", batch=4)
    assert list(frame) == ["key", "subject", "level", "level_sd", "level_true", "not_given", "flag"]
    assert frame["flag"].tolist() == ["ok"] * 7 + ["no scan"]
    assert description["answered"]["people"] == summary["answered"] == 7 and description["part"] == "test"
    _, trained_on, _ = answers(folder, data, tmp_path / "train", split="train")
    assert set(trained_on["flag"]) == {"the model learnt from this scan"}
    assert frame["key"].tolist() == again["key"].tolist() == open_dataset(data).keys("test")
    for column in ("level", "level_true"):
        assert again[column].to_numpy() == pytest.approx(frame[column].to_numpy(), rel=1e-4, nan_ok=True)
    assert frame["level_sd"].isna().all()
    assert frame.loc[frame["not_given"].notna(), "not_given"].tolist() == ["group", "scan"]
    assert frame["level"].isna().tolist() == [False] * 7 + [True]  # who has no scan gets no answer
    error = (frame["level"] - frame["level_true"]).abs()
    assert summary["test/level_mae"] == pytest.approx(error.mean(), rel=1e-4) and error[:6].mean() < 6
    assert summary["network_calls"] == description["network_calls"] == 1 and "test/level_in_90" not in summary
    assert (tmp_path / "one" / "figures" / "level.png").read_bytes()[:4] == b"\x89PNG"


def test_a_checkpoint_exports_to_what_training_wrote(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    """A finished run that is started again returns the same at once."""
    folder, summary = trained
    checkpoint = folder / "checkpoints" / f"step-{int(summary['best_step']):08d}"
    assert main(["export", str(checkpoint), str(tmp_path / "export")]) == 0
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "export" / "model").iterdir()} == files
    settings = load_config(BaselineConfig, "baseline", str(folder / "config.yaml"))
    assert train(BaselineTask(settings), settings, folder) == summary
    assert isinstance(load(folder), BaselineModel)
    with pytest.raises(ModelError, match="of the kind baseline;"):
        load(folder, kind=JointModel)
    weights = next((tmp_path / "export" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=weights.name):
        load(tmp_path / "export")


def test_a_category_is_answered_by_chances(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the network at its full depth of 121 layers, which starts undecided."""
    monkeypatch.setattr("monai.networks.nets.DenseNet121", DenseNet121)
    settings = config(data, tmp_path, want="group", given="[level,scan]")
    task = BaselineTask(settings)
    network = task.networks["baseline"].eval()
    assert sum(isinstance(part, (nn.Conv3d, nn.Linear)) for part in network.modules()) == 121
    assert (task.samples, task.validation) == (24, 8)
    levels = [task.dataset.values(key)["level"] for key in task.train]
    assert task.intervals["level"] == pytest.approx([np.mean(levels) + sign * np.std(levels) for sign in (-1, 1)])
    with torch.no_grad():
        found = task.validate([0, 1], {"baseline": network})
    task.export(tmp_path / "model", {"baseline": network.state_dict()}, {})
    _, frame, _ = answers(tmp_path, data, tmp_path / "p", given=["scan", "level"], want=["group"], split="validation")
    chances = frame[["group_p_A", "group_p_B"]].to_numpy()
    assert chances.sum(1) == pytest.approx(1, abs=1e-5) and len(set(chances[:, 0])) > 1
    right = np.array([p["AB".index(t)] for p, t in zip(chances, frame["group_true"])])[:2]
    assert -np.log(right) == pytest.approx(found["loss"].numpy(), rel=1e-3)
    assert found["accuracy"].tolist() == (frame["group"] == frame["group_true"])[:2].astype(float).tolist()


def small_network(name: str, data: Path, tmp_path: Path, *overrides: str) -> BaselineTask:
    """A task whose ViT or BRAID is small."""
    few = ["vit.hidden=24", "vit.layers=2", "vit.heads=2", "vit.mlp=48", "braid.depth=10", "braid.width=0.125"]
    return BaselineTask(config(data, tmp_path, f"name={name}", *few, *overrides))


@pytest.mark.parametrize("name", ["vit", "braid"])
def test_other_networks_learn_the_law_and_are_stored_whole(data: Path, tmp_path: Path, name: str) -> None:
    """The group, worth 25 points, is in no voxel; a missing one counts as none of the groups."""
    task = small_network(name, data, tmp_path, "training.epochs=30")
    summary = train(task, task.config, tmp_path)
    assert summary["validation/mae"] < 7
    model = load(tmp_path, kind=BaselineModel)
    assert model.name == name and model.meta["network"]["settings"]
    predictor = open_predictor(query(tmp_path, data, tmp_path))
    assert isinstance(predictor, BaselinePredictor) and predictor.method != "3D DenseNet121"
    voxels, values, present = predictor.inputs(predictor.dataset.keys("validation"))
    prediction = predictor.predict(voxels, values, present)
    truth = [predictor.dataset.values(key)["level"] for key in predictor.dataset.keys("validation")]
    assert np.abs(prediction.numpy() - truth).mean() == pytest.approx(summary["validation/mae"], rel=1e-3)
    unknown = {name: torch.zeros_like(there) for name, there in present.items()}
    scrambled = {"group": 1 - values["group"], "level": values["level"] + 7}
    assert torch.equal(predictor.predict(voxels, scrambled, unknown), predictor.predict(voxels, values, unknown))
    assert not torch.equal(predictor.predict(voxels, values, unknown), prediction)


def test_a_vit_is_not_bounded_and_braid_joins_scalars_before_a_linear_layer(data: Path, tmp_path: Path) -> None:
    vit = small_network("vit", data, tmp_path).networks["baseline"]
    assert not any(isinstance(part, nn.Tanh) for part in vit.modules())
    task = small_network("braid", data, tmp_path, "want=group", "given=[scan,level]")
    network, batch = task.networks["baseline"].eval(), task.load([0, 1, 2])
    x, present = batch["voxels"].float(), batch["present"]
    with torch.no_grad():
        low, middle, high = (network(x, {"level": torch.full((3, 1), level)}, present) for level in (-1.0, 0.0, 1.0))
    torch.testing.assert_close(high - middle, middle - low)  # linear in the level, whatever the scan
    torch.testing.assert_close((high - low)[0], (high - low)[1])
    assert (high - low).abs().min() > 1e-4 and not torch.equal(low[0], low[1])


def test_settings_that_no_network_has_are_refused(data: Path, tmp_path: Path) -> None:
    for words, overrides in (
        ("Did you mean 'braid'", ["name=brai"]),
        ("braid.depth=11", ["braid.depth=11"]),
        ("vit.hidden=25 does not divide", ["vit.hidden=25", "vit.heads=2"]),
        ("not divided evenly by vit.patch=5", ["name=vit", "vit.patch=5"]),
    ):
        with pytest.raises(ConfigError, match=words):
            BaselineTask(config(data, tmp_path, *overrides))
    assert config(data, tmp_path, "name=vit", "optimizer.lr=0").learning_rates["vit"] > 0


def test_mirroring_is_left_to_right_and_the_samples_own(data: Path, tmp_path: Path) -> None:
    seen = []

    class Spy:
        def __call__(self, voxels: torch.Tensor, *rest: Any) -> torch.Tensor:
            seen.append(voxels)
            return torch.zeros(len(voxels), 1)

        def backward(self, loss: torch.Tensor) -> None: ...

        def step(self) -> None: ...

    for flip, indices in ((0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (0.5, [0, 1, 2, 3]), (0.5, [3, 2])):
        task = BaselineTask(config(data, tmp_path, f"flip={flip}"))
        task.step(task.load(indices), {"baseline": Spy()}, 3, indices)  # type: ignore[dict-item]
    plain, mirrored, some, others = seen
    assert torch.equal(mirrored, plain.flip(2)) and not torch.equal(mirrored, plain)
    assert torch.equal(some[[3, 2]], others)
    turned = [torch.equal(a, b) for a, b in zip(some, mirrored)]
    assert 0 < sum(turned) < 4


def test_a_resumed_run_is_an_undisturbed_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, the running statistics of the normalisation too."""
    few = ["training.epochs=3", "training.validate_every=3", "training.checkpoint_every=2"]
    train(BaselineTask(config(data, tmp_path, *few)), config(data, tmp_path, *few), tmp_path / "whole")
    step = BaselineTask.step

    def fail(self: BaselineTask, batch: Any, engines: Any, number: int, indices: list[int]) -> Any:
        if number == 5:
            raise RuntimeError("killed")
        return step(self, batch, engines, number, indices)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(BaselineTask, "step", fail)
        train(BaselineTask(config(data, tmp_path, *few)), config(data, tmp_path, *few), tmp_path / "pieces")
    assert not (tmp_path / "pieces" / "model").exists()
    train(BaselineTask(config(data, tmp_path, *few)), config(data, tmp_path, *few), tmp_path / "pieces")
    whole, pieces = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "model").iterdir()} for name in ("whole", "pieces")
    )
    assert whole == pieces


def test_evaluation_says_what_training_does(data: Path, tmp_path: Path) -> None:
    """Calibrated on everybody at once, the statistics are theirs, whatever was there before; of small batches not."""
    task = BaselineTask(config(data, tmp_path, "training.batch=6"))  # a calibrating batch is four of these
    network = task.networks["baseline"]
    assert isinstance(network, Baseline)
    everybody = list(task.load(list(range(24))).values())
    everybody[0] = everybody[0].float()

    def says(training: bool) -> torch.Tensor:
        with torch.no_grad():
            prediction: torch.Tensor = network.train(training)(*everybody)
        return prediction

    def off() -> float:
        known, prediction = says(False), says(True)  # the second leaves its traces in the statistics
        return float((known - prediction).abs().max() / prediction.std())

    before = off()
    task.refresh(task.networks, 0, 1)
    once = {name: value.clone() for name, value in network.state_dict().items()}
    assert network.training
    first = network.network.features.conv0(network.channels(*everybody))  # (24, C, H, W, D)
    torch.testing.assert_close(once["network.features.norm0.running_mean"], first.mean((0, 2, 3, 4)))
    torch.testing.assert_close(once["network.features.norm0.running_var"], first.var((0, 2, 3, 4)))
    assert off() < 0.2 < 1 < before  # the last layers see 24 numbers each, and estimate variance by 24 / 23
    task.refresh(task.networks, 0, 1)
    torch.testing.assert_close(network.state_dict(), once)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"want": "levle"}, "want: unknown variable 'levle'. Did you mean 'level'"),
        ({"given": "[scna]"}, "given: unknown variable 'scna'. Did you mean 'scan'"),
        ({"want": "scan"}, "want=scan is a volume; a baseline predicts a number or a category: level, group"),
        ({"given": "[scan,level]"}, "level is the wanted variable; remove it"),
        ({"given": "[scan,group,scan]"}, "name each variable once"),
        ({"given": "[group]"}, "add one of scan, small"),
        ({"given": "[]"}, "add one of scan, small"),
        ({"given": "[scan,small]"}, "volumes of one shape"),
        ({"given": "[small]"}, "pack at least 29 voxels per axis"),
        ({"want": "nobody"}, "no subject in the training part of split 'default' has nobody and scan"),
    ],
)
def test_queries_that_no_baseline_can_predict_are_refused(
    data: Path, tmp_path: Path, values: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        BaselineTask(config(data, tmp_path, **values))
    assert words in str(refused.value)


def test_batches_of_one_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs at least two samples"):
        BaselineTask(config(data, tmp_path, "training.batch=4", "training.accumulate=4"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"given": ["scan"]}, "level given scan, group, not level given scan;"),
        ({"want": ["level", "nobody"]}, "not level, nobody given scan, group;"),
        ({"draws": 5}, "draws come from a posterior"),
    ],
)
def test_another_query_is_refused(
    data: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        answers(trained[0], data, tmp_path / "p", **values)
    assert words in str(refused.value)
    assert not list(tmp_path.glob("p/a.*"))


def test_data_on_another_grid_are_refused(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    coarse = pack(tmp_path / "coarse", 1, 1, 1, spacing=5.0)
    with pytest.raises(ConfigError, match=r"pack again with spacing 4\.0"):
        open_predictor(query(trained[0], coarse, tmp_path))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_sees_the_batch_of_all_workers(monkeypatch: pytest.MonkeyPatch, momentum: float | None) -> None:
    """Two workers of half a batch each: outputs, gradients and running statistics of one with the whole batch."""
    barrier, here, sent = threading.Barrier(2), threading.local(), [torch.empty(0)] * 2

    def total(x: torch.Tensor) -> torch.Tensor:
        sent[here.rank] = x
        barrier.wait()
        summed = sent[0] + sent[1]
        barrier.wait()
        return summed

    monkeypatch.setattr(normalization, "total", total)
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(6, 4, 3, 3, 3)).requires_grad_()
    whole, *halves = (kind(4, momentum=momentum) for kind in (nn.BatchNorm3d, SyncedBatchNorm, SyncedBatchNorm))
    for part in (whole, *halves):
        nn.init.constant_(part.weight, 1.5)
    expected = whole(x)
    monkeypatch.setattr(normalization.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(normalization.dist, "get_world_size", lambda: 2)
    outputs: list[torch.Tensor] = [torch.empty(0)] * 2

    def work(rank: int) -> None:
        here.rank = rank
        outputs[rank] = halves[rank](x.chunk(2)[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat(outputs), expected)
    pull = torch.randn_like(x)
    (ours,), (theirs,) = (torch.autograd.grad((y * pull).sum(), x) for y in (torch.cat(outputs), expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for half in halves:
        torch.testing.assert_close(half.state_dict(), whole.state_dict())
    for half in halves:
        torch.testing.assert_close(half.state_dict(), whole.state_dict())
    torch.testing.assert_close(halves[0].eval()(x), whole.eval()(x))
