"""Training with several processes: it equals training with one, and survives a lost process."""
import errno
import functools
import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    PROSE,
    RANK_VARIABLES,
    ROOT,
    TINY,
    assert_same_run,
    fork,
    free_port,
    losses,
    metrics,
    run_ranks,
    start_ranks,
    torchrun,
    train_here,
    wait_until,
    write_hellaswag,
)

import checkpoint
import ddp
import hellaswag
import prepare
import publish
from common.errors import UserError
from engine import likelihood

BASE = ["shakespeare-char", *TINY, "--dropout", "0"]
LONG = [*BASE, "--max-steps", "300", "--save-every", "20", "--eval-every", "20",
        "--sample-every", "300"]


def train_ranks(n: int, *arguments, prepare_rank=None) -> list[int]:
    return run_ranks(n, "train.py", *arguments, prepare=prepare_rank)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data, HellaSwag and a short run `one` by one process."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        Path("prose.txt").write_text(PROSE, encoding="utf-8")
        prepare.main(prepare.PrepareConfig("prose.txt"))
        write_hellaswag(Path("h.jsonl"))
        train_here(*BASE, "--hellaswag", "h.jsonl", "--run", "one")
    return folder


@pytest.fixture
def one(runs, tmp_path):
    """The folder of the run `one`, in a copy of `runs`."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    return tmp_path / "log" / "one"


@pytest.fixture
def whole(one):
    """The folder of a longer run by one process."""
    train_here(*LONG, "--run", "whole")
    return one.parent / "whole"


# --------------------------------------------------------------------------------------------------
# The same steps

def test_a_process_connects_to_the_first_only_once_it_listens():
    """torch's own connection waits more than twice as long as its timeout."""
    environment = dict(zip(RANK_VARIABLES, ("1", "2", "1", "127.0.0.1", str(free_port()))))
    connections = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "TCPStore", lambda *arguments, **options:
                      connections.append(arguments))
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(UserError, match="lost contact"), ddp.join_world("cpu", wait_s=1):
            pass
    assert not connections


@pytest.mark.parametrize(("n", "arguments"), [
    (2, ["--micro-batch", 2]),
    (2, ["--micro-batch", 3]),
    (4, ["--micro-batch", 1]),
    (2, ["--micro-batch", 2, "--shard"]),
    pytest.param(4, ["--micro-batch", 2, "--shard", "--recompute", "off"],
                 marks=pytest.mark.slow)])
def test_any_number_of_processes_takes_the_steps_of_one(one, n, arguments):
    several = one.parent / "several"
    command = [*BASE, "--hellaswag", "h.jsonl", "--run", "several", *arguments]
    assert train_ranks(n, *command) == [0] * n
    assert_same_run(one, several, tolerance=2e-5)
    assert metrics(one, "step", "hellaswag") == metrics(several, "step", "hellaswag")
    if "--shard" in arguments:
        lines = (several / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert [sample["step"] for sample in samples] == [0, 6]
        for sample in samples:
            assert len(sample["text"]) == len(sample["prompt"]) + 200


def test_muon_on_several_processes_takes_the_steps_of_one(one):
    arguments = [*BASE, "--optimizer", "muon"]
    train_here(*arguments, "--run", "muon")
    assert train_ranks(4, *arguments, "--run", "muon-four", "--micro-batch", 1) == [0] * 4
    assert_same_run(one.parent / "muon", one.parent / "muon-four", tolerance=2e-5)


def test_ranks_skip_the_overflowing_updates_of_float16_alike(one):
    arguments = [*BASE, "--dtype", "float16", "--micro-batch", 2, "--max-steps", 40]
    assert train_ranks(2, *arguments, "--run", "half", prepare_rank=overflow_at_first) == [0, 0]
    half = one.parent / "half"
    skipped = [step for step, _ in metrics(half, "step", "skipped")]
    assert skipped[:6] == [1, 2, 3, 4, 5, 6]
    assert len(skipped) < 16
    assert losses(half)[40, "val_loss"] < losses(half)[0, "val_loss"] - 0.1


def overflow_at_first():
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**25)


