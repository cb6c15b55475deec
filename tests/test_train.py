"""Training: runs and what resumes them, checkpoints, the plan, optimizers, and loading models."""
import dataclasses
import errno
import functools
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    PROSE,
    ROOT,
    TINY,
    assert_same_run,
    fork,
    hub_model,
    limit_files,
    losses,
    metrics,
    run_program,
    tiny_gpt,
    torchrun,
    train_here,
    wait_until,
    weights,
    write_hellaswag,
)
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
import ddp
import hellaswag
import prepare
import publish
import report
import train
from common.devices import find_device
from common.errors import UserError
from common.files import sha256
from dataloader import DataLoader
from ddp import World
from engine import likelihood
from generate import Engine, Reader
from model import GPT, GPTConfig
from shards import read_manifest
from tokenizer import CharTokenizer, load_tokenizer
from training import plan, runlog
from training.config import TrainConfig
from training.optim import Muon, build_optimizers, learning_rate, orthogonalize, set_learning_rate
from training.setup import compute_dtype, place_model
from weights.huggingface import save_huggingface

LOG = Path("log")  # in the test's own folder
RUN = LOG / "shakespeare-char"


@pytest.fixture
def data(prose):
    prepare.main(prepare.PrepareConfig(str(prose)))


def train_tiny(*options):
    train_here("shakespeare-char", *TINY, *options)


def start_tiny(*options, launcher=()) -> subprocess.Popen:
    """Starts `train_tiny` in another process."""
    return subprocess.Popen(
        [sys.executable, *launcher, ROOT / "train.py", "shakespeare-char", *TINY,
         *map(str, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def read_samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def assert_one_line_error(result: subprocess.CompletedProcess, pattern: str):
    assert result.returncode == 2
    assert re.match(f"error: {pattern}", result.stderr)
    assert result.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# A run and its files


def test_a_run_learns_and_writes_its_files(data):
    train_tiny("--max-steps", 200, "--learning-rate", 1e-2,
               "--eval-every", 50, "--save-every", 50, "--sample-every", 100)

    # the loss starts at that of uniform predictions, and falls
    val_losses = [loss for _, loss in metrics(RUN, "step", "val_loss")]
    uniform_loss = math.log(len(set(PROSE)))
    assert val_losses[0] == pytest.approx(uniform_loss, abs=0.1)
    assert val_losses[-1] < val_losses[0] - 1
    assert metrics(RUN, "step", "train_loss")[0][0] == 1

    # the files
    assert {path.name for path in RUN.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "best.json",
        "model_00150.pt", "model_00200.pt", "state_00150", "state_00200"}
    assert [sample["step"] for sample in read_samples(RUN)] == [0, 100, 200]

    # the model
    saved = torch.load(RUN / "model_00200.pt", weights_only=True)
    assert set(saved) == {"format", "model", "config", "tokenizer", "step", "val_loss"}
    assert saved["step"] == 200
    assert saved["val_loss"] == val_losses[-1]
    model = GPT(saved["config"])
    model.load_state_dict(saved["model"])


def test_hellaswag_is_scored_with_each_validation(data):
    path = Path("hellaswag.jsonl")
    write_hellaswag(path)
    train_tiny("--dropout", 0, "--hellaswag", path)
    scores = metrics(RUN, "step", "hellaswag")
    assert len(scores) == len(metrics(RUN, "step", "val_loss"))

    # the last score is that of the saved model
    model, tokenizer, _ = checkpoint.load_model(RUN)
    expected = hellaswag.evaluate(model, tokenizer, hellaswag.read_examples(path), "nanogpt")
    assert scores[-1][1] == expected["nanogpt"]["acc_norm"]

    with pytest.raises(UserError, match=r"Line 1 of .*config.json"):
        train_tiny("--hellaswag", RUN / "config.json", "--name", "wrong-file")


def test_a_run_trains_without_hellaswag_if_it_cannot_be_downloaded(data, monkeypatch, capsys):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/h.jsonl")
    train_tiny("--hellaswag", "auto")
    assert "training without HellaSwag" in capsys.readouterr().err
    assert not metrics(RUN, "step", "hellaswag")


def test_a_run_on_fineweb_edu_is_compared_with_published_runs(prose, tmp_path, capsys):
    prepare.main(prepare.PrepareConfig(
        str(prose), tokenizer="gpt2", out=tmp_path / "edu_fineweb_little"))
    train_here("gpt2-124m", *TINY, "--data", "edu_fineweb_little", "--hellaswag", "none",
               "--max-steps", 2)
    assert "the published runs" in capsys.readouterr().out

    # this preset writes four different samples each time
    samples = read_samples(LOG / "gpt2-124m")
    assert [sample["step"] for sample in samples] == [0] * 4 + [2] * 4
    assert len({sample["text"] for sample in samples}) == 8


def test_mfu_is_logged_for_a_known_device(data, monkeypatch):
    monkeypatch.setattr(ddp, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    train_tiny()
    n_parameters = checkpoint.load_model(RUN)[2]["parameters"]
    attention_flops = 12 * 1 * 16 * 16  # layers, width, context
    flops_per_token = 6 * n_parameters + attention_flops
    for tokens_per_s, mfu in metrics(RUN, "tokens_per_s", "mfu"):
        assert mfu == pytest.approx(tokens_per_s * flops_per_token / 312e12, rel=1e-3)


TRACKER = '''
import json

def init(**options):
    write(options)
    return Run()

class Run:
    def log(self, values, step):
        write([step, values])

def write(content):
    with open("tracked", "a") as file:
        print(json.dumps(content), file=file)
'''


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_metrics_are_also_sent_to_a_tracker(data, tmp_path, monkeypatch, package):
    """A module with the package's name records the calls."""
    (tmp_path / f"{package}.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    train_tiny("--track", package)
    options, *logged = [json.loads(line) for line in Path("tracked").read_text().splitlines()]

    assert options["name"] == "shakespeare-char"
    assert options["config"]["n_layer"] == 1
    assert options["resume"] == "allow"
    assert options.get("id") == ("shakespeare-char" if package == "wandb" else None)
    for name in "val_loss", "train_loss":
        tracked = [(step, values[name]) for step, values in logged if name in values]
        assert tracked == metrics(RUN, "step", name)


def test_a_missing_tracker_is_a_user_error(data):
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match="pip install wandb"):
            train_tiny("--track", "wandb")


# --------------------------------------------------------------------------------------------------
# Options that do not change the result


def test_the_size_of_a_micro_batch_does_not_change_the_training(data):
    train_tiny("--dropout", 0, "--name", "one", "--micro-batch", 8)
    train_tiny("--dropout", 0, "--name", "three", "--micro-batch", 3)  # 3 + 3 + 2 sequences
    assert_same_run(LOG / "one", LOG / "three", tolerance=2e-5)


def test_auto_finds_the_largest_micro_batch_that_fits_and_keeps_it(data, monkeypatch):
    memory_reads = []

    def memory_bytes(device):
        memory_reads.append(device)
        return 150_000

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(ddp, "memory_bytes", memory_bytes)
    run = LOG / "auto"

    # a first attempt with too large a micro-batch fails before it saves anything
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "train_step", out_of_memory)
        train_tiny("--name", "auto", "--micro-batch", 8)

    # auto tries 8 sequences, then 4, then 2
    auto = ["--dropout", 0, "--name", "auto", "--micro-batch", "auto"]
    train_tiny(*auto)
    micro_batch = report.read_config(run)["micro_batch"]
    assert micro_batch in (2, 4)
    attempts = {4: 2, 2: 3}[micro_batch]
    assert len(memory_reads) == attempts
    train_tiny("--dropout", 0, "--name", "fixed")
    assert_same_run(run, LOG / "fixed", tolerance=2e-5)

    # a resumed run keeps its micro-batch, whatever the memory of the machine it resumes on
    (run / "model_00006.pt").unlink()
    shutil.rmtree(run / "state_00006")
    train_tiny(*auto)
    assert len(memory_reads) == attempts
    assert checkpoint.newest(run) == 6


def test_options_of_the_machine_do_not_change_the_training(data):
    runs = {"default": [], "deterministic": ["--deterministic", "--dtype", "tf32"],
            "recompute": ["--recompute", "on"]}
    for name, options in runs.items():
        train_tiny("--name", name, *options)
        is_deterministic = name == "deterministic"
        assert torch.are_deterministic_algorithms_enabled() == is_deterministic
        assert (torch.get_float32_matmul_precision() == "high") == is_deterministic
        torch.use_deterministic_algorithms(False)
    assert_same_run(LOG / "default", LOG / "deterministic", tolerance=0)
    assert_same_run(LOG / "default", LOG / "recompute", tolerance=2e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiling_changes_neither_parameter_names_nor_losses(data, monkeypatch):
    compiled_models = []
    original_compile = GPT.compile

    def compile_and_record(model):
        compiled_models.append(model)
        original_compile(model)

    monkeypatch.setattr(GPT, "compile", compile_and_record)
    train_tiny("--dropout", 0, "--name", "eager")
    train_tiny("--dropout", 0, "--name", "compiled", "--compile", "on")
    assert_same_run(LOG / "eager", LOG / "compiled", tolerance=1e-4)
    assert len(compiled_models) == 1
    assert compiled_models[0]._compiled_call_impl is not None


def test_bfloat16_changes_the_losses_only_slightly(data):
    train_tiny("--dropout", 0, "--name", "float32")
    train_tiny("--dropout", 0, "--name", "bfloat16", "--dtype", "bfloat16")
    assert_same_run(LOG / "float32", LOG / "bfloat16", tolerance=0.02)
    assert losses(LOG / "float32") != losses(LOG / "bfloat16")
    assert {w.dtype for w in weights(LOG / "bfloat16").values()} == {torch.float32}


# --------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize(("device", "capability", "features", "dtype"), [
    ("cuda", (9, 0), (), torch.bfloat16),
    ("cuda", (8, 0), (), torch.bfloat16),
    ("cuda", (7, 5), (), torch.float16),  # T4, which torch says supports bfloat16: by emulation
    ("cuda", (6, 1), (), torch.float16),
    ("cpu", None, ("avx512_bf16",), torch.bfloat16),
    ("cpu", None, ("amx_tile",), torch.bfloat16),
    ("cpu", None, ("avx512", "avx512_vnni"), torch.float32),
    ("mps", None, (), torch.float32)])
def test_auto_is_the_precision_that_the_hardware_computes(
        monkeypatch, device, capability, features, dtype):
    monkeypatch.undo()  # of the fixture that fixes the precision
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for feature in "avx512_bf16", "amx_tile":
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda f=feature: f in features)
    assert ddp.auto_dtype(torch.device(device)) == dtype
    assert compute_dtype(TrainConfig(), torch.device(device)) == dtype
    assert compute_dtype(TrainConfig(dtype="tf32"), torch.device(device)) == torch.float32


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_overflowing_updates_and_resumes_exactly(data, monkeypatch, optimizer):
    # a scale so high that more than five updates in a row overflow before it has fallen enough
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**25, growth_interval=4)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    options = ["--dtype", "float16", "--optimizer", optimizer, "--max-steps", 24,
               "--learning-rate", 1e-2, "--save-every", 6]
    train_tiny(*options, "--name", "whole")
    whole = LOG / "whole"
    skipped = [step for step, _ in metrics(whole, "step", "skipped")]
    assert skipped[:6] == [1, 2, 3, 4, 5, 6]
    assert len(skipped) < 16
    assert losses(whole)[24, "val_loss"] < losses(whole)[0, "val_loss"]

    # the scale is restored: a run that stopped at step 18 resumes to the same weights
    shutil.copytree(whole, LOG / "resumed")
    shutil.rmtree(LOG / "resumed" / "state_00024")
    train_tiny(*options, "--name", "resumed")
    assert ("resume", 18) in metrics(LOG / "resumed", "event", "step")
    assert_same_run(LOG / "resumed", whole, tolerance=0, last_step=24)
    scales = [checkpoint.saved_config(LOG / name, 24)["grad_scaler"]
              for name in ("whole", "resumed")]
    assert scales[0] == scales[1]
    assert scales[0]["scale"] < 2.0**25


