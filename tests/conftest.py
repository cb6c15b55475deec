"""Fixtures and helpers that the tests share."""
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
import tokenizers
import torch
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect, sync_playwright

import ddp
import train
from engine.scheduler import Scheduler
from generate import Engine
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer, byte_level_bpe, load_tokenizer

ROOT = Path(__file__).parent.parent
REVISION = "a" * 40
PROSE = ("The fox went out on a chilly night,\n"
         "and prayed for the moon to give him light;\n"
         "for he had many a mile to go that night\n"
         "before he reached the town-o.\n") * 40

# options of train.py for a run that takes a second
TINY = ["--data", "data/prose_char", "--n-layer", "1", "--n-head", "2", "--n-embd", "16",
        "--block-size", "16", "--batch-tokens", "128", "--micro-batch", "4", "--max-steps", "6",
        "--warmup-steps", "2", "--eval-every", "2", "--save-every", "2", "--sample-every", "6",
        "--log-every", "1", "--device", "cpu", "--dtype", "float32"]


# --------------------------------------------------------------------------------------------------
# Running programs

@pytest.fixture(autouse=True)
def isolated_folder(tmp_path, monkeypatch):
    """Runs every test in an empty folder, with one thread and without the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(ddp, "auto_dtype", lambda device: torch.float32)  # on any CPU
    torch.set_num_threads(1)


@pytest.fixture
def command(tmp_path):
    """Runs a program in its own process: command("train.py", "--help") -> CompletedProcess."""
    def run(program, *arguments, check=True, launcher=(), environment=(), typed=""):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8",
                       **dict(environment)}
        done = subprocess.run(
            [sys.executable, *launcher, ROOT / program, *map(str, arguments)], cwd=tmp_path,
            input=typed, encoding="utf-8", capture_output=True, timeout=300, env=environment,
            check=False)
        assert not check or done.returncode == 0, done.stderr
        return done
    return run


@pytest.fixture
def prose(tmp_path):
    """A text file."""
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def train_here(*arguments):
    """Runs `python train.py …` within the test's process."""
    train.main([str(argument) for argument in arguments])


# --------------------------------------------------------------------------------------------------
# Reading a run's files

