import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    PROSE,
    ROOT,
    TINY,
    assert_same_run,
    losses,
    metrics,
    tiny_gpt,
    train_here,
    weights,
)
from safetensors.torch import load_file, save_file

import checkpoint
import ddp
import hellaswag
import prepare
import publish
import report
import train
from common.errors import UserError
from common.files import sha256
from dataloader import DataLoader
from ddp import World
from generate import Engine
from model import GPT, GPTConfig
from shards import read_manifest
from tokenizer import CharTokenizer, load_tokenizer
from training import plan, runlog
from training.optim import Muon, build_optimizers, learning_rate, orthogonalize, set_learning_rate
from weights.huggingface import save_huggingface

TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture
def data(prose):
    prepare.main(prepare.PrepareConfig(str(prose)))


def test_a_run_learns_and_leaves_what_the_contract_names(data, tmp_path):
    train_here("shakespeare-char", *TINY, "--max-steps", 200, "--learning-rate", 1e-2,
               "--eval-every", 50, "--save-every", 50, "--sample-every", 100)
    run = tmp_path / "log" / "shakespeare-char"
    val_losses = [loss for _, loss in metrics(run, "step", "val_loss")]
    assert val_losses[0] == pytest.approx(torch.tensor(float(len(set(PROSE)))).log().item(),
                                          abs=0.1)
    assert val_losses[-1] < val_losses[0] - 1
    assert metrics(run, "step", "train_loss")[0][0] == 1
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl",
                                                     "samples.jsonl", "best.json", "model_00150.pt",
                                                     "model_00200.pt", "state_00150", "state_00200"}
    saved = torch.load(run / "model_00200.pt", weights_only=True)
    assert set(saved) == {"format", "model", "config", "tokenizer", "step", "val_loss"}
    assert saved["step"] == 200 and saved["val_loss"] == val_losses[-1]
    model = GPT(saved["config"])
    model.load_state_dict(saved["model"])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 100, 200]


def test_hellaswag_is_scored_with_each_validation(data, tmp_path):
    lines = [
        json.dumps(
            {"activity_label": "fox", "ctx": f"The fox {verb}",
             "endings": ["out.", "town-o", "he", "a mile to go"], "label": i % 4}
        )
        for i, verb in enumerate(PROSE.split()[:11])
    ]
    (tmp_path / "h.jsonl").write_text("\n".join(lines))
    arguments = ["shakespeare-char", *TINY, "--dropout", 0, "--hellaswag", "h.jsonl"]
    train_here(*arguments, "--name", "one")
    one = metrics(tmp_path / "log" / "one", "step", "hellaswag")
    assert len(one) == len(metrics(tmp_path / "log" / "one", "step", "val_loss"))
    model, tokenizer, _ = checkpoint.load_model("log/one")
    examples = hellaswag.read_examples(tmp_path / "h.jsonl")
    assert (
        one[-1][1]
        == hellaswag.evaluate(model, tokenizer, examples, "nanogpt")["nanogpt"]["acc_norm"]
    )
    with pytest.raises(UserError, match=r"Line 1 of .*config.json"):
        train_here("shakespeare-char", *TINY, "--hellaswag", "log/one/config.json", "--name",
                   "three")


def test_a_run_on_fineweb_edu_is_compared_with_the_published_ones_and_writes_several_samples(
        prose, tmp_path, capsys):
    prepare.main(
        prepare.PrepareConfig(str(prose), tokenizer="gpt2", out=tmp_path / "edu_fineweb_little")
    )
    train_here("gpt2-124m", *TINY, "--data", "edu_fineweb_little", "--hellaswag", "none",
               "--max-steps", 2)
    assert "the published runs" in capsys.readouterr().out
    samples = [
        json.loads(line)
        for line in (tmp_path / "log" / "gpt2-124m" / "samples.jsonl").read_text().splitlines()
    ]
    assert [sample["step"] for sample in samples] == [0] * 4 + [2] * 4 and len(
        {sample["text"] for sample in samples}
    ) == 8


def test_a_run_goes_without_hellaswag_where_it_cannot_be_downloaded(data, tmp_path, monkeypatch,
                                                                    capsys):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/h.jsonl")
    train_here("shakespeare-char", *TINY, "--hellaswag", "auto")
    assert "training without HellaSwag" in capsys.readouterr().err
    assert not metrics(tmp_path / "log" / "shakespeare-char", "step", "hellaswag")