def test_float16_stops_a_run_that_diverges_at_every_scale(data):
    with pytest.raises(UserError, match=r"has diverged: by step 1[78]"):
        train_tiny("--dtype", "float16", "--learning-rate", "1e30", "--max-steps", 40,
                   "--sample-every", 100)


def test_float16_nearly_equals_float32(data):
    train_tiny("--dropout", 0, "--name", "float32")
    train_tiny("--dropout", 0, "--name", "float16", "--dtype", "float16")
    assert_same_run(LOG / "float32", LOG / "float16", tolerance=2e-3)
    assert losses(LOG / "float32") != losses(LOG / "float16")


def test_float16_and_shard_exclude_each_other(data):
    config = TrainConfig(dtype="float16", shard=True)
    with pytest.raises(UserError, match="--shard does not work with float16"):
        place_model(tiny_gpt(), None, config, World(0, 2, torch.device("cpu")))


def test_hellaswag_uses_a_cpus_bfloat16_units(data, monkeypatch, tmp_path):
    train_tiny()
    example = {"activity_label": "fox", "ctx": "The fox", "endings": ["went", "out"], "label": 0}
    Path("h.jsonl").write_text(json.dumps(example))
    monkeypatch.setattr(ddp, "auto_dtype", lambda device: torch.bfloat16)
    computed = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *a, **k: computed.append(
        torch.is_autocast_enabled("cpu")) or hidden(*a, **k))
    for dtype, is_autocast in ("auto", True), ("float32", False):
        hellaswag.main(hellaswag.HellaSwagConfig(
            str(RUN), data=Path("h.jsonl"), dtype=dtype, json=Path("h.json")))
        assert set(computed) == {is_autocast}
        computed.clear()
        assert json.loads(Path("h.json").read_text())["dtype"] == (
            "bfloat16" if is_autocast else "float32")


