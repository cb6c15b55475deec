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
from playwright.sync_api import sync_playwright

import train
from generate import Engine
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer, byte_level_bpe, load_tokenizer

ROOT = Path(__file__).parent.parent
REVISION = "a" * 40
PROSE = ("The fox went out on a chilly night,\nand prayed for the moon to give him light;\n"
         "for he had many a mile to go that night\nbefore he reached the town-o.\n") * 40


TINY = ["--data", "data/prose_char", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16",
        "--batch-tokens", "128", "--micro-batch", "4", "--max-steps", "6", "--warmup-steps", "2", "--eval-every", "2",
        "--save-every", "2", "--sample-every", "6", "--log-every", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in a folder of its own, where data/ and log/ are empty, on one thread, without the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)


@pytest.fixture
def command(tmp_path):
    """Runs one of the programs as a person does: command("train.py", "--help") -> the finished process."""
    def run(program, *arguments, check=True, launcher=(), environment=(), typed=""):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **dict(environment)}
        done = subprocess.run([sys.executable, *launcher, ROOT / program, *map(str, arguments)], cwd=tmp_path, input=typed,
                              encoding="utf-8", capture_output=True, timeout=300, env=environment, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done
    return run


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def train_here(*arguments):
    """What `python train.py …` does, without a process of its own."""
    train.main([str(argument) for argument in arguments])


def metrics(run, *names):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines if all(name in line for name in names)]


def weights(run, step=6):
    return torch.load(run / f"model_{step:05d}.pt", weights_only=True)["model"]


def losses(run) -> dict:
    """(step, name) -> loss as the contract has readers see it: what a resume went back behind is dropped."""
    seen = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # torn while being written
            continue
        if said.get("event") == "resume":
            seen = {key: loss for key, loss in seen.items() if key[0] <= said["step"]}
        seen |= {(said["step"], name): said[name] for name in ("train_loss", "val_loss") if name in said}
    return seen


def assert_same_run(one, other, tolerance, last_step=6):
    assert losses(one) == pytest.approx(losses(other), abs=tolerance)
    assert {step for step, name in losses(one) if name == "train_loss"} == set(range(1, last_step + 1))
    for name, weight in weights(one, last_step).items():
        torch.testing.assert_close(weight, weights(other, last_step)[name], atol=tolerance, rtol=0, msg=name)


def tiny_gpt(vocab_size=32, block_size=16, seed=0, **sizes):
    """A small model with weights far from zero, so that its predictions differ from token to token."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, **{"n_layer": 2, "n_head": 2, "n_embd": 16, **sizes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def small_bpe() -> BPETokenizer:
    """A byte-level BPE of 300 ids, `<|endoftext|>` the first, as the `tokenizers` library trains it."""
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


@pytest.fixture
def on_loopback():
    """Starts a server: on_loopback(handler class) -> its address."""
    servers = []

    def start(handler) -> str:
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture
def hub(on_loopback):
    """A dataset of the Hugging Face Hub on loopback: hub("user/name", {"path": bytes}) -> the endpoint's address."""
    def serve(repository: str, files: dict[str, bytes]) -> str:
        api, resolve = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = urllib.parse.unquote(self.path.partition("?")[0])
                if path == api or path.startswith(f"{api}/revision/"):
                    self.send_json({"id": repository, "sha": REVISION, "siblings": [{"rfilename": name} for name in files]})
                elif path.startswith(f"{api}/tree/"):
                    folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
                    prefix = f"{folder}/" if folder else ""
                    inside = [name for name in files if name.startswith(prefix)]
                    here = [name for name in inside if "recursive=true" in self.path or "/" not in name[len(prefix):]]
                    folders = {prefix + name[len(prefix):].partition("/")[0] for name in inside if name not in here}
                    self.send_json([{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in here]
                                   + [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders])
                elif path.startswith(resolve):
                    self.send(files.get(path.removeprefix(resolve).partition("/")[2]))
                else:
                    self.send(None)

            do_HEAD = do_GET

            def send_json(self, content):
                self.send(json.dumps(content).encode())

            def send(self, content: bytes | None):
                part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                whole = len(content or b"")
                if part and content:
                    start, stop = int(part[1]), min(int(part[2] or whole), whole - 1) + 1
                    content = content[start:stop]
                self.send_response(404 if content is None else 206 if part else 200)
                if part and content:
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{whole}")
                self.send_header("Content-Length", str(len(content or b"")))
                self.send_header("X-Repo-Commit", REVISION)
                self.send_header("X-Error-Code", "EntryNotFound" if content is None else "")
                self.send_header("ETag", '"0"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content or b"")

            def log_message(self, *_):
                pass

        return on_loopback(Handler)

    return serve


@pytest.fixture
def web(on_loopback):
    """Serves files on loopback: web({"/path": bytes}) -> the server's address."""
    def serve(files: dict[str, bytes]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = files.get(self.path)
                start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])
                rest = (content or b"")[start:]
                self.send_response(404 if content is None else 206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(rest)))
                self.send_header("X-Repo-Commit", "0" * 40)  # these three are the Hugging Face Hub's
                self.send_header("X-Error-Code", "RepoNotFound" if content is None else "")
                self.send_header("ETag", hashlib.sha256(content or b"").hexdigest())
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(rest)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        return on_loopback(Handler)

    return serve


@pytest.fixture(scope="module")
def chromium():
    """The browser that the page's tests open."""
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-background-networking"])
        except PlaywrightError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no Chromium to open the page with: {error}")
        yield browser
        browser.close()
