"""Kills of training and of preparation, full and read-only disks, a clock that jumps."""
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import PROSE, TINY, assert_same_run, fork, start_ranks, train_here
from faults import Soak

import checkpoint
import prepare
import publish
import report
from common.errors import UserError
from corpus import reader
from training import runlog

pytestmark = pytest.mark.soak

STEPS = 60
RUN = ["shakespeare-char", *TINY, "--dropout", "0", "--max-steps", STEPS, "--save-every", 5,
       "--eval-every", 3, "--sample-every", 4, "--wait-s", 30,
       "--batch-tokens", 192, "--micro-batch", 2]  # 12 sequences, for 1, 2 or 3 processes
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)


# --------------------------------------------------------------------------------------------------
# Training

def test_killed_training_resumes_on_other_numbers_of_processes(prose):
    """In steps, validation, samples and saves alike: the moment of a kill is random."""
    prepare.main(prepare.PrepareConfig(str(prose)))
    finish("warm-up", 1)
    started_at = time.monotonic()
    finish("whole", 1)
    duration = time.monotonic() - started_at
    with Soak() as soak:
        number = 0
        for _ in soak:
            name = f"killed{number}"
            number += 1
            while not is_complete(name):
                if soak.random.random() < 0.9:
                    kill_once(soak, name, soak.random.uniform(0, duration / 2))
                else:
                    finish(name, soak.random.randint(1, 3))
            assert_same_run(Path("log") / name, Path("log/whole"), 2e-3, STEPS)
            shutil.rmtree(Path("log") / name)
            soak.count("runs that were killed until complete", "losses and weights of a whole run")


def is_complete(name: str) -> bool:
    return STEPS in checkpoint.saved_steps(Path("log") / name)


def start(name: str, n: int) -> list:
    """Starts the run on n processes, as torchrun does."""
    for path in Path().glob("rank-*.txt"):
        path.unlink()
    return start_ranks(n, "train.py", *RUN, "--name", name)


def finish(name: str, n: int):
    ranks = start(name, n)
    for rank in ranks:
        rank.join(timeout=200)
    assert [rank.exitcode for rank in ranks] == [0] * n, Path("rank-0.txt").read_text()


def kill_once(soak: Soak, name: str, after_s: float):
    """Starts the run and signals a rank after some time; torchrun would then end the others."""
    n = soak.random.randint(1, 3)
    number = soak.random.choice(SIGNALS)
    ranks = start(name, n)
    ranks[0].join(timeout=after_s)
    victim = soak.random.choice(ranks)
    if victim.exitcode is not None:
        assert victim.exitcode == 0, Path("rank-0.txt").read_text()
        outcome = "had ended before the signal"
    elif number == signal.SIGSTOP:
        os.kill(victim.pid, signal.SIGSTOP)
        time.sleep(soak.random.uniform(0, 1))
        os.kill(victim.pid, signal.SIGCONT)
        outcome = "continued"
    else:
        os.kill(victim.pid, number)
        outcome = "ended, resumed later"
        if number == signal.SIGKILL:  # what torchrun does
            for rank in ranks:
                rank.terminate()
    for rank in ranks:
        rank.join(timeout=200)
        assert rank.exitcode is not None, "a rank hangs"
    for path in Path().glob("rank-*.txt"):
        output = path.read_text(errors="replace")
        assert "Traceback" not in output, output
    soak.count(f"{number.name} on {n} processes", outcome)


# --------------------------------------------------------------------------------------------------
# Preparation

def test_killed_preparation_continues_to_the_same_shards():
    documents = [PROSE[:17 * i] for i in range(1, 150)]
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    seconds = {}  # tokenizer -> the time of a whole preparation
    for tokenizer in "char", "bpe:300", "gpt2":
        for _ in range(2):  # the first one also waits for imports
            shutil.rmtree(f"whole {tokenizer}", ignore_errors=True)
            started_at = time.monotonic()
            process = fork(prepare_text, tokenizer, f"whole {tokenizer}")
            process.join()
            assert process.exitcode == 0
            seconds[tokenizer] = time.monotonic() - started_at
    with Soak() as soak:
        for _ in soak:
            tokenizer = soak.random.choice(list(seconds))
            kills = 0
            while True:
                process = fork(prepare_text, tokenizer, "killed")
                # a little later each time: on a busy machine, the start may take longer
                process.join(timeout=soak.random.uniform(0, seconds[tokenizer]) * 1.1**kills)
                if process.exitcode is not None:
                    assert process.exitcode == 0
                    break
                process.kill()
                process.join()
                kills += 1
            assert contents("killed") == contents(f"whole {tokenizer}")
            soak.count("SIGKILL of prepare.py", "the same shards after a restart", kills)
            shutil.rmtree("killed")