@pytest.mark.parametrize(("name", "teraflops", "gigabytes"), [
    ("NVIDIA GeForce RTX 5070 Ti", 87.9, 16),
    ("NVIDIA GeForce RTX 5070", 61.7, 12),
    ("NVIDIA RTX 6000 Ada Generation", 364, 48),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 439, 96),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 500, 96),
    ("NVIDIA GH200 480GB", 989, 96),
    ("NVIDIA A10", 125, 24),
    ("NVIDIA A10G", 70, 24),
    ("Tesla T4", 65, 16),
    ("AMD Instinct MI300X", 1307, 192)])
def test_the_name_that_a_device_reports_finds_its_data_sheet(name, teraflops, gigabytes):
    device = find_device(name)
    assert (device.flops, device.memory_bytes) == (teraflops * 1e12, gigabytes * 1e9)
    assert find_device(f"{name} Laptop GPU") is None


# --------------------------------------------------------------------------------------------------
# Other systems


def test_optimizers_create_all_tensors_on_the_parameters_device():
    """Fake tensors on mps, Apple's GPU: mixing devices raises an error, as it does there."""
    with FakeTensorMode():
        for optimizer_type in Muon, functools.partial(torch.optim.AdamW, fused=True):
            p = torch.nn.Parameter(torch.empty(16, 48, device="mps"))
            p.grad = torch.empty_like(p)
            optimizer = optimizer_type([p])
            optimizer.found_inf = torch.zeros((), device="mps")
            optimizer.step()
            assert optimizer.state[p]


