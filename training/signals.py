"""Signals that end a run early: every rank stops at the same step, which is saved."""
import signal
import time

import ddp
from training.runlog import StopSignals


class StopRequest:
    """Agreement of all ranks to stop at one step, as a signal may reach only one of them."""

    def __init__(self, world: ddp.World, signals: StopSignals):
        self.world, self.signals = world, signals
        self.last_asked = None  # (step, time)
        self.next_step = 0  # at which the ranks ask each other again

    def signal_number(self, step: int) -> int:
        """The signal for which every rank stops at this step, or 0."""
        received = self.signals.received
        if self.world.size == 1:
            return received
        if step < self.next_step:
            return 0
        now = time.perf_counter()
        last_step, last_time = self.last_asked or (step, now)
        seconds, terminated, interrupted = ddp.sum_over_ranks(
            self.world, (now - last_time) / self.world.size,
            received == signal.SIGTERM, received == signal.SIGINT)

        # ask again in about two seconds; all ranks compute the same step from the mean time
        steps_in_2_s = int(2 * (step - last_step) / seconds) if seconds else 1
        self.last_asked = step, now
        self.next_step = step + max(1, steps_in_2_s)
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
