"""Node 0 of a job: it forms the cluster, runs the driver, and decides what follows from its end.

Where a Ray process or the driver dies, Ray and the driver are restarted within the job. Where a node is lost, or the
warning signal before preemption or the time limit arrives, the job is requeued. Either way the stage resumes from its
last checkpoint.
"""

import contextlib
import itertools
import json
import math
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from launchers import slurm
from launchers.allocation import Allocation, Assignment
from launchers.driver import FAILED, INTERRUPTED, RETRY, SUCCEEDED
from launchers.jobs import Job, jobs_of, locked, new_job, release
from launchers.node import POLL_S, Signals
from launchers.node_group import JobFailed, NodeGroup, RayFailed, Requeue, Terminated, Warned
from launchers.process import ManagedProcess
from mvhpc.runs.journal import read
from mvhpc.runs.squeue import TERMINAL_STATES
from mvhpc.stages import STAGES
from shards.files import write_once, write_text

CAUSE_TIMEOUT_S = 3  # after the driver failed, for a message that a node or Ray was the cause
REQUEUE_MARGIN_S = 15  # of the time after the warning signal, reserved for going back to the queue
REQUEUE_TIMEOUT_S = 60  # for SLURM to end a job that it requeues
LONGER = "submit it again with a longer --time"


class Head:
    """Node 0.

    Args:
        assignment: what the job is to do.
        allocation: what SLURM allocated.
        folder: of this start of the job, in the run folder.
        signals: that SLURM has sent to this process.
    """

    def __init__(self, assignment: Assignment, allocation: Allocation, folder: Path, signals: Signals) -> None:
        self.assignment, self.allocation, self.folder, self.signals = assignment, allocation, folder, signals
        self.run_folder = Path(assignment.run)
        known = [job for job in jobs_of(self.run_folder) if job.id == allocation.job]
        self.job: Job = (
            known[-1]
            if known
            else new_job(self.run_folder, allocation.job, "slurm", assignment.stage, assignment.nodes)
        )
        self.workers = assignment.workers(allocation)
        self.token = folder.parent / "token"
        self.stop_file = folder / "stop"
        self.out_of_time = False
        self.checkpoint_before = self._last_checkpoint()
        self.start, self.begun = time.monotonic(), time.time()

    def run(self) -> None:
        """Run the job to one of its ends."""
        allocation = self.allocation
        self.job.record("start", restart=allocation.restart, nodes=allocation.nodes, workers=self.workers)
        print(
            f"job {allocation.job}: {self.assignment.stage} on {allocation.nodes} node(s), {self.workers} worker(s)",
            flush=True,
        )
        try:
            self._take_lock()
            write_once(self.token, secrets.token_hex(32))
            nodes = NodeGroup(self.assignment, allocation, self.folder, self.token, self.signals, self.workers)
            with contextlib.closing(nodes):
                event, reason = self._run_attempts(nodes)
        except JobFailed as error:
            event, reason = "failed", str(error)
        except Requeue as error:
            self._requeue(str(error))
        except Warned:
            near_limit, stage = self._near_limit(), self.assignment.stage
            if self._advanced():  # the stage was at work before Ray was started again
                self._requeue("time limit" if near_limit else "preempted")
            if not near_limit:
                self._requeue(f"preempted before {stage} began")
            event, reason = "failed", f"the time limit ends before {stage} begins; {LONGER}"
        except Terminated:
            self._terminated()
        except Exception as error:
            self._finish("failed", f"{type(error).__name__}: {error}")
            raise
        self._finish(event, reason)
        if event == "failed":
            raise SystemExit(1)

    def _take_lock(self) -> None:
        """Hold the run's lock. SLURM may have restarted this job after another one took the run over."""
        with locked(self.run_folder) as lock:
            if lock.holder is not None and lock.holder.id != self.job.id:
                raise JobFailed(f"{self.run_folder} is held by job {lock.holder.id}")
            lock.set_holder(self.job)

    def _run_attempts(self, nodes: NodeGroup) -> tuple[str, str]:
        """Start Ray and the driver until the stage ends, or fails too often without a new checkpoint in between.

        Returns:
            (``finished``, ``stopped`` or ``failed``, reason).
        """
        self._say(f"waiting for {self.allocation.nodes} node(s) to register")
        nodes.gather()
        self._say("preflight: every node checks itself")
        preflight = nodes.preflight()
        self.job.record("preflight", **preflight)
        self._say(f"preflight done in {preflight['seconds']:.0f} s")
        retries = int(self.assignment.values.get("compute", {}).get("retries", 0))
        failures, checkpoint = 0, self._last_checkpoint()
        for attempt in itertools.count():
            try:
                status = self._attempt(nodes, attempt)
                reason = f"the driver exited with status {status}"
            except RayFailed as error:
                status, reason = RETRY, str(error)
            self.job.record("exit", attempt=attempt, status=status, reason=reason)
            if status == SUCCEEDED:
                return "finished", ""
            if status == INTERRUPTED:
                return self._interrupted()
            if self.signals.stop:
                if (self.out_of_time or self._near_limit()) and not self._advanced():
                    return "failed", f"{reason} at the time limit, with nothing new to go on from; {LONGER}"
                raise Requeue(reason)
            if status == FAILED:
                return "failed", self._last_log_line()
            newest = self._last_checkpoint()
            failures = failures + 1 if newest == checkpoint else 1
            checkpoint = newest
            if failures > retries:
                break
            print(f"{reason}; restarting from the last checkpoint", flush=True)
        return "failed", (
            f"{reason}; {failures} failures without a new checkpoint (compute.retries={retries}); see {self.folder}"
        )

    def _attempt(self, nodes: NodeGroup, attempt: int) -> int:
        """Start Ray and the driver, and return the driver's exit status."""
        start = time.monotonic()
        try:
            if nodes.with_ray:
                self._say(f"starting Ray on {self.allocation.nodes} node(s)")
            nodes.start_ray(attempt)
            seconds = round(time.monotonic() - start, 1)
            self.job.record("boot", attempt=attempt, seconds=seconds)
            if nodes.with_ray:
                self._say(f"Ray is ready after {seconds:.0f} s")
            self._say(f"starting {self.assignment.stage}: loading PyTorch and MONAI")
            return self._run_driver(nodes)
        finally:
            nodes.stop_ray()

    def _run_driver(self, nodes: NodeGroup) -> int:
        values = self.assignment.values
        if "workers" in values.get("compute", {}):
            values = {**values, "compute": {**values["compute"], "workers": self.workers}}
        # Only the first driver looks for an earlier result: what the later ones find is this job's own.
        first = sum(event["event"] == "boot" for event in self.job.events()) <= 1
        assignment = {"stage": self.assignment.stage, "values": values, "chained": self.assignment.chained and first}
        path = self.folder / "assignment.json"
        write_text(path, json.dumps(assignment, indent=1))
        environment = {**nodes.node.environment, "MVHPC_STOP_FILE": str(self.stop_file)}
        if nodes.with_ray:
            environment["RAY_ADDRESS"] = nodes.ray_address
        command = [sys.executable, "-P", "-u", "-m", "launchers.driver", str(path)]
        driver = ManagedProcess(command, environment, None, nodes.node.scratch)
        deadline = math.inf
        try:
            while (status := driver.poll()) is None:
                if self.signals.stop and deadline == math.inf:
                    deadline = time.monotonic() + self._request_stop()
                if time.monotonic() > deadline:
                    if self.out_of_time and not self._advanced():
                        raise JobFailed(f"the time limit ends before the first checkpoint; {LONGER}")
                    raise Requeue("no checkpoint was written in time; the last one is resumed from")
                nodes.poll()
            if status not in (SUCCEEDED, INTERRUPTED):  # a node or Ray may be the cause
                end = time.monotonic() + CAUSE_TIMEOUT_S
                while time.monotonic() < end:
                    nodes.poll()
            return status
        finally:
            driver.stop()

    def _say(self, text: str) -> None:
        """Tell in the job's log what takes the time before the stage's own first line."""
        print(f"job {self.job.id}: {text}", flush=True)

    # --- preemption and time limit ---

    def _request_stop(self) -> float:
        """Ask the driver to write a checkpoint, and return how many seconds it has.

        Raises:
            Requeue: the stage writes no checkpoints; it is preempted, or it resumes and has advanced since the start.
            JobFailed: at the time limit of any other stage without checkpoints: every restart would end there again.
        """
        near_limit = self._near_limit()
        if self.assignment.trains:
            self.stop_file.touch()
            return max(10, self.assignment.signal_delay - REQUEUE_MARGIN_S)
        if near_limit and not self._advanced():
            raise JobFailed(f"not finished within the time limit; {LONGER}")
        raise Requeue("time limit" if near_limit else "preempted")

    def _near_limit(self) -> bool:
        """Whether the warning signal is that of the time limit; if not, the job is preempted."""
        self.out_of_time = slurm.seconds_left(self.job.id) < 2 * self.assignment.signal_delay + 60
        self.job.record("stop", reason="time limit" if self.out_of_time else "preemption")
        return self.out_of_time

    def _interrupted(self) -> tuple[str, str]:
        """What follows where the driver stopped with a checkpoint."""
        if not self.signals.stop:
            return "stopped", "on request, with a checkpoint; submit it again to resume"
        if self.out_of_time and not self._advanced():
            return "failed", f"no step was done within the time limit; {LONGER}"
        raise Requeue("time limit" if self.out_of_time else "preempted")

    def _advanced(self) -> bool:
        """Whether the stage has done something since the start of the job that the next start goes on with."""
        if self.assignment.trains:
            return self._last_checkpoint() not in {"", self.checkpoint_before}  # none: the earlier result was set aside
        done = any(e["event"] == "metrics" and e["time"] >= self.begun for e in read(self.run_folder))
        return done and STAGES[self.assignment.stage].resumes

    def _last_checkpoint(self) -> str:
        return max((p.name for p in (self.run_folder / "checkpoints").glob("step-*")), default="")

    # --- ends of the job ---

    def _finish(self, event: str, reason: str) -> None:
        self.token.unlink(missing_ok=True)
        fields = {"reason": reason} if reason else {}
        self.job.record(event, **fields, seconds=round(time.monotonic() - self.start, 1))
        print(f"job {self.job.id} {event}{': ' if reason else ''}{reason}", flush=True)
        release(self.run_folder, self.job.id)

    def _requeue(self, reason: str) -> NoReturn:
        """Let SLURM requeue the job, which ends this process.

        Raises:
            SystemExit: always.
        """
        self.job.record("requeue", reason=reason)
        print(f"job {self.job.id}: {reason}; requeued", flush=True)
        refusal = ""
        try:
            # Where SLURM holds this node for dead, it has requeued the job already, and it may run elsewhere by now.
            if slurm.restarts(self.job.id) == self.allocation.restart:
                slurm.requeue(self.job.id)
        except Exception as error:  # also where SLURM, requeueing the job, ends this very command
            refusal = str(error)
        end = time.monotonic() + (2 if refusal else REQUEUE_TIMEOUT_S)
        while not self.signals.terminate and time.monotonic() < end:
            time.sleep(POLL_S)
        if refusal and not self.signals.terminate:
            self._finish(
                "failed", f"{reason}, and SLURM did not requeue the job ({refusal}); submit it again to resume"
            )
            raise SystemExit(1)
        raise SystemExit(128 + signal.SIGTERM)

    def _terminated(self) -> NoReturn:
        """Ended by SLURM: for good, or because it requeues the job by itself.

        Raises:
            SystemExit: always.
        """
        with contextlib.suppress(Exception):
            state = slurm.job_state(self.job.id)
            if state in TERMINAL_STATES:
                self._finish("cancelled" if state == "CANCELLED" else "failed", state.lower())
        raise SystemExit(128 + signal.SIGTERM)

    def _last_log_line(self) -> str:
        """The line in which the driver reported its error."""
        try:
            lines = self.job.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return f"see {self.job.log}"
        return lines[-1] if lines else f"see {self.job.log}"
