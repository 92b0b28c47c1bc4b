"""Node 0 of a job: it gathers the others, looks whether all is well, starts Ray and the driver, and decides what then.

Where a process of Ray or the driver dies, Ray and the driver are started anew within the job; where a whole node is
lost or the signal before preemption or the time limit comes, the job goes back to the queue. Either way the stage
resumes from its last checkpoint.
"""

import contextlib
import itertools
import json
import math
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launchers import slurm
from launchers.allocation import Allocation, Assignment
from launchers.driver import AGAIN, DONE, STOPPED, WRONG
from launchers.jobs import Job, jobs_of, locked, release, submitted
from launchers.node import BOOT_S, TICK_S, Member, Signals
from launchers.preflight import judge
from launchers.process import Ward
from launchers.rendezvous import Hub, Message, free_port, own_address
from shards.files import write_text

LEAVE_S = 20  # how long nodes may take to end what they run
LINGER_S = 3  # after the driver's failure, for word of what caused it
MARGIN_S = 15  # of the time before the end, what is kept to go back to the queue
EVERYWHERE = (
    "mvhpc/listening.c was not compiled: the store of PyTorch's workers, and of several nodes Ray's servers too, "
    "listen on all of a node's interfaces; install a C compiler, then mvhpc again, in a path without spaces"
)


class Failed(Exception):
    """The job cannot go on, and starting it again would not help."""


class Broken(Exception):
    """A process of Ray is gone; its nodes are well."""


class Lost(Exception):
    """A node is gone."""


class Terminated(Exception):
    """SLURM ends the job, or takes it back into the queue by itself."""


class Stopped(Exception):
    """The job is to make room, and goes back to the queue."""