def metrics(run, *names):
    """The values of `names`, for each line of metrics.jsonl that has all of them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines
            if all(name in line for name in names)]


def weights(run, step=6):
    return torch.load(run / f"model_{step:05d}.pt", weights_only=True)["model"]


def losses(run) -> dict:
    """(step, name) -> loss, without the steps that a resume repeats."""
    result = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # incomplete: the process died while writing it
            continue
        if line.get("event") == "resume":
            result = {key: loss for key, loss in result.items() if key[0] <= line["step"]}
        for name in "train_loss", "val_loss":
            if name in line:
                result[line["step"], name] = line[name]
    return result


def assert_same_run(run, expected, tolerance, last_step=6):
    """Checks losses at every step and the weights at the last one."""
    assert losses(run) == pytest.approx(losses(expected), abs=tolerance)
    trained_steps = {step for step, name in losses(run) if name == "train_loss"}
    assert trained_steps == set(range(1, last_step + 1))
    expected_weights = weights(expected, last_step)
    for name, w in weights(run, last_step).items():
        torch.testing.assert_close(w, expected_weights[name], atol=tolerance, rtol=0, msg=name)


# --------------------------------------------------------------------------------------------------
# Small models and tokenizers

def tiny_gpt(vocab_size=32, block_size=16, seed=0, **sizes):
    """A small model with weights far from zero, so that its predictions differ between tokens."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, **sizes}
    model = GPT(GPTConfig(block_size, vocab_size, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def small_bpe() -> BPETokenizer:
    """A byte-level BPE with 300 ids that the `tokenizers` library trained; <|endoftext|> is 0."""
    bpe = byte_level_bpe({}, [])
    bpe.train_from_iterator([PROSE], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return BPETokenizer(bpe.to_str())


@pytest.fixture
def char_engine():
    tokenizer = CharTokenizer("\n ,.abcdefghijklmnopqrstuvwxyz")
    return Engine(tiny_gpt(vocab_size=32), tokenizer)


@pytest.fixture
def gpt2_engine():
    return Engine(tiny_gpt(vocab_size=50304), load_tokenizer("gpt2"))


# --------------------------------------------------------------------------------------------------
# Servers on this machine

@pytest.fixture
def start_server():
    """Starts an HTTP server: start_server(handler class) -> its address."""
    servers = []

    def start(handler) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture
def hub(start_server):
    """Serves a dataset as the Hub does: hub("user/name", {"path": bytes}) -> its address."""
    def serve(repository: str, files: dict[str, bytes]) -> str:
        api = f"/api/datasets/{repository}"
        resolve = f"/datasets/{repository}/resolve/"

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = urllib.parse.unquote(self.path.partition("?")[0])
                if path == api or path.startswith(f"{api}/revision/"):
                    siblings = [{"rfilename": name} for name in files]
                    self.send_json({"id": repository, "sha": REVISION, "siblings": siblings})
                elif path.startswith(f"{api}/tree/"):
                    folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
                    self.send_json(self.tree(folder, "recursive=true" in self.path))
                elif path.startswith(resolve):
                    self.send(files.get(path.removeprefix(resolve).partition("/")[2]))
                else:
                    self.send(None)

            do_HEAD = do_GET

            def tree(self, folder: str, recursive: bool) -> list[dict]:
                """The files and folders in a folder."""
                prefix = f"{folder}/" if folder else ""
                inside = [name for name in files if name.startswith(prefix)]
                listed = [name for name in inside if recursive or "/" not in name[len(prefix):]]
                folders = {prefix + name[len(prefix):].partition("/")[0]
                           for name in inside if name not in listed}
                oid = "0" * 40
                return ([{"type": "file", "path": name, "size": len(files[name]), "oid": oid}
                         for name in listed]
                        + [{"type": "directory", "path": name, "size": 0, "oid": oid}
                           for name in folders])

            def send_json(self, content):
                self.send(json.dumps(content).encode())

            def send(self, content: bytes | None):
                """Sends the content, or the part of it that the request's Range names."""
                part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                size = len(content or b"")
                if part and content:
                    start = int(part[1])
                    stop = min(int(part[2] or size), size - 1) + 1
                    content = content[start:stop]
                self.send_response(404 if content is None else 206 if part else 200)
                if part and content:
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
                self.send_header("Content-Length", str(len(content or b"")))
                self.send_header("X-Repo-Commit", REVISION)
                self.send_header("X-Error-Code", "EntryNotFound" if content is None else "")
                self.send_header("ETag", '"0"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content or b"")

            def log_message(self, *_):
                pass

        return start_server(Handler)

    return serve


@pytest.fixture
def web(start_server):
    """Serves files: web({"/path": bytes}) -> the server's address."""
    def serve(files: dict[str, bytes]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = files.get(self.path)
                requested = self.headers.get("Range", "bytes=0-")
                start = int(re.fullmatch(r"bytes=(\d+)-.*", requested)[1])
                rest = (content or b"")[start:]
                self.send_response(404 if content is None else 206 if start else 200)
                if start:
                    last = len(content) - 1
                    self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
                self.send_header("Content-Length", str(len(rest)))
                # the headers of the Hugging Face Hub
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("X-Error-Code", "RepoNotFound" if content is None else "")
                self.send_header("ETag", hashlib.sha256(content or b"").hexdigest())
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(rest)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        return start_server(Handler)

    return serve


@pytest.fixture(scope="module")
def chromium():
    """The browser in which the tests open the page; they are skipped if there is none."""
    expect.set_options(timeout=30_000)  # for busy machines
    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), None)
        try:
            browser = playwright.chromium.launch(
                executable_path=path, args=["--no-sandbox", "--disable-background-networking"])
        except PlaywrightError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no Chromium to open the page with: {error}")
        yield browser
        browser.close()


@pytest.fixture
def slow_model(monkeypatch):
    """Texts take at least 50 ms per token, on any machine, until the test sets this event."""
    full_speed, step = threading.Event(), Scheduler.step

    def slow_step(self):
        full_speed.wait(0.05)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slow_step)
    return full_speed
