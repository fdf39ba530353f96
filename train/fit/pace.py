"""How long a run's compilation took, and how long the run will take."""

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from train.fit.clock import TrainingClock
from train.machine.processes import say
from train.machine.waiting import refreshed

# Seconds of steps after which the rest of a run is estimated.
_TIMED_S = 3.0


class Pace:
    """Says what the first call of a start compiles, and what the rest will take."""

    def __init__(self, clock: TrainingClock, *, steps: int, batch_size: int) -> None:
        """Begins before the first call.

        Args:
            clock: The run's clock, which notes what is compiled.
            steps: The number of steps of the whole run.
            batch_size: The number of images a step.
        """
        self._clock, self._steps, self._batch_size = clock, steps, batch_size
        self._calls = 0
        self._began: tuple[float, int] | None = None
        self._is_said = False

    @contextlib.contextmanager
    def call(self, bar: tqdm) -> Iterator[None]:
        """Surrounds a call; after the first, it says what was compiled in what time."""
        self._calls += 1
        if self._calls > 1:
            yield
            return
        with refreshed(bar):
            yield
        say(f"compiled in {self._clock.compile_seconds:.1f} s")

    def after_call(self, step: int) -> None:
        """Says, once some seconds of steps are timed, how long the others will take.

        The first calls are not timed: the host is ahead of the devices by one.
        """
        if self._is_said or self._calls < 2:
            return
        now = self._clock.seconds  # without evaluations
        if self._began is None:
            self._began = (now, step)
            return
        since, first = self._began
        if now - since < _TIMED_S:
            return
        self._is_said = True
        rate = (step - first) / (now - since)
        minutes = (self._steps - step) / rate / 60
        say(
            f"about {minutes:.1f} minutes of training to go at "
            f"{rate * self._batch_size:,.0f} images/s, evaluations apart"
        )