class Lead:
    """Node 0's part."""

    def __init__(self, assignment: Assignment, allocation: Allocation, folder: Path, signals: Signals) -> None:
        self.assignment, self.allocation, self.folder, self.signals = assignment, allocation, folder, signals
        self.run_folder = Path(assignment.run)
        known = [job for job in jobs_of(self.run_folder) if job.id == allocation.job]
        self.job: Job = (
            known[-1]
            if known
            else submitted(self.run_folder, allocation.job, "slurm", assignment.stage, assignment.nodes)
        )
        self.workers = assignment.workers(allocation)
        self.with_ray = allocation.nodes > 1 or self.workers > 1
        self.stop_file = folder / "stop"
        self.names = {0: allocation.name}
        self.came, self.checked, self.joined, self.ended = {0}, set[int](), set[int](), set[int]()
        self.gone: set[int] = set()
        self.address = ""
        self.attempt = 0
        self.out_of_time = False
        self.before = ""
        self.began = time.monotonic()

    def run(self) -> None:
        """Lead the job to one of its ends."""
        allocation = self.allocation
        self.job.tell("start", restart=allocation.restart, nodes=allocation.nodes, workers=self.workers)
        print(
            f"job {allocation.job}: {self.assignment.stage} on {allocation.nodes} node(s), {self.workers} worker(s)",
            flush=True,
        )
        why = ""
        try:
            self._hold()
            end, why = self._boot_and_train()
        except Failed as error:
            end, why = "failed", str(error)
        except Lost as error:
            end, why = "requeue", str(error)
        except Stopped as error:
            end, why = "requeue", str(error)
        except Terminated:
            end = "terminated"
        except Exception as error:
            self._finish("failed", f"{type(error).__name__}: {error}")
            raise
        if end == "requeue":
            self._requeue(why)
        elif end == "terminated":
            self._terminated()
        else:
            self._finish(end, why)
        if end == "failed":
            raise SystemExit(1)

    def _hold(self) -> None:
        """Hold the run, as it was submitted; SLURM may have started this job again after another one took it over."""
        with locked(self.run_folder) as lock:
            if lock.holder is not None and lock.holder.id != self.job.id:
                raise Failed(f"{self.run_folder} is held by job {lock.holder.id}")
            lock.give(self.job)

    def _boot_and_train(self) -> tuple[str, str]:
        token = self.folder.parent / "token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        with contextlib.ExitStack() as stack:
            try:
                alone = self.allocation.nodes == 1
                ip, interface = ("127.0.0.1", "lo") if alone else own_address(self.assignment.interface, None)
                self.link = Hub(ip, token.read_text())
                stack.callback(self._close)
                tell: Callable[[Message], None] = lambda message: self.link.messages.put((0, message))  # noqa: E731
                self.member = Member(self.assignment, self.allocation, self.folder, token, ip, interface, tell)
                stack.callback(self.member.close)
                if self.with_ray and "MVHPC_LISTEN" not in self.member.environment:
                    print(EVERYWHERE, flush=True)
            except (RuntimeError, OSError) as error:
                raise Failed(str(error)) from error
            self._gather()
            self._preflight(ip)
            retries = int(self.assignment.values.get("compute", {}).get("retries", 0))
            failures, before = 0, self._newest()
            for attempt in itertools.count():
                try:
                    status = self._attempt(attempt)
                    why = f"the driver ended with status {status}"
                except Broken as error:
                    status, why = AGAIN, str(error)
                self.job.tell("exit", attempt=attempt, status=status, why=why)
                if status == DONE:
                    return "finished", ""
                if status == STOPPED:
                    return self._stopped()
                if self.signals.stop:
                    return "requeue", why
                if status == WRONG:
                    return "failed", self._last_words()
                newest = self._newest()
                failures = failures + 1 if newest == before else 1  # in a row, without a checkpoint between
                before = newest
                if failures > retries:
                    break
                print(f"{why}; starting anew from the last checkpoint", flush=True)
            return "failed", f"{why}, for the {failures}. time in a row (compute.retries={retries}); see {self.folder}"

    # --- hearing ---

    def _pump(self) -> None:
        """Take in one thing that the nodes say, or none.

        Raises:
            Broken, Lost, Failed, Terminated, Stopped: what it means.
        """
        self.member.tick()
        if self.signals.terminate:
            raise Terminated
        heard = self.link.next(TICK_S)
        if heard is None:
            return
        node, message = heard
        name = self.names.get(node, f"node {node}")
        if message is None:
            self.gone.add(node)
            raise Lost(f"{name} is gone")
        if message.get("attempt", self.attempt) != self.attempt:
            return  # of a Ray that was ended since
        if message["event"] == "came":
            self.names[node] = message.get("name", name)
            self.came.add(node)
        elif message["event"] == "joined":
            self.joined.add(node)
            self.address = self.address or message["address"]
        elif message["event"] == "unfit":
            raise Failed(f"{name}: {message['why']}")
        elif message["event"] == "broken":
            raise Broken(f"{name}: {message['why']}")
        else:
            {"checked": self.checked, "ended": self.ended}[message["event"]].add(node)

    def _until(self, condition: Callable[[], bool], what: Callable[[], str], seconds: float = BOOT_S) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise Failed(what())
            if self.signals.stop:
                raise Stopped("told to make room before training began")
            self._pump()

    def _missing(self, there: set[int]) -> str:
        absent = sorted(set(range(self.allocation.nodes)) - there)
        return ", ".join(f"{self.names.get(k, f'node {k}')} (its log: {self.job.id}_{k}_log.out)" for k in absent)

    # --- the steps of booting ---

    def _gather(self) -> None:
        write_text(self.folder / "head.json", json.dumps({"address": self.link.address}))
        everybody = set(range(self.allocation.nodes))
        self._until(
            lambda: self.came >= everybody,
            lambda: f"{self._missing(self.came)} did not come within {BOOT_S} s; can it see {self.run_folder}?",
        )

    def _preflight(self, ip: str) -> None:
        allocation = self.allocation
        start = time.monotonic()
        several = allocation.nodes > 1 or allocation.gpus > 1
        message = {"do": "check", "address": f"{ip}:{free_port(ip)}" if several else ""}
        self.link.tell(message)
        self.member.obey(message)
        everybody = set(range(allocation.nodes))
        self._until(
            lambda: self.checked >= everybody,
            lambda: f"{self._missing(self.checked)} did not end the preflight within {BOOT_S} s",
        )
        reports, unseen = {}, []
        for node, name in sorted(self.names.items()):
            try:
                reports[name] = json.loads((self.folder / f"preflight-{node}.json").read_text())
            except OSError:
                unseen.append(name)
        problems = judge(reports, unseen)
        summary = {"nodes": reports, "problems": problems, "seconds": round(time.monotonic() - start, 1)}
        write_text(self.folder / "preflight.json", json.dumps(summary, indent=1))
        if problems:
            raise Failed("\n".join(["preflight:", *problems]))
        rates = [r["reduce"]["gbit_per_second"] for r in reports.values() if "reduce" in r]
        told = {"gbit_per_second": min(rates)} if rates else {}
        self.job.tell("preflight", seconds=summary["seconds"], **told)

    def _attempt(self, attempt: int) -> int:
        """Start Ray and the driver, and return the driver's exit status."""
        self.attempt = attempt
        start = time.monotonic()
        try:
            if self.with_ray:
                self._start_ray(attempt)
            self.job.tell("boot", attempt=attempt, seconds=round(time.monotonic() - start, 1))
            return self._drive(attempt)
        finally:
            self._end_ray()

    def _start_ray(self, attempt: int) -> None:
        self.joined.clear()
        self.address = ""
        message: Message = {"do": "ray", "head": None, "attempt": attempt, "workers": self.workers}
        what = lambda: f"Ray did not start within {BOOT_S} s on {self._missing(self.joined)}; see {self.folder}"  # noqa: E731
        self.member.obey(message)
        self._until(lambda: 0 in self.joined, what)
        self.link.tell({**message, "head": self.address})
        self._until(lambda: len(self.joined) == self.allocation.nodes, what)

    def _drive(self, attempt: int) -> int:
        values = self.assignment.values
        if "compute" in values:
            values = {**values, "compute": {**values["compute"], "workers": self.workers}}
        # Looked at once: later on, what is there is this job's own.
        first = attempt == 0 and self.allocation.restart == 0
        work = {"stage": self.assignment.stage, "values": values, "chained": self.assignment.chained and first}
        path = self.folder / "work.json"
        write_text(path, json.dumps(work, indent=1))
        environment = {**self.member.environment, "MVHPC_STOP_FILE": str(self.stop_file)}
        if self.with_ray:
            environment["RAY_ADDRESS"] = self.address
        self.before = self._newest()
        driver = Ward(
            [sys.executable, "-u", "-m", "launchers.driver", str(path)], environment, None, self.member.scratch
        )
        deadline = math.inf
        try:
            while (status := driver.poll()) is None:
                if self.signals.stop and deadline == math.inf:
                    deadline = time.monotonic() + self._stop()
                if time.monotonic() > deadline:
                    raise Stopped("no checkpoint was written in time; going back to the last one")
                self._pump()
            if status not in (DONE, STOPPED):  # was it its own fault?
                end = time.monotonic() + LINGER_S
                while time.monotonic() < end:
                    self._pump()
            return status
        finally:
            driver.end()

    def _end_ray(self) -> None:
        """End Ray everywhere; a node that does not answer is on its own."""
        if not self.with_ray:
            return
        self.ended = {0}
        self.link.tell({"do": "end"})
        self.member.end_ray()
        end = time.monotonic() + LEAVE_S
        while self.ended | self.gone < set(range(self.allocation.nodes)) and time.monotonic() < end:
            heard = self.link.next(TICK_S)
            if heard is not None and heard[1] is None:
                self.gone.add(heard[0])
            elif heard is not None and heard[1] is not None and heard[1]["event"] == "ended":
                self.ended.add(heard[0])

    # --- stopping ---

    def _stop(self) -> float:
        """Ask the driver to write a checkpoint, and return how many seconds it has.

        Raises:
            Stopped: where the stage cannot.
            Failed: where it cannot and has run to its time limit: it would do so again and again.
        """
        self.out_of_time = slurm.seconds_left(self.job.id) < 2 * self.assignment.signal_delay + 60
        self.job.tell("stop", why="time limit" if self.out_of_time else "preemption")
        if self.assignment.trains:
            self.stop_file.touch()
            return max(10, self.assignment.signal_delay - MARGIN_S)
        if self.out_of_time:
            raise Failed("not done within the time limit; submit it again with a longer --time")
        raise Stopped("preempted")

    def _stopped(self) -> tuple[str, str]:
        if not self.signals.stop:
            return "stopped", "on request, with a checkpoint; submit it again to go on"
        if self.out_of_time and self._newest() == self.before:
            return "failed", "not a step was done within the time limit; submit it again with a longer --time"
        return "requeue", "time limit" if self.out_of_time else "preempted"

    def _newest(self) -> str:
        return max((p.name for p in (self.run_folder / "checkpoints").glob("step-*")), default="")

    def _close(self) -> None:
        """Send the others away, and wait a little until they went."""
        self.link.tell({"do": "leave"})
        end = time.monotonic() + LEAVE_S
        while len(self.gone) < len(self.came) - 1 and time.monotonic() < end:
            heard = self.link.next(TICK_S)
            if heard is not None and heard[1] is None:
                self.gone.add(heard[0])
        self.link.close()

    # --- ends ---

    def _finish(self, end: str, why: str) -> None:
        (self.folder.parent / "token").unlink(missing_ok=True)
        self.job.tell(end, **({"why": why} if why else {}), seconds=round(time.monotonic() - self.began, 1))
        print(f"job {self.job.id} {end}{': ' if why else ''}{why}", flush=True)
        release(self.run_folder, self.job.id)

    def _requeue(self, why: str) -> None:
        self.job.tell("requeue", why=why)
        print(f"job {self.job.id}: {why}; back to the queue", flush=True)
        why_not = ""
        try:
            # Called dead by SLURM, this node may be late: the job may wait, or run elsewhere, already.
            if slurm.restarts(self.job.id) == self.allocation.restart:
                slurm.requeue(self.job.id)
        except Exception as error:  # also where SLURM, taking the job back, ends the command that asked for it
            why_not = str(error)
        end = time.monotonic() + (2 if why_not else 60)
        while not self.signals.terminate and time.monotonic() < end:  # SLURM ends what it takes back
            time.sleep(TICK_S)
        if why_not and not self.signals.terminate:
            self._finish("failed", f"{why}, and SLURM did not take it back ({why_not}); submit it again to go on")
            raise SystemExit(1)
        raise SystemExit(128 + signal.SIGTERM)

    def _terminated(self) -> None:
        """Ended from outside: for good, or because SLURM itself takes the job back."""
        with contextlib.suppress(Exception):
            word = slurm.ending(self.job.id)
            if word in slurm.OVER:
                self._finish("cancelled" if word == "CANCELLED" else "failed", word.lower())
        raise SystemExit(128 + signal.SIGTERM)

    def _last_words(self) -> str:
        """The line in which the driver said what was wrong."""
        try:
            lines = self.job.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return f"see {self.job.log}"
        return lines[-1] if lines else f"see {self.job.log}"
