"""What becomes of training samples whose stored volumes are damaged."""

from typing import Any

from mvhpc.config import choose
from mvhpc.training.task import Task
from shards.errors import IntegrityError

MODES = ("error", "skip")
LARGEST_SHARE = 0.01  # of the samples, at least one; more are no accident, such as a folder that is not there


class Samples:
    """Loads batches of a task's training samples. Called in several threads.

    With ``skip`` the next intact sample takes the place of a damaged one.

    Args:
        task: whose samples.
        damaged: ``error`` or ``skip``.

    Attributes:
        damaged: sample -> what is wrong with it.
    """

    def __init__(self, task: Task, damaged: str) -> None:
        choose(damaged, MODES, "training.damaged")
        self.task, self.skip = task, damaged == "skip"
        self.damaged: dict[int, str] = {}
        self._reported = 0

    def load(self, indices: list[int]) -> dict[str, Any]:
        """The batch.

        Raises:
            IntegrityError: a damaged sample; with ``skip``, more than one in a hundred.
        """
        try:
            return self.task.load([self._intact(i) if i in self.damaged else i for i in indices])
        except IntegrityError:
            if not self.skip:
                raise
        return self.task.load([self._intact(i) for i in indices])

    def _intact(self, sample: int) -> int:
        """The sample, or the next one that can be loaded."""
        while True:
            if sample not in self.damaged:
                try:
                    self.task.load([sample])
                    return sample
                except IntegrityError as error:
                    self.damaged[sample] = str(error)
                    if len(self.damaged) > max(1, LARGEST_SHARE * self.task.samples):
                        raise
            sample = (sample + 1) % self.task.samples

    def news(self) -> list[str]:
        """What was found since the last call."""
        found = list(self.damaged.values())[self._reported :]
        self._reported += len(found)
        return found