@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_a_signal_to_one_rank_stops_the_evaluation_of_all(one, options):
    arguments = [*BASE, "--hellaswag", "h.jsonl", "--run", "stopped", "--micro-batch", 2, *options]
    exit_codes = train_ranks(2, *arguments, prepare_rank=signal_to_rank_1_in_hellaswag)
    assert exit_codes == [128 + signal.SIGTERM] * 2
    stopped = one.parent / "stopped"
    (step,) = checkpoint.saved_steps(stopped)
    assert step == 2
    assert [step for step, _ in metrics(stopped, "step", "hellaswag")] == [0]

    # the run resumes with the evaluation, also in one process
    train_here(*BASE, "--hellaswag", "h.jsonl", "--run", "stopped")
    assert_same_run(one, stopped, tolerance=2e-5)
    assert metrics(stopped, "step", "hellaswag") == metrics(one, "step", "hellaswag")


def signal_to_rank_1_in_hellaswag():
    original = likelihood.score_batch

    def signal_and_score(*arguments):
        if os.environ["RANK"] == "1" and metrics(Path("log/stopped"), "step", "train_loss")[1:]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    likelihood.score_batch = signal_and_score
    hellaswag.evaluate = functools.partial(hellaswag.evaluate, batch_tokens=64)  # several batches


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
def test_leaving_the_world_ends_gloos_threads_while_the_wrapped_model_lives(tmp_path, monkeypatch):
    # a thread of gloo that outlives the group can hang the process at its exit
    monkeypatch.chdir(tmp_path)
    port = free_port()
    ranks = [fork(exit_with_a_wrapped_model, i, port) for i in range(2)]
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [3, 3]
    for i in range(2):
        before, after = Path(f"threads-{i}.txt").read_text().splitlines()
        assert "gloo" in before
        assert "gloo" not in after


def exit_with_a_wrapped_model(i: int, port: int):
    os.environ |= dict(zip(RANK_VARIABLES, (str(i), "2", str(i), "127.0.0.1", str(port))))
    with open(f"threads-{i}.txt", "w") as output:
        try:
            with ddp.join_world("cpu") as world:
                model = ddp.wrap(torch.nn.Linear(4, 4), world)
                model(torch.ones(2, 4)).sum().backward()
                print(thread_names(), file=output)
                sys.exit(3)  # its traceback holds `model`
        finally:
            print(thread_names(), file=output)


def thread_names() -> str:
    tasks = Path("/proc/self/task").iterdir()
    return " ".join(sorted((task / "comm").read_text().strip() for task in tasks))


SLOW_RANK_0 = """
import os, time
from common.errors import UserError
from common.program import report_user_errors
with report_user_errors():
    if os.environ["RANK"] == "0":
        time.sleep(2)
    raise UserError("one sentence")
"""


def test_an_error_of_all_ranks_is_printed_once_even_if_rank_0_is_slow(tmp_path):
    (tmp_path / "fails.py").write_text(SLOW_RANK_0)
    result = subprocess.run([sys.executable, *torchrun(2), "fails.py"], cwd=tmp_path, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                            check=False)
    assert result.stderr.count("error: one sentence") == 1


def test_shard_needs_adamw_and_several_processes(one):
    with pytest.raises(UserError, match="Muon needs whole matrices"):
        train_here(*BASE, "--optimizer", "muon", "--shard")
    with pytest.raises(UserError, match="start them with torchrun"):
        train_here(*BASE, "--shard", "--run", "alone")


# --------------------------------------------------------------------------------------------------
# Checkpoints of sharded runs

def rewind(run: Path, step: int):
    """Removes a run's checkpoints after `step`, as if it had been killed soon after that step."""
    for later in checkpoint.saved_steps(run):
        if later > step:
            for path in run.glob(f"*_{later:05d}*"):
                path.unlink() if path.is_file() else shutil.rmtree(path)
    assert checkpoint.newest(run) == step


def test_a_sharded_run_resumes_unsharded_and_sharded(one):
    mixed = one.parent / "mixed"
    arguments = [*BASE, "--run", "mixed"]
    sharded = ["--shard", "--micro-batch", 2]
    assert train_ranks(2, *arguments, *sharded) == [0] * 2

    rewind(mixed, 4)
    train_here(*arguments)
    assert_same_run(one, mixed, tolerance=2e-5)

    rewind(mixed, 4)
    assert train_ranks(4, *arguments, *sharded) == [0] * 4
    assert_same_run(one, mixed, tolerance=2e-5)


def allow_no_pt_file():
    checkpoint.MAX_PT_BYTES = 0