def test_micro_batches_only_divide_a_batch(data, tmp_path):
    for run, micro_batch in ("one", 8), ("two", 3):  # 3 + 3 + 2 sequences
        train_here("shakespeare-char", *TINY, "--dropout", 0, "--name", run, "--micro-batch",
                   micro_batch)
    assert_same_run(tmp_path / "log" / "one", tmp_path / "log" / "two", tolerance=2e-5)


def test_the_largest_micro_batch_that_fits_is_found_once_and_kept(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ddp, "memory_bytes", lambda device: asked.append(device) or 150_000)
    arguments = ["shakespeare-char", *TINY, "--dropout", 0, "--micro-batch", "auto"]
    with (
        monkeypatch.context() as patch,
        pytest.raises(MemoryError),
    ):  # an attempt with too many, of which nothing was saved
        patch.setattr(train, "train_step", lambda *_: (_ for _ in ()).throw(MemoryError))
        train_here("shakespeare-char", *TINY, "--name", "auto", "--micro-batch", 8)
    train_here(*arguments, "--name", "auto")
    run = tmp_path / "log" / "auto"
    found = report.read_config(run)["micro_batch"]
    assert found in (2, 4) and len(asked) == {4: 2, 2: 3}[found]
    train_here("shakespeare-char", *TINY, "--dropout", 0, "--name", "one")
    assert_same_run(run, tmp_path / "log" / "one", tolerance=2e-5)
    for path in run.glob("*_00006*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    train_here(*arguments, "--name", "auto")  # on a machine that has become another, say
    assert len(asked) == {4: 2, 2: 3}[found] and checkpoint.newest(run) == 6


def test_the_ways_of_the_machine_change_no_step(data, tmp_path):
    runs = {"plain": [], "exact": ["--deterministic", "--dtype", "tf32"],
            "again": ["--recompute", "on"]}
    for run, arguments in runs.items():
        train_here("shakespeare-char", *TINY, "--name", run, *arguments)
        assert torch.are_deterministic_algorithms_enabled() == (run == "exact")
        assert (torch.get_float32_matmul_precision() == "high") == (run == "exact")
        torch.use_deterministic_algorithms(False)
    plain, exact = (weights(tmp_path / "log" / run) for run in ("plain", "exact"))
    assert all(torch.equal(plain[name], exact[name]) for name in plain)
    assert_same_run(tmp_path / "log" / "plain", tmp_path / "log" / "again", tolerance=2e-5)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_log_goes_where_it_is_tracked_too(data, tmp_path, monkeypatch, name):
    """A module of that name stands for the package: its two calls are written down."""
    (tmp_path / f"{name}.py").write_text("""
import json
def init(**about):
    print(json.dumps(about), file=open("tracked", "a")); return Run()
class Run:
    def log(self, values, step): print(json.dumps([step, values]), file=open("tracked", "a"))
""")
    monkeypatch.syspath_prepend(tmp_path)
    train_here("shakespeare-char", *TINY, "--track", name)
    started, *lines = [json.loads(line) for line in (tmp_path / "tracked").read_text().splitlines()]
    assert (started["name"], started["config"]["n_layer"], started["resume"]) == (
        "shakespeare-char", 1, "allow")
    assert started.get("id") == ("shakespeare-char" if name == "wandb" else None)
    run = tmp_path / "log" / "shakespeare-char"
    assert [(step, values["val_loss"]) for step,
            values in lines if "val_loss" in values] == metrics(run, "step", "val_loss")
    losses = [(step, values["train_loss"]) for step, values in lines if "train_loss" in values]
    assert losses == metrics(run, "step", "train_loss")


def test_a_tracker_that_is_not_installed_gets_one_sentence(data):
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match="pip install wandb"):
            train_here("shakespeare-char", *TINY, "--track", "wandb")


def test_a_killed_run_goes_on_to_the_weights_of_the_uninterrupted_one(data, tmp_path):
    arguments = ["shakespeare-char", *TINY, "--max-steps", "400", "--dropout", "0.2",
                 "--save-every", "20"]
    train_here(*arguments, "--name", "whole")
    run = tmp_path / "log" / "killed"
    for reached in 20, 80:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *arguments, "--name", "killed"], cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        while process.poll() is None and max(checkpoint.saved_steps(run), default=0) < reached:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was to be killed on its way"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "tra')  # torn while being written
    train_here(*arguments, "--name", "killed")
    assert_same_run(run, tmp_path / "log" / "whole", tolerance=0, last_step=400)


@pytest.mark.parametrize(("number", "launcher"),
                         [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, TWO_RANKS)])
