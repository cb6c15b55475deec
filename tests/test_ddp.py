"""Runs of several processes: the same steps as one takes, and what happens when a process is lost."""
import errno
import json
import multiprocessing
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROSE, ROOT, TINY, assert_same_run, losses, metrics, train_here

import checkpoint
import ddp
import prepare
import publish
import train
from common.errors import UserError, report_user_errors

VARIABLES = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
PLAIN = ["shakespeare-char", *TINY, "--dropout", "0"]

FORKS = multiprocessing.get_context("forkserver")  # from a process that has imported everything, and computed nothing
FORKS.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"])


def together(n: int, *arguments, change=None) -> list[int]:
    """What `torchrun --nproc_per_node=n train.py …` does, in processes that need no imports; their exit codes. What they said is
    in rank-0.txt and so on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORKS.Process(target=rank, args=(i, n, port, list(map(str, arguments)), change)) for i in range(n)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=200)
    return [process.exitcode for process in ranks]


def rank(i: int, n: int, port: int, arguments: list[str], change):
    os.environ |= dict(zip(VARIABLES, (str(i), str(n), str(i), "127.0.0.1", str(port))))
    said = os.open(f"rank-{i}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    torch.set_num_threads(1)
    if change:
        change()
    with report_user_errors():
        train.main(arguments)


def torchrun(n: int, *options: str) -> tuple[str, ...]:
    """-- ends torchrun's own options: else it takes --run for one."""
    return "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *options, "--"


@pytest.fixture
def one(prose, tmp_path):
    """The run that one process makes, with HellaSwag in it."""
    prepare.main(prepare.PrepareConfig(str(prose)))
    lines = [json.dumps({"activity_label": "fox", "ctx": f"The fox {verb}", "endings": ["out.", "town-o", "he", "a mile to go"],
                         "label": i % 4}) for i, verb in enumerate(PROSE.split()[:11])]
    (tmp_path / "h.jsonl").write_text("\n".join(lines))
    train_here(*PLAIN, "--hellaswag", "h.jsonl", "--run", "one")
    return tmp_path / "log" / "one"