# a program on a system without POSIX's modules and functions, whose output knows no Cyrillic
LIKE_WINDOWS = """
import ctypes, os, runpy, signal, sys
for module in "resource", "fcntl", "termios", "pwd", "grp":
    sys.modules[module] = None
for name in "sysconf", "sched_getaffinity", "getloadavg", "fork", "getuid", "killpg":
    delattr(os, name)
for name in "SIGHUP", "SIGKILL", "SIGXFSZ", "SIGUSR1", "SIGALRM":
    delattr(signal, name)
load = ctypes.CDLL.__init__
def load_named(self, name, *arguments, **options):
    if name is None:
        raise TypeError
    load(self, name, *arguments, **options)
ctypes.CDLL.__init__ = load_named
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_needs_nothing_that_windows_lacks(data, command):
    result = command("train.py", "shakespeare-char", *TINY, "--sample-prompt", "Я",
                     "--optimizer", "muon", launcher=("-c", LIKE_WINDOWS),
                     environment={"PYTHONIOENCODING": "cp1252"})
    assert "step 6: ?" in result.stdout
    assert read_samples(RUN)[-1]["prompt"] == "Я"


def test_a_resumed_run_does_not_map_its_checkpoint_which_windows_could_not_delete(data):
    train_tiny()
    model, _, _ = checkpoint.load_model(RUN)
    tensors, _ = checkpoint.load_state(RUN, 6, model)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    path = RUN / "state_00006" / "optimizer.safetensors"
    with open(path, "r+b") as file:  # a mapped tensor would change with its file
        file.write(b"\0" * path.stat().st_size)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("program", sorted(path.name for path in ROOT.glob("*.py")))
def test_ctrl_c_during_imports_prints_no_traceback(command, tmp_path, program):
    """The first slow module is replaced with one that receives the signal."""
    source = (ROOT / program).read_text(encoding="utf-8")
    if "report_user_errors()" not in source:
        return  # not a program
    for module in "gradio", "huggingface_hub", "numpy", "pydantic", "torch", "tyro":
        (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), 2)")
    result = command(program, "--help", check=False, environment={"PYTHONPATH": tmp_path})
    assert result.stderr == "interrupted\n"
    assert result.returncode == -signal.SIGINT

# --------------------------------------------------------------------------------------------------
# Interruptions


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(data):
    options = ["--max-steps", 400, "--dropout", 0.2, "--eval-every", 10, "--save-every", 20,
               "--sample-every", 100]
    train_tiny(*options, "--name", "whole")
    run = LOG / "killed"
    line = [str(ROOT / "train.py"), "shakespeare-char", *TINY, *map(str, options), "--name=killed"]
    for kill_after in 20, 80:
        process = fork(run_program, line, {}, [os.devnull, os.devnull])
        wait_until(lambda n=kill_after: max(checkpoint.saved_steps(run), default=0) >= n)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "tra')  # a line that the process did not finish
    train_tiny(*options, "--name", "killed")
    assert_same_run(run, LOG / "whole", tolerance=0, last_step=400)


@pytest.mark.parametrize(("number", "launcher"), [
    (signal.SIGTERM, ()), pytest.param(signal.SIGINT, (), marks=pytest.mark.slow),
    (signal.SIGTERM, torchrun(2))])
def test_a_signal_saves_the_step_and_resuming_equals_an_uninterrupted_run(data, number, launcher):
    dropout = 0 if launcher else 0.2  # its mask depends on the number of ranks
    options = ["--max-steps", 200, "--dropout", dropout, "--save-every", 1000,
               "--sample-every", 100]
    train_tiny(*options, "--name", "whole")
    run = LOG / "stopped"

    # send the signal once the log has 30 lines
    process = start_tiny(*options, "--name", "stopped", launcher=launcher)
    log = run / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 30, process)
    process.send_signal(number)
    exit_code = process.wait(timeout=60)
    stopped_by_signal = exit_code == 128 + number or (launcher and exit_code)
    assert stopped_by_signal, "the run ended before the signal"

    # it saved the step it was at, without validation
    (step,) = checkpoint.saved_steps(run)
    assert 0 < step < 200
    assert checkpoint.newest(run) == step
    assert torch.load(run / f"model_{step:05d}.pt")["val_loss"] is None

    train_tiny(*options, "--name", "stopped")
    tolerance = 2e-3 if launcher else 0
    assert_same_run(run, LOG / "whole", tolerance=tolerance, last_step=200)


@pytest.mark.parametrize(("module", "name", "work"), [
    (train, "cross_entropy", "validation"),
    (likelihood, "score_batch", "hellaswag"),
    (Reader, "read", "sample"),
    (train, "autocast", "step")])
def test_a_signal_stops_any_work_at_once_and_resuming_repeats_the_work(
        data, monkeypatch, capfd, module, name, work):
    example = {"activity_label": "fox", "ctx": "The fox", "endings": ["went", "out"], "label": 0}
    Path("h.jsonl").write_text("\n".join([json.dumps(example)] * 2000))
    options = ["--hellaswag", "h.jsonl", "--eval-tokens", 128, "--sample-every", 2,
               "--save-every", 100]
    train_tiny(*options, "--name", "whole")
    run = LOG / "stopped"
    original = getattr(module, name)
    calls = []  # from the signal on

    def signal_and_call(*arguments, **keywords):
        is_step_4 = checkpoint_step(run) == 4 and (work != "step" or len(logged(run, 4)) > 1)
        if is_step_4 and not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        if is_step_4:
            calls.append(name)
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_code:
        patch.setattr(module, name, signal_and_call)
        train_tiny(*options, "--name", "stopped")
    assert exit_code.value.code == 128 + signal.SIGTERM
    assert len(calls) == 1
    assert "saving this step and stopping" in capfd.readouterr().err

    # the step is saved, and what was stopped is not recorded
    assert checkpoint.saved_steps(run) == [4]
    assert torch.load(run / "model_00004.pt")["val_loss"] is None
    assert len(logged(run, 4)) == (1 if work in ("validation", "hellaswag") else 2)
    assert [s["step"] for s in read_samples(run)][-1] == (4 if work == "step" else 2)

    # resuming repeats the work
    train_tiny(*options, "--name", "stopped")
    assert_same_run(run, LOG / "whole", tolerance=0)
    assert report.samples(run)["step"].tolist() == report.samples(LOG / "whole")["step"].tolist()
    scores = [report.hellaswag(folder)["hellaswag"].tolist() for folder in (run, LOG / "whole")]
    assert scores[0] == scores[1]


def checkpoint_step(run: Path) -> int:
    """The step of the newest update in the log."""
    return max((step for step, _ in metrics(run, "step", "train_loss")), default=0)


def logged(run: Path, step: int) -> list[tuple]:
    """The lines of the log about the step."""
    return [line for line in metrics(run, "step") if line == (step,)]


def test_a_checkpoint_that_a_signal_saved_is_evaluated_but_not_written_again(data):
    train_tiny()
    model = RUN / "model_00006.pt"
    state_json = RUN / "state_00006" / "state.json"

    # turn the last checkpoint into one that a signal saved: without a validation loss
    (RUN / "best.json").unlink()
    torch.save(torch.load(model) | {"val_loss": None}, model)
    state = json.loads(state_json.read_text())
    state["sha256"]["model"] = sha256(model)
    state_json.write_text(json.dumps(state))

    written_at = model.stat().st_mtime_ns
    for _ in range(2):
        train_tiny()
    assert model.stat().st_mtime_ns == written_at
    assert checkpoint.read_best(RUN)[0] == 6
    steps = report.loss(RUN).query("curve == 'validation'")["step"].tolist()
    assert steps == [0, 2, 4, 6]


def test_a_checkpoint_whose_state_lacks_the_configuration_is_damaged(data, capsys):
    train_tiny()
    state_json = RUN / "state_00006" / "state.json"
    state_json.write_text(state_json.read_text().replace('"config"', '"konfig"'))
    assert checkpoint.newest(RUN) == 4
    assert "the checkpoint of step 6 in" in capsys.readouterr().err


def test_a_damaged_state_of_the_gradient_scaler_gets_one_sentence(data, monkeypatch):
    train_tiny()
    state_json = RUN / "state_00006" / "state.json"
    saved = json.loads(state_json.read_text())
    saved["config"]["grad_scaler"] = {"scale": 1.0}
    state_json.write_text(json.dumps(saved))
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    with pytest.raises(UserError, match=r"state.json is damaged: delete .*state_00006"):
        train_tiny()


@pytest.mark.parametrize("n_renames", range(4))
def test_a_run_resumes_after_it_died_while_saving(data, monkeypatch, n_renames):
    """The process dies after `n_renames` of the renames that create its first checkpoint."""
    renamed = []
    original_replace = os.replace

    def replace_or_die(source, target):
        if "00002" in str(target) or "state.json" in str(target):
            if len(renamed) == n_renames:
                raise KeyboardInterrupt
            renamed.append(target)
        original_replace(source, target)

    train_tiny("--name", "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace_or_die)
        train_tiny("--name", "died")
    train_tiny("--name", "died")
    assert_same_run(LOG / "died", LOG / "whole", tolerance=0)


@pytest.mark.parametrize("limit", [
    20_000,  # bytes, less than the model's file
    30_000,  # less than the optimizer's state only
])
def test_training_continues_on_a_full_disk_until_the_last_checkpoint(
        data, command_forked, limit):
    result = command_forked("train.py", "shakespeare-char", *TINY, check=False,
                            prepare=functools.partial(limit_files, limit))
    assert result.returncode == 2
    assert result.stderr.count("training continues") == 2  # at steps 2 and 4
    assert "step 6 could not be written" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    files = {path.name for path in RUN.iterdir()}
    assert files == {"config.json", "metrics.jsonl", "samples.jsonl"}

    # with free space the same command completes the run
    train_tiny()
    assert checkpoint.newest(RUN) == 6


@pytest.mark.parametrize("kilobytes", [20, 24, 28, 32, 36])
def test_a_full_tmpfs_costs_a_run_no_step_and_keeps_no_temporary_file(data, kilobytes, capsys):
    """Of these sizes, some are too small for the model's file and some for its state's only."""
    LOG.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", LOG]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a tmpfs")
    try:
        with pytest.raises(UserError, match=r"could not be written.*No space left|device full"):
            train_tiny("--n-embd", 32)
        assert "training continues" in capsys.readouterr().err
        assert not list(RUN.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", LOG], check=True)
        train_tiny("--n-embd", 32)
        assert checkpoint.newest(RUN) == 6
    finally:
        subprocess.run(["umount", LOG], check=True)


def test_an_error_that_torch_save_hides_is_a_full_disk(tmp_path, monkeypatch):
    """It raises a RuntimeError about its own file, whose context is the disk's error."""
    def save_on_a_full_disk(content, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save_on_a_full_disk)
    (tmp_path / "model_00007.pt.tmp").touch()  # of an attempt that was interrupted
    with pytest.raises(checkpoint.SaveError, match=r"step 1 could not .*No space left on device"):
        save_tiny(tmp_path, 1, 1.5)
    assert not list(tmp_path.iterdir())


