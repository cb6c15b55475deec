"""The numbers of the training steps: loss, speed, MFU and skipped updates."""
import time

import torch
from tqdm import tqdm

import checkpoint
import ddp
from common.devices import find_device
from common.errors import UserError
from training import runlog
from training.setup import TrainingRun

MAX_SKIPPED_IN_A_ROW = 5  # a run that skips this many updates in a row has diverged


class Meter:
    """Measures the training steps and logs every log_every-th of them.

    Counts are kept on the device, so that only the logged steps wait for it.
    """

    def __init__(self, run: TrainingRun):
        self.run = run
        self.data_sheet = find_device(ddp.device_name(run.world.device))
        self.flops_per_token = run.model.flops_per_token(run.config.block_size)

        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=run.world.device)
        self.reset()

    def reset(self):
        """Starts to count what belongs to the next logged step."""
        self.seconds = 0.0
        self.tokens = 0
        self.skipped = torch.zeros_like(self.skipped_in_a_row)
        self.max_skipped_in_a_row = torch.zeros_like(self.skipped)

    def start(self):
        self.started = time.perf_counter()

    def stop(self, step: int, loss, grad_norm, lr: float, progress: tqdm, pause_follows: bool):
        """Adds up update `step`, counted from 0, and logs it every log_every steps.

        If evaluation or a save follows, waits for the device first, so that the time of the step is
        not counted as theirs. Raises UserError if the run has diverged.
        """
        config, world = self.run.config, self.run.world

        # count skipped updates on the device
        is_skipped = ~grad_norm.isfinite()
        self.skipped += is_skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * is_skipped
        self.max_skipped_in_a_row = torch.maximum(self.max_skipped_in_a_row, self.skipped_in_a_row)

        # add up time and tokens
        is_logged = (step + 1) % config.log_every == 0 or step + 1 == config.max_steps
        if is_logged or pause_follows:
            loss = loss.item()  # waits for the device
        self.seconds += time.perf_counter() - self.started
        self.tokens += config.batch_tokens
        if not is_logged:
            return

        # log the mean loss of all ranks
        mean_loss = ddp.sum_over_ranks(world, loss)[0] / world.size
        if self.run.log:
            self.write(step + 1, mean_loss, grad_norm.item(), lr, progress)
        # float16 halves its scale at a skipped update; 1 is the scale of the other precisions
        skipped_too_many = self.max_skipped_in_a_row.item() >= MAX_SKIPPED_IN_A_ROW
        if skipped_too_many and self.run.scaler.get_scale() <= 1:
            raise self.diverged(step + 1)
        self.reset()

    def write(self, step: int, loss: float, grad_norm: float, lr: float, progress: tqdm):
        """Writes a line to metrics.jsonl and updates the progress bar."""
        tokens_per_s = self.tokens / self.seconds
        values = {"train_loss": loss, "grad_norm": grad_norm, "learning_rate": lr,
                  "tokens_per_s": round(tokens_per_s)}
        mfu_text = "MFU n/a"
        if self.data_sheet:
            peak_flops = self.run.world.size * self.data_sheet.flops
            values["mfu"] = tokens_per_s * self.flops_per_token / peak_flops
            mfu_text = f"MFU {values['mfu']:.0%}"
        if n_skipped := self.skipped.item():
            values["skipped"] = n_skipped
            runlog.warn(f"step {step}: {n_skipped} of the last updates had a gradient that was not "
                        "finite and were skipped")
        self.run.log.metrics(step=step, **values)
        progress.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, {mfu_text}",
                                 refresh=False)

    def diverged(self, step: int) -> UserError:
        saved = checkpoint.saved_steps(self.run.folder)
        kept = f"the last checkpoint is of step {saved[-1]}" if saved else "no checkpoint was saved"
        return UserError(f"The run has diverged: by step {step}, {MAX_SKIPPED_IN_A_ROW} gradients "
                         f"in a row were not finite; {kept}. Start a run with a lower "
                         "--learning-rate.")
