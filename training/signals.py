"""Signals that stop a run early: every rank stops after the same step, which is then saved."""
import signal
import threading
import time

import ddp


class StopSignals:
    """Within a `with` block, SIGTERM and SIGINT (Ctrl-C) are recorded and do not end the process.

    The training loop asks for them between steps. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self, world: ddp.World):
        self.world = world
        self.received = 0  # number of the signal that this process received, or 0
        self.last_exchange = None  # (step, time) at which the ranks last exchanged signals
        self.next_exchange = 0  # the step at which they do so again

    def __enter__(self):
        self.previous_handlers = {}
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous_handlers[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def handle(self, number, _frame):
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def exchange(self, step: int) -> int:
        """The signal that any rank received, the same on all ranks; 0 to continue training.

        Exchanging signals makes the ranks wait for each other, so they do it only every two
        seconds or so.
        """
        if self.world.size == 1:
            return self.received
        if step < self.next_exchange:
            return 0
        now = time.perf_counter()
        last_step, last_time = self.last_exchange or (step, now)
        seconds, terminated, interrupted = ddp.sum_over_ranks(
            self.world, (now - last_time) / self.world.size,
            self.received == signal.SIGTERM, self.received == signal.SIGINT)

        # all ranks compute the same next step, as `seconds` is the mean over the ranks
        steps_in_2_s = int(2 * (step - last_step) / seconds) if seconds else 1
        self.last_exchange = (step, now)
        self.next_exchange = step + max(1, steps_in_2_s)
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
