"""What training says on the screen: at once what it is, then how long it takes, and where it is."""

import time
from pathlib import Path

import pytest

from mvhpc.config import load_config
from mvhpc.execute import execute, plan
from mvhpc.runs.console import Console
from mvhpc.runs.journal import Journal, read
from mvhpc.runs.position import Position, duration, read_position, write_position
from mvhpc.training import loop
from mvhpc.training.pace import LONG_S, Pace, advice
from mvhpc.training.vae import VAEConfig, cheaper
from tests.toy_task import run_toy, toy_config

TINY = ["model.channels=[8,16]", "model.norm_groups=8", "model.res_blocks=1", "loss.perceptual=0", "loss.adversarial=0"]


def test_training_tells_people_steps_parameters_device_and_time_before_any_metric(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*TINY, "training.epochs=2", "training.batch=1", "training.log_every=1000", "compute.threads=1"]
    keys += [f"data={tiny_dataset}", f"out={tmp_path}/vae", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    execute(plan("vae", load_config(VAEConfig, "vae", overrides=keys)))
    lines = capsys.readouterr().err.splitlines()
    people, steps, start, left = lines[:4]
    assert people == "vae: people by part of the split 'default': train 5, validation 1, test 6"
    assert steps.startswith("vae: 10 steps (2 epochs of 5, batch 1); autoencoder 0.0")
    assert steps.endswith("million parameters; CPU (1 thread), float32")
    assert start.startswith("vae: 0/10 step")
    assert left.startswith("vae: about ") and "s a step" in left
    assert read_position(tmp_path / "vae") is None  # at the end it is gone


def test_the_position_is_written_whatever_log_every_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Position] = []
    monkeypatch.setattr("mvhpc.runtime.watchdog.PERIOD_S", 0.0)
    monkeypatch.setattr(loop, "write_position", lambda _, position: seen.append(position))
    run_toy(toy_config(training__log_every=1000), tmp_path, 0, 1)
    assert [(p.step, p.total) for p in seen] == [(step, 15) for step in range(1, 16)]
    assert seen[0].seconds_left is None and all(p.seconds_left is not None for p in seen[1:])
    assert seen[-1].seconds_left == 0
    notes = [e["text"] for e in read(tmp_path) if e["event"] == "note"]
    assert len(notes) == 2 and "left" in notes[1]


def test_the_first_step_does_not_count_in_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 130.0])  # the first step ended at 100, the second at 110, the fourth at 130
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    pace = Pace(604)
    assert pace.left(1) is None
    assert pace.left(2) == 10 * 602
    assert pace.left(4) == 10 * 600


def test_the_console_shows_what_others_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path)
    journal.write("note", text="of an earlier start")
    console = Console("vae", tmp_path)
    journal.write("note", text="people 3")
    journal.write("start", step=4, total=10)
    write_position(tmp_path, Position(6, 10, 8.0))
    journal.write("warning", step=6, text="the disk is full")
    console.start()
    time.sleep(0.5)
    console.close()
    shown = capsys.readouterr().err
    assert shown.splitlines() == ["vae: people 3", "vae: 4/10 steps, 40 %, 00:00 so far", "step 6: the disk is full"]
    bar = console._bar
    assert bar is not None and bar.done == 6 and bar.rate == 0.5


def test_a_long_training_on_a_cpu_gets_keys_that_make_it_short_enough() -> None:
    config = load_config(VAEConfig, "vae", overrides=["data=a", "out=b"])
    shorter = cheaper(config.model, {"spacing": 2.0, "shape": [80, 96, 80]})
    assert shorter[1] == "shards pack --spacing 4 --shape 40 48 40 (8 times fewer voxels)"
    assert advice(LONG_S, 100, shorter) == ""
    text = advice(10 * LONG_S, 100, shorter)
    assert "training.epochs=10 (about 3.0 h)" in text
    assert max(map(len, text.splitlines())) < 120
    named = [word for word in text.split() if "=" in word]
    narrow = load_config(VAEConfig, "vae", overrides=["data=a", "out=b", *named])  # keys that exist
    assert narrow.training.epochs == 10
    assert cheaper(narrow.model, {"spacing": 4.0, "shape": [40, 48, 40]}) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (600, "10 min"), (9000, "2.5 h"), (70 * 3600, "2.9 days"), (36000, "10 h")]
)
def test_durations_are_in_their_own_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