def test_a_signal_saves_the_step_and_the_run_goes_on_as_if_there_had_been_none(data, tmp_path,
                                                                               number, launcher):
    arguments = [
        str(a)
        for a in ("shakespeare-char", *TINY, "--max-steps", 200, "--dropout", 0.2 * (not launcher),
                  "--save-every", 1000)
    ]
    train_here(*arguments, "--name", "whole")
    run = tmp_path / "log" / "stopped"
    process = subprocess.Popen(
        [sys.executable, *launcher, ROOT / "train.py", *arguments, "--name", "stopped"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    while process.poll() is None and len((run / "metrics.jsonl").read_text().splitlines()) < 30:
        time.sleep(0.01)
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code == 128 + number or (launcher and code), "it was to be stopped on its way"
    (step,) = checkpoint.saved_steps(run)
    assert 0 < step < 200 and checkpoint.newest(run) == step
    assert torch.load(run / f"model_{step:05d}.pt")["val_loss"] is None
    train_here(*arguments, "--name", "stopped")
    assert_same_run(run, tmp_path / "log" / "whole", tolerance=2e-3 if launcher else 0,
                    last_step=200)


def test_the_share_of_a_known_devices_peak_is_logged(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ddp, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    train_here("shakespeare-char", *TINY)
    for tokens_per_s, mfu in metrics(tmp_path / "log" / "shakespeare-char", "tokens_per_s", "mfu"):
        n = checkpoint.load_model("log/shakespeare-char")[2]["parameters"]
        assert mfu == pytest.approx(tokens_per_s * (6 * n + 12 * 1 * 16 * 16) / 312e12, rel=1e-3)


def test_a_run_that_another_process_trains_is_left_alone(data, tmp_path, command):
    with runlog.locked(tmp_path / "log" / "shakespeare-char"):
        done = command("train.py", "shakespeare-char", *TINY, check=False)
    assert done.returncode == 2 and "Another process is training" in done.stderr
    assert not (tmp_path / "log" / "shakespeare-char").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_whose_gradient_is_not_finite_is_skipped_and_five_in_a_row_end_the_run(
        data, tmp_path, monkeypatch, optimizer):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, limit):
        parameters = list(parameters)
        calls.append(None)
        if len(calls) in bad:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    arguments = ["shakespeare-char", *TINY, "--optimizer", optimizer, "--save-every", 1]
    bad = {2}
    train_here(*arguments, "--max-steps", 2, "--name", "two")
    for name, weight in weights(tmp_path / "log" / "two", 1).items():
        assert torch.equal(weight, weights(tmp_path / "log" / "two", 2)[name]), name
    states = sorted((tmp_path / "log" / "two").glob("state_*/optimizer.safetensors"))
    state_one, state_two = map(load_file, states)
    assert all(torch.equal(state_one[name], state_two[name]) for name in state_one)
    assert metrics(tmp_path / "log" / "two", "step", "skipped") == [(2, 1)]
    calls.clear()
    bad = {2, 4, 5, 6, 7, 8}
    with pytest.raises(UserError, match=r"diverged: by step 8.*checkpoint is of step 7"):
        train_here(*arguments, "--max-steps", 20, "--name", "many")


@pytest.mark.parametrize("limit", [20_000, 30_000])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(data, tmp_path, command, limit):
    """A limit on the size of a file stands for it: the model is over the first, the optimizer's state alone over the second."""
    limited = (
        "-c",
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')",
    )
    run = tmp_path / "log" / "shakespeare-char"
    done = command("train.py", "shakespeare-char", *TINY, launcher=limited, check=False)
    assert (
        done.returncode == 2 and done.stderr.count("training continues") == 2
    )  # of the steps 2 and 4
    assert (
        "step 6 could not be written" in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl",
                                                     "samples.jsonl"}
    train_here("shakespeare-char", *TINY)  # there is room again
    assert checkpoint.newest(run) == 6


@pytest.mark.parametrize("cut", range(4))
def test_a_checkpoint_cut_at_any_place_is_finished_or_made_again(data, tmp_path, monkeypatch, cut):
    """The names that the first checkpoint gives its files: after `cut` of them the process is gone."""
    run, given, real = tmp_path / "log" / "cut", [], os.replace

    def dying(source, target):
        if "00002" in str(target) or "state.json" in str(target):
            if len(given) == cut:
                raise KeyboardInterrupt
            given.append(target)
        real(source, target)

    train_here("shakespeare-char", *TINY, "--name", "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dying)
        train_here("shakespeare-char", *TINY, "--name", "cut")
    train_here("shakespeare-char", *TINY, "--name", "cut")
    assert_same_run(run, tmp_path / "log" / "whole", tolerance=0)


def test_a_step_that_a_signal_saved_is_measured_and_not_written_again(data, tmp_path):
    train_here("shakespeare-char", *TINY, "--name", "r")
    run = tmp_path / "log" / "r"
    saved = torch.load(run / "model_00006.pt") | {"val_loss": None}
    (run / "best.json").unlink()
    torch.save(saved, run / "model_00006.pt")
    state = json.loads((run / "state_00006" / "state.json").read_text())
    state["sha256"]["model"] = sha256(run / "model_00006.pt")
    (run / "state_00006" / "state.json").write_text(json.dumps(state))
    before = (run / "model_00006.pt").stat().st_mtime_ns
    for _ in range(2):
        train_here("shakespeare-char", *TINY, "--name", "r")
    assert (run / "model_00006.pt").stat().st_mtime_ns == before and checkpoint.read_best(run)[
        0
    ] == 6
    steps = report.loss(run).query("curve == 'validation'")["step"].tolist()
    assert steps == [0, 2, 4, 6]


def test_a_damaged_checkpoint_is_never_chosen(data, tmp_path, capsys):
    train_here("shakespeare-char", *TINY, "--name", "whole")
    run = tmp_path / "log" / "damaged"
    shutil.copytree(tmp_path / "log" / "whole", run)
    model = run / "model_00006.pt"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    train_here("shakespeare-char", *TINY, "--name", "damaged")
    assert "checkpoint of step 6" in capsys.readouterr().err
    assert metrics(run, "event", "step")[-1] == ("resume", 4)
    assert_same_run(tmp_path / "log" / "whole", run, tolerance=0)
    assert (
        metrics(run, "step", "train_loss")[-2:]
        == metrics(tmp_path / "log" / "whole", "step", "train_loss")[-2:]
    )

    for state in run.glob("state_*"):
        (state / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="all of its checkpoints are damaged"):
        train_here("shakespeare-char", *TINY, "--name", "damaged")
    for state in run.glob("state_*"):
        shutil.rmtree(state)
    with pytest.raises(UserError, match="already holds a run"):
        train_here("shakespeare-char", *TINY, "--name", "damaged")
    assert (run / "metrics.jsonl").exists() and (run / "model_00006.pt").exists()


def test_a_run_goes_on_only_as_it_was_started(data, capsys):
    train_here("shakespeare-char", *TINY)
    for change, sentence in ((["--learning-rate", "0.5"], "learning_rate"),
                             (["--n-layer", "2"], "n_layer"), (["--dtype", "bfloat16"], "dtype"),
                             (["--resume", "none"], "already holds a run")):
        with pytest.raises(UserError, match=sentence):
            train_here("shakespeare-char", *TINY, *change)
    train_here("shakespeare-char", *TINY)
    assert "complete at step 6" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_opens_and_resumes(tmp_path):
    """fixtures/old_run was written in November 2026, before the code was laid out in folders."""
    fixture = ROOT / "tests" / "fixtures" / "old_run"
    run = tmp_path / "log" / "old"
    shutil.copytree(fixture / "shards", tmp_path / "data")
    shutil.copytree(fixture / "run", run)
    expected = weights(run)
    assert checkpoint.load_model(run)[2]["step"] in (3, 6)
    shutil.rmtree(run / "state_00006")
    (run / "model_00006.pt").unlink()
    train_here("shakespeare-char-cpu", "--data", "data", "--run", "old", "--n-layer", 1, "--n-head",
               1, "--n-embd", 8, "--block-size", 8, "--batch-tokens", 64, "--micro-batch", 8,
               "--max-steps", 6, "--warmup-steps", 2, "--save-every", 3, "--eval-every", 3,
               "--sample-every", 6, "--log-every", 1, "--device", "cpu")
    assert ("resume", 3) in metrics(run, "event", "step")
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)


def test_finetuning_starts_at_the_models_own_loss(data, tmp_path):
    train_here("shakespeare-char", *TINY, "--max-steps", 60, "--learning-rate", 1e-2)
    run = tmp_path / "log" / "shakespeare-char"
    train_here("finetune", "--init-from", run, "--data", "data/prose_char", "--max-steps", 4,
               "--device", "cpu", "--batch-tokens", 64, "--eval-every", 2)
    best = json.loads((run / "best.json").read_text())
    (step, first), *_ = metrics(tmp_path / "log" / "finetune", "step", "val_loss")
    assert step == 0 and first == pytest.approx(best["val_loss"], abs=1e-5)
    assert {rate for (rate,) in metrics(tmp_path / "log" / "finetune", "learning_rate")} <= {3e-5}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_keeps_the_parameters_names_and_the_losses(data, tmp_path, monkeypatch):
    compiled, plain = [], GPT.compile
    monkeypatch.setattr(GPT, "compile", lambda model: compiled.append(model) or plain(model))
    train_here("shakespeare-char", *TINY, "--dropout", 0, "--name", "plain")
    train_here("shakespeare-char", *TINY, "--dropout", 0, "--name", "compiled", "--compile", "on")
    assert_same_run(tmp_path / "log" / "plain", tmp_path / "log" / "compiled", tolerance=1e-4)
    assert len(compiled) == 1 and compiled[0]._compiled_call_impl is not None


def test_bfloat16_autocast_trains_about_alike(data, tmp_path):
    train_here("shakespeare-char", *TINY, "--dropout", 0, "--name", "one")
    train_here("shakespeare-char", *TINY, "--dropout", 0, "--name", "two", "--dtype", "bfloat16")
    assert_same_run(tmp_path / "log" / "one", tmp_path / "log" / "two", tolerance=0.02)
    assert losses(tmp_path / "log" / "one") != losses(tmp_path / "log" / "two")
    assert all(
        weight.dtype == torch.float32 for weight in weights(tmp_path / "log" / "two").values()
    )


def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(data, tmp_path, capsys):
    train_here("shakespeare-char", *TINY, "--dry-run")
    said = capsys.readouterr().out
    assert "6 steps of 128 tokens" in said and "parameters" in said
    assert not (tmp_path / "log").exists()


def test_the_plan_of_gpt2_124m_needs_neither_gpu_nor_data(tmp_path, capsys):
    train_here("gpt2-124m", "--dry-run", "--gpu", "a100", "--nproc", 8, "--price", 1.8)
    said = capsys.readouterr().out
    assert (
        "124,475,904 parameters, on 8 x a100" in said
        and "9,999,745,024 tokens" in said
        and "no data in" in said
    )
    products, summing = (
        float(ms) for ms in re.search(r"(\d+) ms per step .* and (\d+) ms to sum", said).groups()
    )
    assert (
        300 <= products + summing <= 390
    )  # llm.c's and allenporter's steps on 8 x A100, as they publish them
    hours, price = (
        float(x) for x in re.search(r"([\d.]+) hours; cost ([\d.]+) at 1.8", said).groups()
    )
    assert hours == pytest.approx(19_073 * (products + summing) / 3.6e6, abs=0.06)
    assert price == pytest.approx(hours * 8 * 1.8, rel=0.05)
    kwh = float(re.search(r"([\d.]+) kWh", said)[1])
    assert kwh == pytest.approx(8 * 0.4 * hours, rel=0.05) and "kg CO2e" in said
    with pytest.raises(UserError, match="do not divide evenly among 7"):
        train_here("gpt2-124m", "--dry-run", "--gpu", "a100", "--nproc", 7)
    with pytest.raises(UserError, match="data sheet of 'abacus'"):
        train_here("gpt2-124m", "--dry-run", "--gpu", "abacus")


ONE_BATCH, MANY_ROWS = (16, GPTConfig(128, 65, 4, 4, 128)), (4, GPTConfig(256, 4096, 2, 4, 64))
FEW_ROWS = 2, GPTConfig(128, 8192, 4, 4, 256)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("B", "sizes", "bfloat16", "recompute"),
    [(*ONE_BATCH, False, False), (4, GPTConfig(256, 65, 4, 6, 192), False, False),
     (*FEW_ROWS, False, False), (*FEW_ROWS, True, False), (*MANY_ROWS, False, False),
     (*MANY_ROWS, True, False), (*ONE_BATCH, False, True), (*ONE_BATCH, True, True),
     (*MANY_ROWS, False, True), (*MANY_ROWS, True, True)],
)
def test_the_planned_memory_is_that_of_a_real_step(B, sizes, bfloat16, recompute, optimizer):
    gpt = GPT(sizes)
    gpt.recompute = recompute
    x = torch.randint(sizes.vocab_size, (B, sizes.block_size))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = gpt(x, x)[1]
        loss.backward()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())
    peak = max(itertools.accumulate(e.nbytes() for e in events))
    planned = plan.activation_bytes(gpt, B * sizes.block_size, bfloat16, recompute)
    assert planned == pytest.approx(peak, rel=0.25)
    optimizers = build_optimizers(gpt, optimizer, 0.1, (0.9, 0.95))
    for one in optimizers:
        one.step()
    kept = sum(
        t.nbytes
        for one in optimizers
        for state in one.state.values()
        for name, t in state.items()
        if name != "step"
    )
    assert kept == plan.optimizer_bytes(train.TrainConfig(optimizer=optimizer), gpt)