def prepare_text(tokenizer: str, out: str):
    # write small pieces from the start, so that most kills find something written
    prepare.SAMPLE_S = 0
    prepare.COMMIT_INTERVAL_S = 0
    reader.BLOCK_BYTES = 4000
    prepare.main(prepare.PrepareConfig("text.jsonl", tokenizer=tokenizer, out=Path(out),
                                       shard_tokens=5_000))


def contents(folder: str) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.npy")}


# --------------------------------------------------------------------------------------------------
# Disks and clocks

RESULTS = (".pt", ".safetensors", ".npy", ".open")  # suffixes of what the programs save


@pytest.fixture
def disk():
    """A tmpfs on disk/, to which disk("size=40k") gives other options."""
    path = Path("disk")
    path.mkdir()

    def mount(options: str):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path],
                              capture_output=True, check=False).returncode == 0

    if not mount("size=1m"):
        pytest.skip("no permission to mount a tmpfs")
    yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)
    subprocess.run(["umount", path], check=True)


def test_a_full_or_read_only_disk_gets_one_sentence_and_loses_nothing(prose, disk, monkeypatch):
    prepare.main(prepare.PrepareConfig(str(prose)))
    monkeypatch.setattr(checkpoint, "LOG", Path("disk/log"))
    programs = {
        "train.py": lambda: train_here(*RUN, "--max-steps", 6, "--name", "x", "--n-embd", 32),
        "prepare.py": lambda: prepare.main(prepare.PrepareConfig(
            str(prose), tokenizer="char", out=Path("disk/data"))),
        "publish.py": lambda: publish.export("bundled:shakespeare", Path("disk/model"))}
    # measure what each program needs: the most that is on the disk at once
    needs = {name: most_used(disk, program) for name, program in programs.items()}
    with Soak() as soak:
        for _ in soak:
            name = soak.random.choice(list(programs))
            read_only = soak.random.random() < 0.2
            size = int(needs[name] * soak.random.uniform(0.01, 1.3)) // 1024 + 4
            disk("ro,size=8m" if read_only else f"rw,size={size}k")
            outcome = "enough space"
            try:
                programs[name]()
            except (UserError, OSError) as error:
                assert isinstance(error, UserError) or error.filename, repr(error)
                saved = any(path.suffix in RESULTS for path in Path("disk").rglob("*"))
                when = "after a part was saved" if saved else "before anything was saved"
                outcome = f"one sentence {when}, and completed once there was space"
            disk("rw,size=16m")
            left = [path for path in Path("disk").rglob("*.tmp")]
            assert read_only or not left, left
            programs[name]()
            empty(Path("disk"))
            soak.count(f"{'read-only' if read_only else 'full'} disk under {name}", outcome)


def most_used(disk, program) -> int:
    """The most bytes that a program has on the disk at once, measured every millisecond."""
    disk("rw,size=16m")
    used = []
    done = threading.Event()

    def measure():
        while not done.wait(0.001):
            used.append(shutil.disk_usage("disk").used)

    thread = threading.Thread(target=measure)
    thread.start()
    program()
    done.set()
    thread.join()
    empty(Path("disk"))
    return max(used)


def empty(folder: Path):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_clock_that_jumps_changes_no_result(prose, monkeypatch):
    prepare.main(prepare.PrepareConfig(str(prose)))
    train_here(*RUN, "--max-steps", 6, "--name", "whole")
    clock = time.time
    with Soak() as soak:
        monkeypatch.setattr(runlog.time, "time",
                            lambda: clock() + soak.random.uniform(-1e6, 1e6))
        for _ in soak:
            train_here(*RUN, "--max-steps", 6, "--name", "jumped")
            assert_same_run(Path("log/jumped"), Path("log/whole"), 0)
            assert not report.summary("log/jumped")["time"].startswith("-")
            lines = (Path("log/jumped") / "metrics.jsonl").read_text().splitlines()
            assert all(json.loads(line) for line in lines)
            shutil.rmtree("log/jumped")
            soak.count("a clock that jumps by days at each line of the log", "the same run",
                       len(lines))