def train_step_on_mps(run, *arguments):
    """train_step as on Apple's GPU, where AdamW may ignore found_inf, though computed on a CPU."""
    def step_without_found_inf(optimizer):
        del optimizer.found_inf
        original_step(optimizer)

    original_step = torch.optim.AdamW.step
    mps = World(0, 1, SimpleNamespace(type="mps"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_without_found_inf)
        return original_train_step(dataclasses.replace(run, world=mps), *arguments)


original_train_step = train.train_step


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw on mps"])
def test_updates_with_nonfinite_gradients_are_skipped_and_five_in_a_row_end_the_run(
        data, monkeypatch, optimizer):
    if optimizer == "adamw on mps":
        optimizer = "adamw"
        monkeypatch.setattr(train, "train_step", train_step_on_mps)
    original_clip = torch.nn.utils.clip_grad_norm_

    def clip_with_nan(parameters, max_norm):
        parameters = list(parameters)
        if next(steps) in nan_steps:
            parameters[0].grad[0, 0] = float("nan")
        return original_clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_with_nan)
    options = ["--optimizer", optimizer, "--save-every", 1]

    # a skipped update changes neither the weights nor the optimizer's state
    steps = itertools.count(1)
    nan_steps = {2}
    train_tiny(*options, "--max-steps", 2, "--name", "two")
    run = LOG / "two"
    after = weights(run, 2)
    for name, weight in weights(run, 1).items():
        assert torch.equal(weight, after[name]), name
    state_before, state_after = (
        load_file(run / f"state_0000{step}" / "optimizer.safetensors") for step in (1, 2))
    for name, tensor in state_before.items():
        assert torch.equal(tensor, state_after[name]), name
    assert metrics(run, "step", "skipped") == [(2, 1)]

    # five in a row end the run, a single one does not
    steps = itertools.count(1)
    nan_steps = {2, 4, 5, 6, 7, 8}
    with pytest.raises(UserError, match=r"diverged: by step 8.*checkpoint is of step 7"):
        train_tiny(*options, "--max-steps", 20, "--name", "many")


def test_a_diverged_run_is_a_user_error(data):
    with pytest.raises(UserError, match="has diverged"):
        train_tiny("--learning-rate", "1e30")


def test_two_processes_cannot_train_the_same_run(data, command_forked):
    with runlog.locked(RUN):
        result = command_forked("train.py", "shakespeare-char", *TINY, check=False)
    assert result.returncode == 2
    assert "Another process is training" in result.stderr
    assert not RUN.exists()


# --------------------------------------------------------------------------------------------------
# Resuming and fine-tuning


def test_a_damaged_checkpoint_is_never_loaded(data, capsys):
    whole, run = LOG / "whole", LOG / "damaged"
    train_tiny("--name", "whole")
    shutil.copytree(whole, run)

    # with one byte of the newest model changed, the run resumes from the checkpoint before it
    model = run / "model_00006.pt"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    train_tiny("--name", "damaged")
    assert "checkpoint of step 6" in capsys.readouterr().err
    assert metrics(run, "event", "step")[-1] == ("resume", 4)
    assert_same_run(whole, run, tolerance=0)
    assert (metrics(run, "step", "train_loss")[-2:]
            == metrics(whole, "step", "train_loss")[-2:])

    # with all checkpoints damaged or removed, the run is not overwritten
    for state in run.glob("state_*"):
        (state / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="all of its checkpoints are damaged"):
        train_tiny("--name", "damaged")
    for state in run.glob("state_*"):
        shutil.rmtree(state)
    with pytest.raises(UserError, match="already holds a run"):
        train_tiny("--name", "damaged")
    assert (run / "metrics.jsonl").exists()
    assert model.exists()


def test_a_run_resumes_only_with_its_original_options(data, capsys):
    train_tiny()
    for options, message in [
            (["--learning-rate", "0.5"], "learning_rate"),
            (["--n-layer", "2"], "n_layer"),
            (["--dtype", "bfloat16"], "dtype"),
            (["--resume", "none"], "already holds a run")]:
        with pytest.raises(UserError, match=message):
            train_tiny(*options)
    train_tiny()
    assert "complete at step 6" in capsys.readouterr().out


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_run_does_not_resume_on_other_tokens_in_the_same_files(data, has_manifest):
    shard = Path("data/prose_char/prose_train_000001.npy")
    if not has_manifest:  # raw tokens, as nanoGPT writes them
        for split, path in ("train", shard), ("val", shard.with_name("prose_val_000000.npy")):
            np.load(path).tofile(f"data/{split}.bin")
        tokenizer = load_tokenizer(read_manifest("data/prose_char")["tokenizer"])
        alphabet = tokenizer.to_dict()["chars"]
        meta = {"itos": dict(enumerate(alphabet)), "stoi": {c: i for i, c in enumerate(alphabet)}}
        Path("data/meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(alphabet), **meta}))
        shard = Path("data/train.bin")
    options = ["--data", shard.parent]
    train_tiny(*options, "--max-steps", 4)
    train_tiny(*options, "--max-steps", 4)

    # reverse the tokens, which keeps their number
    if has_manifest:
        np.save(shard, np.load(shard)[::-1])
    else:
        np.fromfile(shard, np.uint16)[::-1].tofile(shard)
    with pytest.raises(UserError, match="was started with other data than data"):
        train_tiny(*options, "--max-steps", 4)


def test_a_run_older_than_an_option_resumes_with_the_options_default(data, monkeypatch):
    train_tiny()
    saved_config = checkpoint.saved_config

    def older_config(*arguments):
        config = saved_config(*arguments)
        del config["embedding_rate"]
        return config

    monkeypatch.setattr(checkpoint, "saved_config", older_config)
    train_tiny()
    message = r"was started with embedding_rate 1\.0, and this command has 2\.0"
    with pytest.raises(UserError, match=message):
        train_tiny("--embedding-rate", 2)


def test_a_run_of_an_earlier_version_opens_and_resumes(tmp_path):
    """fixtures/old_run dates from November 2026, before the code was divided into folders."""
    fixture = ROOT / "tests" / "fixtures" / "old_run"
    run = tmp_path / "log" / "old"
    shutil.copytree(fixture / "shards", tmp_path / "data")
    shutil.copytree(fixture / "run", run)
    expected = weights(run)
    assert checkpoint.load_model(run)[2]["step"] in (3, 6)

    # resume from step 3, and train to step 6 again
    shutil.rmtree(run / "state_00006")
    (run / "model_00006.pt").unlink()
    train_here("shakespeare-char-cpu", "--data", "data", "--run", "old", "--n-layer", 1, "--n-head",
               1, "--n-embd", 8, "--block-size", 8, "--batch-tokens", 64, "--micro-batch", 8,
               "--max-steps", 6, "--warmup-steps", 2, "--save-every", 3, "--eval-every", 3,
               "--sample-every", 6, "--log-every", 1, "--device", "cpu")
    assert ("resume", 3) in metrics(run, "event", "step")
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)


def test_finetuning_starts_at_the_loss_of_the_initial_model(data):
    train_tiny("--max-steps", 60, "--learning-rate", 1e-2)
    train_here("finetune", "--init-from", RUN, "--data", "data/prose_char", "--max-steps", 4,
               "--device", "cpu", "--batch-tokens", 64, "--eval-every", 2)
    best = json.loads((RUN / "best.json").read_text())
    step, val_loss = metrics(LOG / "finetune", "step", "val_loss")[0]
    assert step == 0
    assert val_loss == pytest.approx(best["val_loss"], abs=1e-5)
    rates = {rate for (rate,) in metrics(LOG / "finetune", "learning_rate")}
    assert rates <= {3e-5}