def test_the_plan_says_from_which_step_on_data_repeat(data, capsys):
    train_here("shakespeare-char", *TINY, "--max-steps", 10_000, "--dry-run")
    assert re.search(r"repeating from step \d+", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
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
    ],
)
def test_bad_input_gets_one_sentence(data, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        train_here(*arguments)


def test_the_sentence_goes_to_stderr_with_exit_code_2(command):
    done = command("train.py", "no-such-preset", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: Unknown preset 'no-such-preset'. The presets are: ")
        and done.stderr.count("\n") == 1
    )


def test_a_file_that_the_system_refuses_gets_a_sentence_too(command, data, tmp_path):
    (tmp_path / "log").touch()
    done = command("train.py", "shakespeare-char", *TINY, check=False)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: log")
        and done.stderr.count("\n") == 1
    )


# ----------------------------------------------------------------------------------------------------------------
# Optimizers


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"),
                    reason="torch 2.8 has no Muon to compare with")
def test_our_muon_takes_the_steps_of_torchs():
    torch.manual_seed(0)
    for shape in (32, 96), (64, 16):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        a = Muon([ours], lr=0.01, weight_decay=0.1)
        b = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            a.step()
            b.step()
        moved = (theirs - 1).norm()
        assert (ours - theirs).norm() < 0.02 * moved  # torch's works in bfloat16


