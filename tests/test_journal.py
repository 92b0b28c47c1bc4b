import threading
import time
from pathlib import Path

from mvhpc.runs.journal import FILE, Journal, JournalTail, read, unseen


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    journal.write("start", step=0, total=10)
    journal.write("metrics", step=2, metrics={"train/loss": 0.1 + 0.2})
    Journal(tmp_path / "run").write("end", step=10)  # another writer goes on behind it
    events = read(tmp_path / "run")
    assert [e["event"] for e in events] == ["start", "metrics", "end"]
    assert events[1]["metrics"] == {"train/loss": 0.1 + 0.2}
    assert events[0]["time"] <= events[2]["time"]


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("start", step=0, total=4)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "metrics", "st')  # killed while writing
    journal.write("metrics", step=2, metrics={"a": 1})
    assert [e.get("step") for e in read(tmp_path)] == [0, 2]


def test_a_reader_sees_every_event_once_however_it_is_cut(tmp_path: Path) -> None:
    stop, seen, reader = threading.Event(), [], JournalTail(tmp_path)  # before there is a file

    def read_on() -> None:
        while not stop.is_set():
            seen.extend(reader.new())

    thread = threading.Thread(target=read_on)
    thread.start()
    journal = Journal(tmp_path)
    for step in range(50):
        journal.write("metrics", step=step, metrics={"a": step})
        time.sleep(0.01 if step % 10 == 0 else 0)
    stop.set()
    thread.join(timeout=5)
    seen.extend(reader.new())
    assert [e["step"] for e in seen] == list(range(50))


def test_many_writers_never_mix_their_lines(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for step in range(40):
            Journal(tmp_path).write("metrics", step=step, metrics={str(number): 1.0}, filler="x" * 3000)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = read(tmp_path)
    assert len({(e["step"], *e["metrics"]) for e in events}) == len(events) == 160


def test_replayed_metrics_are_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for first in (0, 2):  # resumed from step 2
        journal.write("start", step=first, total=6)
        for step in range(first + 1, 5 + first // 2):
            journal.write("metrics", step=step, metrics={"loss": step + first / 10})
    journal.write("metrics", step=5, metrics={"loss": 9.0, "validation": 1.0})  # half of it is new
    kept = [(e["step"], e["metrics"]) for e in unseen(read(tmp_path)) if e["event"] == "metrics"]
    assert kept == [
        (1, {"loss": 1.0}),
        (2, {"loss": 2.0}),
        (3, {"loss": 3.0}),
        (4, {"loss": 4.0}),
        (5, {"loss": 5.2}),
        (5, {"validation": 1.0}),
    ]
    assert sum(e["event"] == "start" for e in unseen(read(tmp_path))) == 2