@pytest.mark.slow
def test_weights_too_large_for_one_file_stay_in_the_state_and_load_as_one_model(one, tmp_path):
    arguments = [*BASE, "--run", "large", "--shard"]
    assert train_ranks(2, *arguments, prepare_rank=allow_no_pt_file) == [0, 0]
    large = one.parent / "large"
    assert not list(large.glob("*.pt"))
    assert not list(large.rglob(".metadata"))  # the pickle that DCP writes by default

    # the model loads with the weights of the run by one process
    model, _, info = checkpoint.load_model(large)
    assert info["step"] == 6
    assert info["val_loss"] == pytest.approx(losses(one)[6, "val_loss"], abs=2e-5)
    expected = checkpoint.load_model(one)[0]
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=0, msg=name)

    # it can be exported, and the run is listed
    publish.export(str(large), tmp_path / "exported", dtype="float32")
    exported = checkpoint.load_model(tmp_path / "exported")[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), exported.parameters()))
    assert str(large.relative_to(tmp_path)) in checkpoint.list_runs()

    # it resumes on another number of processes
    rewind(large, 4)
    assert train_ranks(4, *arguments, prepare_rank=allow_no_pt_file) == [0] * 4
    assert checkpoint.newest(large) == 6
    assert losses(large) == pytest.approx(losses(one), abs=2e-5)

    # damage is noticed, and a model of a billion layers is not built
    rewind(large, 4)
    description = large / "state_00004" / "model.json"
    saved = json.loads(description.read_text())
    saved["config"]["n_layer"] = 10**9
    description.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="names more weights than it holds"):
        checkpoint.load_model(large)
    part = max((large / "state_00004").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    assert checkpoint.newest(large) is None
    part.unlink()
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_model(large)


class FailFirstCall:
    """Makes the first call of a function on the main process fail, as on a full disk."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self):
        owner_name, _, name = self.name.rpartition(".")
        owner = pkgutil.resolve_name(owner_name)
        original = getattr(owner, name)
        calls = []

        def fail_once(*arguments, **options):
            calls.append(None)
            if len(calls) == 1 and os.environ["RANK"] == "0":
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **options)

        setattr(owner, name, fail_once)


@pytest.mark.parametrize("function", [
    # before the other ranks write
    pytest.param("torch.distributed.checkpoint.filesystem.FileSystem.mkdir",
                 marks=pytest.mark.slow),
    "torch.save"])  # after they have written
def test_a_full_disk_costs_a_sharded_run_one_checkpoint(one, function):
    full = one.parent / "full"
    arguments = [*BASE, "--run", "full", "--shard", "--sample-prompt", "", "--wait-s", 60]
    assert train_ranks(2, *arguments, prepare_rank=FailFirstCall(function)) == [0, 0]
    output = Path("rank-0.txt").read_text()
    assert output.count("training continues") == 1
    assert "No space left" in output
    assert checkpoint.saved_steps(full) == [4, 6]  # not 2
    assert checkpoint.newest(full) == 6
    assert losses(full) == pytest.approx(losses(one), abs=2e-5)


# --------------------------------------------------------------------------------------------------
# Lost processes

def start(*arguments, launcher) -> subprocess.Popen:
    """Starts train.py under a torchrun, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if "--nnodes=2" in launcher:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as in examples/
    command = [sys.executable, *launcher, ROOT / "train.py", *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """rank -> process id of the processes that a torchrun has started."""
    pids = {}
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    for pid in children.read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_text()
        rank = int(re.search(r"\0RANK=(\d+)", environment)[1])
        pids[rank] = int(pid)
    return pids


def has_saved(run: Path, step: int) -> bool:
    return max(checkpoint.saved_steps(run), default=0) >= step


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed(whole):
    run = whole.parent / "restarted"
    process = start(*LONG, "--run", "restarted", launcher=torchrun(2, "--max-restarts=2"))
    for step, rank in (40, 1), (120, 0):
        wait_until(lambda step=step, rank=rank: has_saved(run, step) and rank in workers(process),
                   process)
        os.kill(workers(process)[rank], signal.SIGKILL)
    assert process.wait(timeout=120) == 0
    assert_same_run(whole, run, tolerance=2e-3, last_step=300)
    assert (run / "metrics.jsonl").read_text().count('"resume"') == 2


@pytest.mark.parametrize("number", [
    signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_no_process_waits_for_a_lost_one_longer_than_wait_s(one, number):
    run = one.parent / "lost"
    ranks = start_ranks(2, "train.py", *LONG, "--run", "lost", "--wait-s", 5)
    wait_until(lambda: has_saved(run, 20))
    os.kill(ranks[1].pid, number)
    ranks[0].join(timeout=60)
    ranks[1].kill()
    assert ranks[0].exitcode == 2
    output = Path("rank-0.txt").read_text()
    assert "error: Process 0 of 2 lost contact" in output
    assert "Traceback" not in output
    assert checkpoint.newest(run) >= 20


@pytest.mark.slow
def test_a_torchrun_that_was_killed_can_join_the_run_again(whole):
    port = free_port()
    launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                "--max-restarts=3", "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run",
                "--rdzv-conf=keep_alive_interval=1", "--local-addr=127.0.0.1", "--")
    run = whole.parent / "nodes"
    first = start(*LONG, "--run", "nodes", launcher=launcher)
    wait_until(lambda: is_listening(port), first)  # the first to start serves the rendezvous
    second = start(*LONG, "--run", "nodes", launcher=launcher)
    wait_until(lambda: has_saved(run, 40), first)

    # the second machine fails, with all of its processes
    for pid in (*workers(second).values(), second.pid):
        os.kill(pid, signal.SIGKILL)
    second.wait()

    second = start(*LONG, "--run", "nodes", launcher=launcher)
    assert first.wait(timeout=200) == 0
    assert second.wait(timeout=60) == 0
    assert_same_run(whole, run, tolerance=2e-3, last_step=300)


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of a lost parent")
def test_ranks_save_and_end_when_their_torchrun_is_killed(one):
    run = one.parent / "orphaned"
    launcher = start(*LONG, "--max-steps", 100_000, "--save-every", 100_000, "--run", "orphaned",
                     launcher=torchrun(2))
    wait_until(lambda: has_trained(run, 20), launcher)
    pids = workers(launcher).values()
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids), seconds=60)
    assert checkpoint.newest(run) >= 20, "the signal had this step saved"


def has_trained(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and (step,) in metrics(run, "step")


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie, which nobody may collect in a container."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --------------------------------------------------------------------------------------------------
# User errors

def test_a_full_disk_at_the_last_checkpoint_ends_all_ranks_with_one_sentence(one):
    arguments = [*BASE, "--run", "full", "--save-every", 100, "--wait-s", 60]
    assert train_ranks(2, *arguments, prepare_rank=FailFirstCall("torch.save")) == [2, 2]
    first, second = (Path(f"rank-{i}.txt").read_text() for i in range(2))
    assert "could not be written" in first and "No space left" in first
    assert "lost contact" not in first + second


def test_an_error_on_the_main_process_ends_the_others_with_one_sentence(one):
    assert train_ranks(2, *BASE, "--resume", "none", "--run", "one") == [2, 2]
    first, second = (Path(f"rank-{i}.txt").read_text() for i in range(2))
    assert "already holds a run" in first
    assert "Process 1 of 2 lost contact" in second
    assert "Traceback" not in first + second


@pytest.mark.parametrize("variables", [
    {"RANK": "1"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    dict(zip(RANK_VARIABLES, ("2", "2", "0", "localhost", "1"))),
    dict(zip(RANK_VARIABLES, ("one", "2", "0", "localhost", "1")))])
def test_incomplete_torchrun_variables_get_one_sentence(monkeypatch, variables):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert ddp.torchrun_variables() == (0, 1, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="The environment has RANK="):
        train_here("gpt2-124m")


def test_a_missing_gpu_gets_one_sentence(monkeypatch):
    for name, value in zip(RANK_VARIABLES, ("2", "4", "2", "localhost", "1")):
        monkeypatch.setenv(name, value)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no device 'cuda'"):
            train_here("gpt2-124m", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="This machine has 2 GPUs"):
        train_here("gpt2-124m", "--device", "cuda")


def test_a_batch_that_does_not_divide_among_processes_gets_one_sentence(one):
    assert train_ranks(2, *BASE, "--batch-tokens", 48, "--run", "odd") == [2, 2]
    output = Path("rank-0.txt").read_text()
    assert "A batch of 3 sequences does not divide evenly among 2 processes" in output


def test_systems_without_glibc_or_sysconf_are_handled(monkeypatch):
    """Windows: CDLL(None) raises TypeError, and os has no sysconf."""
    def refuse(_name):
        raise TypeError("bad argument type for built-in operation")

    monkeypatch.setattr(ddp.ctypes, "CDLL", refuse)
    ddp.keep_freed_memory()
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert ddp.memory_bytes(torch.device("cpu")) > 0