@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (72, 24), (24, 24)])
def test_orthogonalizing_by_small_matrices_is_five_newton_schulz_steps(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -4, shape[1], dtype=torch.float64)
    )
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    torch.testing.assert_close(orthogonalize(matrix), x)
    torch.testing.assert_close(orthogonalize(matrix.float()), x.float(), atol=2e-3, rtol=2e-3)


def test_only_matrices_decay_and_every_parameter_has_one_optimizer():
    model = GPT(GPTConfig(8, 16, 2, 2, 8))
    for name in "adamw", "muon":
        groups = [
            group
            for optimizer in build_optimizers(model, name, 0.1, (0.9, 0.95))
            for group in optimizer.param_groups
        ]
        assert all(
            (p.dim() == 2) == (group["weight_decay"] == 0.1)
            for group in groups
            for p in group["params"]
        )
        assert sorted(map(id, model.parameters())) == sorted(
            id(p) for group in groups for p in group["params"]
        )


def test_wsd_stays_and_then_falls_in_a_straight_line():
    rates = [
        learning_rate(step, peak=1.0, schedule="wsd", warmup_steps=10, max_steps=100, min_ratio=0.1)
        for step in range(101)
    ]
    assert rates[9] == 1 and set(rates[10:80]) == {1.0}
    assert rates[90] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)