# --------------------------------------------------------------------------------------------------
# Validation


def test_validation_scores_only_the_tokenizers_ids(data):
    loader = DataLoader("data/prose_char", "val", 1, 16)
    tokenizer = load_tokenizer(read_manifest("data/prose_char")["tokenizer"])
    model = tiny_gpt(vocab_size=64)  # more than the tokenizer has

    # the loss of all sequences at once
    x, y = loader.read(range(loader.sequences))
    with torch.no_grad():
        logits = model(x)[0][..., :tokenizer.vocab_size]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()

    for micro_batch in 1, 3, 1000:  # 1000 is more than the split has
        config = TrainConfig(block_size=16, micro_batch=micro_batch)
        loss = train.evaluate(model, loader, tokenizer.vocab_size, config, ddp.SINGLE_PROCESS)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_validation_scores_the_same_sequences_with_any_number_of_ranks(data, monkeypatch):
    loader = DataLoader("data/prose_char", "val", 1, 16)
    read_tokens = loader.tokens
    scored = []

    def record_and_read(sequences):
        scored.extend(sequences)
        return read_tokens(sequences)

    def own_sums(_world, total, count):
        return total, count or 1  # a rank may have no sequences

    monkeypatch.setattr(ddp, "check_signals", lambda world: None)

    monkeypatch.setattr(loader, "tokens", record_and_read)
    monkeypatch.setattr(ddp, "sum_over_ranks", own_sums)
    config = TrainConfig(block_size=16, micro_batch=2, eval_tokens=20 * 16)
    for size in 1, 2, 3, 64:
        scored.clear()
        for rank in range(size):
            world = World(rank, size, torch.device("cpu"))
            train.evaluate(tiny_gpt(vocab_size=64), loader, 32, config, world)
        assert sorted(scored) == list(range(20))


# --------------------------------------------------------------------------------------------------
# The plan


def test_a_dry_run_prints_the_plan_and_writes_nothing(data, capsys):
    train_tiny("--dry-run")
    output = capsys.readouterr().out
    assert "6 steps of 128 tokens" in output
    assert "parameters" in output
    assert not LOG.exists()


def test_the_plan_without_data_is_for_the_gpu_of_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(ddp, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    train_here("gpt2-124m", "--dry-run")
    output = capsys.readouterr().out
    assert "parameters, on 1 x NVIDIA A100-SXM4-80GB\n" in output
    assert "TFLOP/s" in output


def test_the_plan_says_at_which_step_the_data_repeat(data, capsys):
    train_tiny("--max-steps", 10_000, "--dry-run")
    assert re.search(r"repeating from step \d+", capsys.readouterr().out)


def test_the_plan_of_gpt2_124m_needs_neither_gpu_nor_data(capsys):
    train_here("gpt2-124m", "--dry-run", "--gpu", "a100", "--nproc", 8, "--price", 1.8)
    output = capsys.readouterr().out
    assert "124,475,904 parameters, on 8 x a100" in output
    assert "9,999,745,024 tokens" in output
    assert "no data in" in output

    # the time of a step is near what llm.c and allenporter publish for 8 x A100
    compute_ms, communicate_ms = map(
        float, re.search(r"(\d+) ms per step .* and (\d+) ms to sum", output).groups())
    step_ms = compute_ms + communicate_ms
    assert 300 <= step_ms <= 390

    # time, cost and energy follow from it
    hours, cost = map(float, re.search(r"([\d.]+) hours; cost ([\d.]+) at 1.8", output).groups())
    kwh = float(re.search(r"([\d.]+) kWh", output)[1])
    assert hours == pytest.approx(19_073 * step_ms / 3.6e6, abs=0.06)
    assert cost == pytest.approx(hours * 8 * 1.8, rel=0.05)
    assert kwh == pytest.approx(8 * 0.4 * hours, rel=0.05)
    assert "kg CO2e" in output

    with pytest.raises(UserError, match="do not divide evenly among 7"):
        train_here("gpt2-124m", "--dry-run", "--gpu", "a100", "--nproc", 7)
    with pytest.raises(UserError, match="data sheet of 'abacus'"):
        train_here("gpt2-124m", "--dry-run", "--gpu", "abacus")


# (sequences, sizes); the CPU computes up to 512 rows of logits at a time
SMALL_VOCAB = (16, GPTConfig(128, 65, 4, 4, 128))
WIDE = (4, GPTConfig(256, 65, 4, 6, 192))
ALL_ROWS_AT_ONCE = (2, GPTConfig(128, 8192, 4, 4, 256))
ROWS_IN_CHUNKS = (4, GPTConfig(256, 4096, 2, 4, 64))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("sequences", "sizes", "bfloat16", "recompute"), [
    (*SMALL_VOCAB, False, False),
    (*WIDE, False, False),
    (*ALL_ROWS_AT_ONCE, False, False),
    (*ALL_ROWS_AT_ONCE, True, False),
    (*ROWS_IN_CHUNKS, False, False),
    (*ROWS_IN_CHUNKS, True, False),
    (*SMALL_VOCAB, False, True),
    (*SMALL_VOCAB, True, True),
    (*ROWS_IN_CHUNKS, False, True),
    (*ROWS_IN_CHUNKS, True, True),
])
def test_the_planned_memory_is_near_that_of_a_real_step(
        sequences, sizes, bfloat16, recompute, optimizer):
    model = GPT(sizes)
    model.recompute = recompute
    x = torch.randint(sizes.vocab_size, (sequences, sizes.block_size))

    # measure the peak of what a forward and backward pass allocates
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(x, x)[1]
        loss.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    peak = max(itertools.accumulate(e.nbytes() for e in events))
    planned = plan.activation_bytes(model, sequences * sizes.block_size, bfloat16, recompute)
    assert planned == pytest.approx(peak, rel=0.25)

    # measure the state of the optimizers, which includes a step counter
    config = TrainConfig(optimizer=optimizer)
    optimizers = build_optimizers(model, config)
    state_bytes = 0
    for torch_optimizer in optimizers:
        torch_optimizer.step()
        for state in torch_optimizer.state.values():
            state_bytes += sum(tensor.nbytes for key, tensor in state.items() if key != "step")
    assert state_bytes == plan.optimizer_bytes(config, model)


# --------------------------------------------------------------------------------------------------
# User errors


