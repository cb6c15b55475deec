"""Signals that stop a run early: every rank stops at the same point, and its step is saved."""
import contextlib
import os
import signal
import threading
import time

import ddp


class StopSignals(contextlib.ExitStack):
    """Records SIGTERM and SIGINT (Ctrl-C) in `world.received_signal` from `start` on.

    The process does not end: the training loop learns of the signal from `ddp.check_signals`. A
    second Ctrl-C raises KeyboardInterrupt at once. Leaving the `with` block restores the previous
    handlers.
    """

    def __init__(self, world: ddp.World):
        super().__init__()
        self.world = world
        self.last_check = None  # (step, time) at which the ranks last exchanged signals
        self.next_check = 0  # the step at which they do so again

    def start(self):
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                previous_handler = signal.signal(number, self.handle)
                self.callback(signal.signal, number, previous_handler)

    def handle(self, number, _frame):
        if self.world.received_signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.world.received_signal = number
        if self.world.is_main:
            # os.write, because the signal may have interrupted a print
            os.write(2, b"\nsaving this step and stopping (a second Ctrl-C stops at once)\n")

    def check_between_steps(self, step: int):
        """Raises ddp.Stopped if any rank has received a signal.

        Several ranks must wait for each other to find out, so they do it only every two seconds or
        so.
        """
        if self.world.size == 1:
            ddp.check_signals(self.world)
        elif step >= self.next_check:
            now = time.perf_counter()
            last_step, last_time = self.last_check or (step, now)
            ddp.check_signals(self.world)

            # all ranks compute the same next step, from the sum of their times
            seconds = ddp.sum_over_ranks(self.world, now - last_time)[0] / self.world.size
            steps_in_2_s = int(2 * (step - last_step) / seconds) if seconds else 1
            self.last_check = (step, now)
            self.next_check = step + max(1, steps_in_2_s)