def test_a_run_of_wsd_may_be_made_longer_or_ended_sooner_until_its_rate_falls(data, tmp_path,
                                                                              monkeypatch):
    wsd = ["shakespeare-char", *TINY, "--schedule", "wsd", "--optimizer", "muon"]
    train_here(*wsd, "--max-steps", 10, "--name", "whole")

    def interrupted_step(run, x, y, step, train_step=train.train_step):
        if step == 5 and run.config.max_steps == 1000:
            raise KeyboardInterrupt
        return train_step(run, x, y, step)

    monkeypatch.setattr(train, "train_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        train_here(*wsd, "--max-steps", 1000, "--name", "sooner")
    train_here(*wsd, "--max-steps", 10, "--name", "sooner")
    assert_same_run(tmp_path / "log" / "sooner", tmp_path / "log" / "whole", tolerance=0,
                    last_step=10)
    with pytest.raises(UserError, match="was started with max_steps 10, and this command has"):
        train_here(*wsd, "--max-steps", 1000, "--name", "sooner")


def test_a_recipe_changes_a_presets_defaults_and_an_option_changes_the_recipes(data, tmp_path):
    for run, options in ("fast", ()), ("slower", ("--learning-rate", 1e-4, "--optimizer", "adamw")):
        train_here("shakespeare-char", *TINY, "--recipe=fast", "--name", run, *options)
    fast, slower = (
        json.loads((tmp_path / "log" / run / "config.json").read_text())
        for run in ("fast", "slower")
    )
    assert (fast["optimizer"], fast["embedding_rate"]) == ("muon", 4)
    assert fast["learning_rate"] > 1e-3 and fast["max_steps"] == 6  # the option's
    assert (slower["optimizer"], slower["learning_rate"], slower["embedding_rate"]) == ("adamw",
                                                                                        1e-4, 4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_embeddings_have_a_rate_of_their_own(name):
    model = GPT(GPTConfig(8, 16, 2, 2, 8))
    optimizers = build_optimizers(model, name, 0.1, (0.9, 0.95), embedding_rate=4.0)
    set_learning_rate(optimizers, 0.5)
    rates = {
        id(p): group["lr"]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    embeddings = model.transformer.wte.weight, model.transformer.wpe.weight
    assert {rates.pop(id(p)) for p in embeddings} == {2.0} and set(rates.values()) == {0.5}


def test_a_run_that_began_before_an_option_was_there_goes_on(data, monkeypatch):
    command = "shakespeare-char", *TINY, "--name", "older"
    train_here(*command)
    whole = checkpoint.saved_config
    monkeypatch.setattr(
        checkpoint, "saved_config",
        lambda *of: {name: value for name, value in whole(*of).items() if name != "embedding_rate"})
    train_here(*command)
    with pytest.raises(UserError,
                       match=r"was started with embedding_rate 1\.0, and this command has 2\.0"):
        train_here(*command, "--embedding-rate", 2)


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    options = {"peak": 1.0, "warmup_steps": 10, "max_steps": 100, "min_ratio": 0.1}
    rates = [learning_rate(step, schedule="cosine", **options) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(99, schedule="constant", **options) == 1.0


# ----------------------------------------------------------------------------------------------------------------
# Naming a model


@pytest.fixture
def run(tmp_path):
    """log/run with two checkpoints, of which the first is the best."""
    run = tmp_path / "log" / "run"
    run.mkdir(parents=True)
    tokenizer = CharTokenizer("\n abc")
    for step, val_loss in (1, 1.5), (2, 2.5):
        checkpoint.save(run, step, tiny_gpt(vocab_size=8, seed=step), {"a": torch.ones(2)},
                        tokenizer, {}, val_loss)
    return run


def test_a_run_means_its_best_model_and_nothing_means_the_newest_run(run):
    for name in run, "log/run", None, run / "model_00001.pt":
        assert checkpoint.load_model(name)[2]["step"] == 1
    assert checkpoint.load_model(run / "model_00002.pt")[2]["val_loss"] == 2.5


def test_the_best_model_outlives_the_newer_ones(run):
    for step in 3, 4:
        checkpoint.save(run, step, tiny_gpt(vocab_size=8), {}, CharTokenizer("\n abc"), {}, 2.0)
    assert sorted(path.name for path in run.glob("*_0*")) == [
        "model_00001.pt", "model_00003.pt", "model_00004.pt", "state_00003", "state_00004"]
    assert checkpoint.load_model(run)[2]["step"] == 1


def test_pruning_spares_the_checkpoint_just_written_whatever_else_lies_there(run):
    for damaged in 20, 22:
        (run / f"state_{damaged:05d}").mkdir()
    (run / "model_of_mine.pt").touch()
    (run / "best.json").write_text("{")
    assert checkpoint.newest(run) == 2 and checkpoint.load_model(run)[2]["step"] == 2
    checkpoint.save(run, 3, tiny_gpt(vocab_size=8), {}, CharTokenizer("\n abc"), {}, 2.0)
    assert checkpoint.saved_steps(run) == [2, 3] and checkpoint.newest(run) == 3
    assert checkpoint.load_model(run)[2]["step"] == 3 and (run / "model_of_mine.pt").exists()


def test_an_export_never_lands_in_a_run(run):
    with pytest.raises(UserError, match="holds a run"):
        publish.export("bundled:shakespeare", run)
    assert checkpoint.load_model(run)[2]["step"] == 1


def test_a_diverged_run_says_so(data, tmp_path):
    with pytest.raises(UserError, match="has diverged"):
        train_here("shakespeare-char", *TINY, "--learning-rate", "1e30")


def test_an_exported_model_writes_what_the_run_writes(run, tmp_path):
    publish.export(str(run), tmp_path / "exported", "float32")
    texts = [
        Engine(*checkpoint.load_model(name)[:2]).generate("abc", max_new_tokens=50, seed=3)
        for name in (run, tmp_path / "exported", tmp_path / "exported" / "model.safetensors")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_an_id_of_the_hub_is_downloaded_in_the_layout_that_gpt2_has_there(command, web, tmp_path):
    model, folder = tiny_gpt(vocab_size=50257), tmp_path / "hub"
    save_huggingface(folder, model, load_tokenizer("gpt2"))
    state = load_file(folder / "model.safetensors")
    bare = {
        name.removeprefix("transformer."): w for name, w in state.items()
    }  # as the gpt2 of the Hub names them
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(bare, folder / "model.safetensors")
    files, commit = {path.name: path.read_bytes() for path in folder.iterdir()}, "0" * 40
    tree = [
        {"type": "file", "oid": "", "size": len(content), "path": name}
        for name, content in files.items()
    ]
    address = web(
        {
            "/api/models/gpt2/revision/main": json.dumps({"id": "gpt2", "sha": commit}).encode(),
            f"/api/models/gpt2/tree/{commit}?recursive=true&expand=false": json.dumps(
                tree
            ).encode(),
            **{f"/gpt2/resolve/{commit}/{name}": content for name, content in files.items()},
        }
    )
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"),
                   "HF_HUB_OFFLINE": "0"}
    command_line = ("generate.py", "-m", "gpt2", "-p", "Hello", "--temperature", 0,
                    "--max-new-tokens", 5)
    text = (
        "Hello"
        + Engine(*checkpoint.load_model(folder)[:2]).generate("Hello", temperature=0,
                                                              max_new_tokens=5)[0]
    )
    assert command(*command_line, environment=environment).stdout == text + "\n"
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert command(*command_line, environment=offline).stdout == text + "\n"  # now from the cache
    done = command("generate.py", "-m", "nobody/nothing", "-p", "x", environment=environment,
                   check=False)
    assert (
        done.returncode == 2
        and "Hub has no model of that name" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_nothing_is_unpickled_freely(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "it_ran").touch, ()

    torch.save({"format": 1, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "it_ran").exists()


def test_what_is_no_model_gets_one_sentence(run, tmp_path):
    whole = (run / "model_00001.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    saved = torch.load(run / "model_00001.pt", weights_only=True)
    torch.save({**saved, "config": {**saved["config"], "n_layer": 1}}, tmp_path / "misfit.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only" / "config.json").write_text("{}")
    (tmp_path / "text.md").write_text("hello")
    torch.save({**saved, "config": ["n_layer"]}, tmp_path / "list.pt")
    for name, sentence in (
            ("cut.pt", "is damaged"), ("text.pt", "is damaged, or is not a checkpoint"),
            ("empty.pt", "not a checkpoint"), ("other.pt", "not a checkpoint of this program"),
            ("misfit.pt", "do not fit"), ("list.pt", "do not fit"),
            ("folder", "has no config.json"), ("config_only", "has no model.safetensors"),
            ("text.md", "is not a model"), ("nowhere.pt", "no file, folder or run"),
            ("bundled:nothing", "no bundled model")):
        with pytest.raises(UserError, match=sentence):
            checkpoint.load_model(name)


def test_a_folder_whose_weights_do_not_fit_gets_one_sentence(tmp_path):
    save_huggingface(tmp_path, tiny_gpt(vocab_size=8), CharTokenizer("\n abc"))
    config = json.loads((tmp_path / "config.json").read_text())
    for change, sentence in (
            ({"n_layer": 3}, "do not fit"), ({"n_embd": "16"}, "must be an integer"),
            ({"model_type": "llama"}, "llama"),
            ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=sentence):
            checkpoint.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights_file = tmp_path / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_model(tmp_path)


def test_validation_is_scored_over_the_tokenizers_ids_alone(data, tmp_path):
    loader = DataLoader("data/prose_char", "val", 1, 16)
    model, vocab_size = (tiny_gpt(vocab_size=64),
                         load_tokenizer(read_manifest("data/prose_char")["tokenizer"]).vocab_size)
    x, y = loader.read(range(loader.sequences))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(x)[0][..., :vocab_size].flatten(0, 1),
                                                     y.flatten()).item()
    for micro_batch in 1, 3, 1000:  # the last is more than there is
        config = train.TrainConfig(block_size=16, micro_batch=micro_batch)
        measured = train.evaluate(model, loader, vocab_size, config,
                                  World(0, 1, torch.device("cpu")))
        assert measured == pytest.approx(expected, abs=1e-5)


def test_validation_is_the_same_sequences_for_any_world(data, monkeypatch):
    loader, read = DataLoader("data/prose_char", "val", 1, 16), []
    monkeypatch.setattr(loader, "tokens", lambda sequences,
                        tokens=loader.tokens: (read.extend(sequences), tokens(sequences))[1])
    monkeypatch.setattr(
        train.ddp, "sum_over_ranks", lambda world, total, count: (total, count or 1)
    )  # each rank alone
    for size in 1, 2, 3, 64:
        read.clear()
        for rank in range(size):
            config = train.TrainConfig(block_size=16, micro_batch=2, eval_tokens=20 * 16)
            train.evaluate(tiny_gpt(vocab_size=64), loader, 32, config,
                           World(rank, size, torch.device("cpu")))
        assert sorted(read) == list(range(20))