@pytest.mark.parametrize(("arguments", "message"), [
    (["no-such-preset"], "Unknown preset 'no-such-preset'"),
    ([], "fineweb.py"),
    (["shakespeare-char"], "python prepare.py tiny_shakespeare --tokenizer char"),
    (["pushkin-char"], "python prepare.py tiny_pushkin --tokenizer char --text FILE"),
    (["edu-bundled"],
     "prepare.py FILE_OR_FOLDER --tokenizer bpe:4096 --out data/edu_corpus_bpe-4096"),
    (["shakespeare-char", *TINY, "--batch-tokens", "100"], "is not a multiple"),
    (["shakespeare-char", *TINY, "--vocab-size", "5"], "is too small"),
    (["shakespeare-char", *TINY, "--n-head", "3"], "divisible by n_head"),
    (["shakespeare-char", *TINY, "--device", "abacus"], "no device 'abacus'"),
    (["shakespeare-char", *TINY, "--eval-every", "0"], "--eval-every must be at least 1"),
    (["shakespeare-char", *TINY, "--batch-tokens", "0"], "--batch-tokens must be at least 1"),
    (["shakespeare-char", *TINY, "--max-steps", "-1"],
     "--max-steps must be finite and at least 0"),
    (["shakespeare-char", *TINY, "--learning-rate", "nan"], "--learning-rate must be finite"),
    (["shakespeare-char", *TINY, "--name", "../elsewhere"], "--name names a folder"),
    (["shakespeare-char", *TINY, "--wait-s", "0"], "--wait-s must be above 0"),
    (["finetune", *TINY, "--init-from", "bundled:shakespeare", "--data", "data/prose_char"],
     "another tokenizer"),
    (["finetune", *TINY, "--init-from", "data"], "not a model folder"),
])
def test_invalid_input_is_a_user_error(data, arguments, message):
    with pytest.raises(UserError, match=message):
        train_here(*arguments)


def test_a_user_error_is_one_line_on_stderr_with_exit_code_2(command_here):
    result = command_here("train.py", "no-such-preset", check=False)
    assert_one_line_error(result, "Unknown preset 'no-such-preset'. The presets are: ")
    assert result.stdout == ""


def test_a_file_that_cannot_be_created_is_a_user_error(command_here, data, tmp_path):
    (tmp_path / "log").touch()  # a file where the folder should be
    result = command_here("train.py", "shakespeare-char", *TINY, check=False)
    assert_one_line_error(result, "log")


# --------------------------------------------------------------------------------------------------
# Optimizers and learning rates


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"),
                    reason="torch 2.8 has no Muon to compare with")
def test_our_muon_takes_the_steps_of_torchs():
    torch.manual_seed(0)
    for shape in (32, 96), (64, 16):
        ours = torch.nn.Parameter(torch.ones(shape))
        theirs = torch.nn.Parameter(torch.ones(shape))
        our_muon = Muon([ours], lr=0.01, weight_decay=0.1)
        torch_muon = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1,
                                      adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            our_muon.step()
            torch_muon.step()
        distance_moved = (theirs - 1).norm()
        assert (ours - theirs).norm() < 0.02 * distance_moved  # torch computes in bfloat16


