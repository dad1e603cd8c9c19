"""How the steps, images and epochs of a run relate, and what is due when."""

import dataclasses
import math

from alexnet_jax.config import Train


@dataclasses.dataclass(frozen=True)
class Calendar:
    """When things are due. Step n is the n-th update; all things are due after the last."""

    num_examples: int
    batch_size: int
    num_steps: int
    # Position at step 0 if all steps had had `batch_size`, in images; 0 unless that changed.
    origin: int = 0

    def position(self, step: int) -> int:
        """The position in the stream after a step."""
        return self.origin + step * self.batch_size

    def epochs(self, step: int) -> float:
        return self.position(step) / self.num_examples

    def first_step(self, epoch: float) -> int:
        """The step at which `epoch` epochs are over: the first with position >= epoch * N."""
        return math.ceil((epoch * self.num_examples - self.origin) / self.batch_size)

    def is_due(self, step: int, every: int) -> bool:
        """True after every `every` steps, and after the last step; with 0 only after the last."""
        return step == self.num_steps or (every > 0 and step % every == 0)

    def epoch_ends(self, step: int, every: int) -> bool:
        """True after the step that completes another `every` epochs, and after the last step."""
        turns = [self.position(n) // self.num_examples // every for n in (step - 1, step)]
        return step == self.num_steps or turns[1] > turns[0]


def make_calendar(train: Train, num_examples: int, origin: int = 0) -> Calendar:
    """The calendar of a run of `train.num_steps`, or else of `train.num_epochs`."""
    found = Calendar(num_examples, train.batch_size, train.num_steps, origin)
    steps = train.num_steps or found.first_step(train.num_epochs)
    return dataclasses.replace(found, num_steps=steps)