def test_any_number_of_processes_takes_the_steps_one_takes(one):
    for run, n, arguments in (("two", 2, ["--micro-batch", 2]), ("two-of-three", 2, ["--micro-batch", 3]),
                              ("four", 4, ["--micro-batch", 1]), ("sharded-two", 2, ["--micro-batch", 2, "--shard"]),
                              ("sharded-four", 4, ["--micro-batch", 2, "--shard", "--recompute", "off"])):
        assert together(n, *PLAIN, "--hellaswag", "h.jsonl", "--run", run, *arguments) == [0] * n
        assert_same_run(one, one.parent / run, tolerance=2e-5)
        assert metrics(one, "step", "hellaswag") == metrics(one.parent / run, "step", "hellaswag")
    samples = [json.loads(line) for line in (one.parent / "sharded-two" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 6] and all(
        len(sample["text"]) == len(sample["prompt"]) + 200 for sample in samples)


def test_muon_on_several_processes_takes_the_steps_one_takes(one):
    arguments = [*PLAIN, "--optimizer", "muon"]
    train_here(*arguments, "--run", "muon")
    assert together(4, *arguments, "--run", "muon-four", "--micro-batch", 1) == [0] * 4
    assert_same_run(one.parent / "muon", one.parent / "muon-four", tolerance=2e-5)
    with pytest.raises(UserError, match="Muon needs whole matrices"):
        train_here(*arguments, "--shard")
    with pytest.raises(UserError, match="start it with torchrun"):
        train_here(*PLAIN, "--shard", "--run", "alone")


def back_to(run, step: int):
    """Takes a run back to an earlier checkpoint of its own, as a kill soon after it would have."""
    for later in [other for other in checkpoint.saved_steps(run) if other > step]:
        for path in run.glob(f"*_{later:05d}*"):
            path.unlink() if path.is_file() else [file.unlink() for file in path.iterdir()] + [path.rmdir()]
    assert checkpoint.newest(run) == step


def test_a_sharded_run_goes_on_whole_and_a_whole_one_sharded(command, one):
    command("train.py", *PLAIN, "--run", "mixed", "--micro-batch", 2, "--shard", launcher=torchrun(2))
    mixed = one.parent / "mixed"
    for again in [], ["--shard", "--micro-batch", 2]:
        back_to(mixed, 4)
        if again:
            assert together(4, *PLAIN, "--run", "mixed", *again) == [0] * 4
        else:
            train_here(*PLAIN, "--run", "mixed")
        assert_same_run(one, mixed, tolerance=2e-5)


def no_file_is_small_enough():
    checkpoint.LARGEST_FILE = 0


def test_weights_too_large_for_a_file_stay_in_the_state_and_are_put_together(one, tmp_path):
    arguments = [*PLAIN, "--run", "large", "--shard"]
    assert together(2, *arguments, change=no_file_is_small_enough) == [0, 0]
    large = one.parent / "large"
    assert not list(large.glob("*.pt")) and not list(large.rglob(".metadata"))  # DCP's pickle
    model, _, info = checkpoint.load_model(large)
    assert info["step"] == 6 and info["val_loss"] == pytest.approx(losses(one)[6, "val_loss"], abs=2e-5)
    for (name, p), q in zip(model.named_parameters(), checkpoint.load_model(one)[0].parameters()):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=0, msg=name)
    publish.export(str(large), tmp_path / "exported", dtype="float32")
    exported = checkpoint.load_model(tmp_path / "exported")[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), exported.parameters()))
    assert str(large.relative_to(tmp_path)) in checkpoint.list_runs()
    back_to(large, 4)
    assert together(4, *arguments, change=no_file_is_small_enough) == [0] * 4
    assert checkpoint.newest(large) == 6 and losses(large) == pytest.approx(losses(one), abs=2e-5)
    back_to(large, 4)
    part = max((large / "state_00004").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    assert checkpoint.newest(large) is None
    part.unlink()
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_model(large)


class Refused:
    """The first call of a function on the main process finds the disk full."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self):
        owner, _, name = self.name.rpartition(".")
        owner, calls = pkgutil.resolve_name(owner), []
        real = getattr(owner, name)

        def refuse(*arguments, **options):
            calls.append(None)
            if len(calls) == 1 and os.environ["RANK"] == "0":
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        setattr(owner, name, refuse)


@pytest.mark.parametrize("refused", ["torch.distributed.checkpoint.filesystem.FileSystem.mkdir", "torch.save"])
def test_a_disk_that_refuses_a_sharded_checkpoint_costs_it_and_not_the_run(one, refused):
    """On the main process alone, at step 2: before the others write, and after."""
    arguments = [*PLAIN, "--run", "full", "--shard", "--sample-prompt", "", "--wait-s", 60]
    assert together(2, *arguments, change=Refused(refused)) == [0, 0]
    said = Path("rank-0.txt").read_text()
    assert said.count("the run goes on") == 1 and "No space left" in said
    assert checkpoint.saved_steps(one.parent / "full") == [4, 6] and checkpoint.newest(one.parent / "full") == 6
    assert losses(one.parent / "full") == pytest.approx(losses(one), abs=2e-5)


# ----------------------------------------------------------------------------------------------------------------
# A process is lost

LONG = [*PLAIN, "--max-steps", "300", "--save-every", "20", "--eval-every", "20", "--sample-every", "300"]


def start(*arguments, launcher, output=subprocess.DEVNULL):
    """A command in a session of its own, which can be killed whole."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if "--nnodes=2" in launcher:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as in examples/
    return subprocess.Popen([sys.executable, *launcher, ROOT / "train.py", *map(str, arguments)], start_new_session=True,
                            env=environment, stdout=output, stderr=subprocess.STDOUT, encoding="utf-8")


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """The processes that a torchrun started, by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        found[int(re.search(r"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_text())[1])] = int(pid)
    return found


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def saved(run, step: int) -> bool:
    return max(checkpoint.saved_steps(run), default=0) >= step


def test_torchrun_starts_a_run_again_whose_process_was_killed(one):
    train_here(*LONG, "--run", "whole")
    run = one.parent / "restarted"
    process = start(*LONG, "--run", "restarted", launcher=torchrun(2, "--max-restarts=2"))
    for step, rank in (40, 1), (120, 0):
        wait_until(lambda step=step, rank=rank: saved(run, step) and rank in workers(process), process)
        os.kill(workers(process)[rank], signal.SIGKILL)
    assert process.wait(timeout=120) == 0
    assert_same_run(one.parent / "whole", run, tolerance=2e-3, last_step=300)
    assert (run / "metrics.jsonl").read_text().count('"resume"') == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_is_waited_for_no_longer_than_stated(one, number):
    process = start(*LONG, "--run", "lost", "--wait-s", 5, launcher=torchrun(2), output=subprocess.PIPE)
    wait_until(lambda: saved(one.parent / "lost", 20), process)
    stopped = workers(process)[1]
    os.kill(stopped, number)
    said = process.communicate(timeout=100)[0]
    if number == signal.SIGSTOP:
        assert "error: Process 0 of 2 lost another" in said
    assert process.returncode and "Traceback" not in re.sub(r"(?s)torch.distributed.elastic.*", "", said)
    assert checkpoint.newest(one.parent / "lost") >= 20


def test_two_torchruns_train_one_run_and_one_that_was_killed_joins_again(one):
    train_here(*LONG, "--run", "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run", "--rdzv-conf=keep_alive_interval=1",
                "--local-addr=127.0.0.1", "--")
    run = one.parent / "nodes"
    first = start(*LONG, "--run", "nodes", launcher=launcher)
    time.sleep(2)  # so that it is the first that serves the rendezvous
    second = start(*LONG, "--run", "nodes", launcher=launcher)
    wait_until(lambda: saved(run, 40), first)
    for pid in (*workers(second).values(), second.pid):  # the machine is gone
        os.kill(pid, signal.SIGKILL)
    second.wait()
    second = start(*LONG, "--run", "nodes", launcher=launcher)
    assert first.wait(timeout=200) == 0 and second.wait(timeout=60) == 0
    assert_same_run(one.parent / "whole", run, tolerance=2e-3, last_step=300)


# ----------------------------------------------------------------------------------------------------------------
# What cannot be

def test_a_refusal_of_the_main_process_ends_the_others_in_a_sentence(one):
    assert together(2, *PLAIN, "--resume", "none", "--run", "one") == [2, 2]
    first, second = (Path(f"rank-{i}.txt").read_text() for i in range(2))
    assert "holds a run already" in first and "Process 1 of 2 lost another" in second and "Traceback" not in first + second


@pytest.mark.parametrize("variables", [
    {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    dict(zip(VARIABLES, ("2", "2", "0", "localhost", "1"))), dict(zip(VARIABLES, ("one", "2", "0", "localhost", "1")))])
def test_variables_half_set_get_one_sentence(monkeypatch, variables):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert ddp.torchrun_variables() == (0, 1, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="The environment has RANK="):
        train_here("gpt2-124m")


def test_a_gpu_that_is_not_there_gets_one_sentence(monkeypatch):
    for name, value in zip(VARIABLES, ("2", "4", "2", "localhost", "1")):
        monkeypatch.setenv(name, value)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no device 'cuda'"):
            train_here("gpt2-124m", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="This machine has 2 GPUs"):
        train_here("gpt2-124m", "--device", "cuda")


def test_a_batch_that_does_not_divide_among_processes_gets_one_sentence(one):
    assert together(2, *PLAIN, "--batch-tokens", 48, "--run", "odd") == [2, 2]
    assert "A batch of 3 sequences does not divide among 2 processes" in Path("rank-0.txt").read_text()