@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (72, 24), (24, 24)])
def test_orthogonalizing_equals_five_newton_schulz_steps(shape):
    torch.manual_seed(0)
    scales = torch.logspace(0, -4, shape[1], dtype=torch.float64)
    matrix = torch.randn(shape, dtype=torch.float64) @ torch.diag(scales)
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    torch.testing.assert_close(orthogonalize(matrix), x)
    torch.testing.assert_close(orthogonalize(matrix.float()), x.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay_and_every_parameter_has_one_optimizer(name):
    model = GPT(GPTConfig(8, 16, 2, 2, 8))
    optimized = []
    for optimizer in build_optimizers(model, TrainConfig(optimizer=name)):
        for group in optimizer.param_groups:
            optimized += group["params"]
            for p in group["params"]:
                assert (p.dim() == 2) == (group["weight_decay"] == 0.1)
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_embeddings_have_their_own_learning_rate(name):
    model = GPT(GPTConfig(8, 16, 2, 2, 8))
    optimizers = build_optimizers(model, TrainConfig(optimizer=name, embedding_rate=4.0))
    set_learning_rate(optimizers, 0.5)
    rates = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rates.update({id(p): group["lr"] for p in group["params"]})
    embeddings = (model.transformer.wte.weight, model.transformer.wpe.weight)
    assert {rates.pop(id(p)) for p in embeddings} == {2.0}
    assert set(rates.values()) == {0.5}


def learning_rates(schedule: str, **options) -> list[float]:
    config = TrainConfig(schedule=schedule, learning_rate=1.0, warmup_steps=10, max_steps=100,
                         min_lr_ratio=0.1, **options)
    return [learning_rate(step, config) for step in range(101)]


def test_cosine_warms_up_and_falls_to_its_minimum():
    rates = learning_rates("cosine")
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rates("constant")[99] == 1.0


def test_wsd_is_constant_and_then_falls_linearly():
    rates = learning_rates("wsd")
    assert rates[9] == 1
    assert set(rates[10:80]) == {1.0}
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    rates = learning_rates("wsd", decay_ratio=0.5)
    assert set(rates[10:51]) == {1.0}
    assert rates[75] == pytest.approx(0.55)


def test_the_length_of_wsd_may_change_until_its_decay_begins(data, monkeypatch):
    wsd = ["--schedule", "wsd", "--optimizer", "muon"]
    short = ["--max-steps", 10, "--decay-ratio", 0.4]
    train_tiny(*wsd, *short, "--name", "whole")
    train_step = train.train_step

    def interrupted_step(run, x, y, step):
        if step == 5 and run.config.max_steps == 1000:
            raise KeyboardInterrupt
        return train_step(run, x, y, step)

    monkeypatch.setattr(train, "train_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(*wsd, "--max-steps", 1000, "--name", "shortened")
    train_tiny(*wsd, *short, "--name", "shortened")
    assert_same_run(LOG / "shortened", LOG / "whole", tolerance=0, last_step=10)
    assert report.read_config(LOG / "shortened")["max_steps"] == 10
    with pytest.raises(UserError, match="was started with max_steps 10, and this command has"):
        train_tiny(*wsd, "--max-steps", 1000, "--name", "shortened")


def test_a_recipe_overrides_the_preset_and_an_option_overrides_the_recipe(data):
    train_tiny("--recipe=fast", "--name", "fast")
    fast = report.read_config(LOG / "fast")
    assert fast["optimizer"] == "muon"
    assert fast["embedding_rate"] == 4
    assert fast["learning_rate"] > 1e-3
    assert fast["max_steps"] == 6  # from TINY

    train_tiny("--recipe=fast", "--name", "adamw", "--learning-rate", 1e-4, "--optimizer", "adamw")
    adamw = report.read_config(LOG / "adamw")
    assert adamw["optimizer"] == "adamw"
    assert adamw["learning_rate"] == 1e-4
    assert adamw["embedding_rate"] == 4


# --------------------------------------------------------------------------------------------------
# Loading a model by name


@pytest.fixture
def saved_run(tmp_path):
    """log/run with two checkpoints, the first of which is the best."""
    run = tmp_path / "log" / "run"
    run.mkdir(parents=True)
    for step, val_loss in (1, 1.5), (2, 2.5):
        save_tiny(run, step, val_loss, seed=step)
    return run


def save_tiny(run: Path, step: int, val_loss: float, seed: int = 0):
    checkpoint.save(run, step, tiny_gpt(vocab_size=8, seed=seed), {"a": torch.ones(2)},
                    CharTokenizer("\n abc"), {}, val_loss)


def test_a_run_loads_its_best_model_and_no_name_loads_the_newest_run(saved_run):
    for name in saved_run, "log/run", None, saved_run / "model_00001.pt":
        assert checkpoint.load_model(name)[2]["step"] == 1
    assert checkpoint.load_model(saved_run / "model_00002.pt")[2]["val_loss"] == 2.5


def test_the_best_model_is_kept_while_newer_ones_are_saved(saved_run):
    for step in 3, 4:
        save_tiny(saved_run, step, 2.0)
    assert sorted(path.name for path in saved_run.glob("*_0*")) == [
        "model_00001.pt", "model_00003.pt", "model_00004.pt", "state_00003", "state_00004"]
    assert checkpoint.load_model(saved_run)[2]["step"] == 1


def test_saving_keeps_the_new_checkpoint_and_other_files(saved_run):
    for damaged_step in 20, 22:
        (saved_run / f"state_{damaged_step:05d}").mkdir()
    (saved_run / "model_of_mine.pt").touch()
    (saved_run / "best.json").write_text("{")
    assert checkpoint.newest(saved_run) == 2
    assert checkpoint.load_model(saved_run)[2]["step"] == 2

    save_tiny(saved_run, 3, 2.0)
    assert checkpoint.saved_steps(saved_run) == [2, 3]
    assert checkpoint.newest(saved_run) == 3
    assert checkpoint.load_model(saved_run)[2]["step"] == 3
    assert (saved_run / "model_of_mine.pt").exists()


def test_a_model_cannot_be_exported_into_a_run(saved_run):
    with pytest.raises(UserError, match="holds a run"):
        publish.export("bundled:shakespeare", saved_run)
    assert checkpoint.load_model(saved_run)[2]["step"] == 1


def test_an_exported_model_generates_the_same_text_as_its_run(saved_run, tmp_path):
    exported = tmp_path / "exported"
    publish.export(str(saved_run), exported, "float32")
    texts = []
    for name in saved_run, exported, exported / "model.safetensors":
        model, tokenizer, _ = checkpoint.load_model(name)
        texts += Engine(model, tokenizer).generate("abc", max_new_tokens=50, seed=3)
    assert texts[0] == texts[1] == texts[2]


def test_a_model_in_the_layout_of_gpt2_is_downloaded_from_the_hub(
        command_forked, web, tmp_path):
    # a folder with the Hub's names of GPT-2's weights: no prefix, and a mask in each block
    folder = tmp_path / "hub"
    save_huggingface(folder, tiny_gpt(vocab_size=50257), load_tokenizer("gpt2"))
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("transformer."): w for name, w in state.items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(state, folder / "model.safetensors")

    # serve it as the Hub does
    online = {"HF_ENDPOINT": web(hub_model("gpt2", folder)), "HF_HOME": str(tmp_path / "cache"),
              "HF_HUB_OFFLINE": "0"}

    # the first command downloads it, the second one loads it from the cache
    model, tokenizer, _ = checkpoint.load_model(folder)
    (continuation,) = Engine(model, tokenizer).generate("Hello", temperature=0, max_new_tokens=5)
    for environment in online, {**online, "HF_HUB_OFFLINE": "1"}:
        result = command_forked("generate.py", "-m", "gpt2", "-p", "Hello", "--temperature", 0,
                                "--max-new-tokens", 5, environment=environment)
        assert result.stdout == f"Hello{continuation}\n"

    result = command_forked("generate.py", "-m", "nobody/nothing", "-p", "x", environment=online,
                            check=False)
    assert_one_line_error(result, ".*Hub has no model of that name")


@pytest.mark.parametrize("damaged", ["{", '{"step": 1e999, "val_loss": 1}', "[" * 10**5])
def test_a_run_with_a_damaged_best_json_gives_its_newest_model(saved_run, damaged):
    (saved_run / "best.json").write_text(damaged)
    assert checkpoint.load_model(saved_run)[2]["step"] == 2


def test_a_model_that_was_damaged_on_the_disk_is_not_loaded(saved_run, tmp_path):
    """Four bytes of a weight change, which leaves a model that looks intact and writes nonsense."""
    model, tokenizer, info = checkpoint.load_model(saved_run)
    save_huggingface(tmp_path / "published", model, tokenizer, step=info["step"])
    for path in saved_run / "model_00001.pt", tmp_path / "published" / "model.safetensors":
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle:middle + 4] = bytes(4) if any(content[middle:middle + 4]) else b"\1" * 4
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load_model(path)


def test_a_model_that_others_trained_further_does_not_keep_our_step_and_loss(saved_run, tmp_path):
    folder = tmp_path / "published"
    publish.export(str(saved_run), folder, "float32")
    assert checkpoint.load_model(folder)[2]["step"] == 1
    fine_tuned = transformers.AutoModelForCausalLM.from_pretrained(folder)
    fine_tuned.save_pretrained(folder)
    info = checkpoint.load_model(folder)[2]
    assert not {"step", "val_loss", "train_config"} & set(info)


def test_loading_a_model_does_not_run_code_in_its_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "it_ran").touch, ()

    torch.save({"format": 1, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "it_ran").exists()


def test_files_and_folders_that_are_not_models_are_user_errors(saved_run, tmp_path):
    content = (saved_run / "model_00001.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:len(content) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.md").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only" / "config.json").write_text("{}")

    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    saved = torch.load(saved_run / "model_00001.pt", weights_only=True)
    wrong_sizes = {**saved["config"], "n_layer": 1}
    torch.save({**saved, "config": wrong_sizes}, tmp_path / "misfit.pt")
    torch.save({**saved, "config": ["n_layer"]}, tmp_path / "list.pt")

    for name, message in [
            ("cut.pt", "is damaged"),
            ("text.pt", "is damaged, or is not a checkpoint"),
            ("empty.pt", "not a checkpoint"),
            ("other.pt", "not a checkpoint of this program"),
            ("misfit.pt", "do not fit"),
            ("list.pt", "do not fit"),
            ("folder", "has no config.json"),
            ("config_only", "has no model.safetensors"),
            ("text.md", "is not a model"),
            ("nowhere.pt", "no file, folder or run"),
            ("bundled:nothing", "no bundled model")]:
        with pytest.raises(UserError, match=message):
            checkpoint.load_model(name)


def test_a_folder_with_an_unsupported_config_or_damaged_weights_is_a_user_error(tmp_path):
    save_huggingface(tmp_path, tiny_gpt(vocab_size=8), CharTokenizer("\n abc"))
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
            ({"n_layer": 3}, "do not fit"),
            ({"n_embd": "16"}, "must be an integer"),
            ({"model_type": "llama"}, "llama"),
            ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx")]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            checkpoint.load_model(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(config))
    weights_file = tmp_path / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_model(tmp_path)
