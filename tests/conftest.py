"""Fixtures and helpers that the tests share."""
import contextlib
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import tokenizers
import torch
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect, sync_playwright

import checkpoint
import ddp
import train
from engine.scheduler import Scheduler
from generate import Engine
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer, byte_level_bpe, load_tokenizer
from weights.huggingface import save_huggingface

# a shell starts a job in the background with SIGINT ignored, which all programs would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
REVISION = "a" * 40
PROSE = ("The fox went out on a chilly night,\n"
         "and prayed for the moon to give him light;\n"
         "for he had many a mile to go that night\n"
         "before he reached the town-o.\n") * 40
MARKUP = "<img src=x onerror=window.hacked=1>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}")

# options of train.py for a run that takes a second
TINY = ["--data", "data/prose_char", "--n-layer", "1", "--n-head", "2", "--n-embd", "16",
        "--block-size", "16", "--batch-tokens", "128", "--micro-batch", "4", "--max-steps", "6",
        "--warmup-steps", "2", "--eval-every", "2", "--save-every", "2", "--sample-every", "6",
        "--log-every", "1", "--device", "cpu", "--dtype", "float32"]

# what torchrun tells a process
RANK_VARIABLES = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"


def pytest_collection_modifyitems(items):
    """Starts with the slowest test, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.name != "test_the_notebook_runs_and_its_claims_hold")


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
def command_here(monkeypatch):
    """Does what `command` does within the test's process, which saves the time of the imports."""
    def run(program, *arguments, check=True, environment=(), typed=""):
        line = [str(ROOT / program), *map(str, arguments)]
        stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        exit_code = 0
        with monkeypatch.context() as patch:
            for name, value in dict(environment).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", line)
            patch.setattr(sys, "stdin", io.StringIO(typed))
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                try:
                    runpy.run_path(line[0], run_name="__main__")
                except SystemExit as end:
                    exit_code = end.code or 0
        stdout.seek(0)
        stderr.seek(0)
        done = subprocess.CompletedProcess(line, exit_code, stdout.read(), stderr.read())
        assert not check or exit_code == 0, done.stderr
        return done
    return run


def fork(function, *arguments) -> multiprocessing.Process:
    """Starts `function(*arguments)` in a process that saves the time of the imports.

    It is forked from a server that has imported torch and our modules but computed nothing. The
    server must not import pyarrow, which starts a thread, nor huggingface_hub, which reads the
    environment only once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "conftest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    process = context.Process(target=function, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        # where the server finds these modules: before Python 3.12, it does not know sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        process.start()
    return process


def run_program(line: list[str], environment: dict[str, str], outputs: list, prepare=None):
    """Does what `python line…` does. For `fork`.

    Appends stdout and stderr to the two files `outputs`, and calls `prepare` first.
    """
    os.environ |= environment
    for number, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    if prepare:
        prepare()
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")


def limit_files(limit: int):
    """Makes writing fail in files of more than `limit` bytes, as if the disk were full."""
    import resource  # noqa: PLC0415 (not on Windows)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.fixture
def command_forked(tmp_path):
    """Does what `command` does in a process that saves the time of the imports."""
    def run(program, *arguments, check=True, environment=(), prepare=None):
        line = [str(ROOT / program), *map(str, arguments)]
        outputs = [tmp_path / "stdout.txt", tmp_path / "stderr.txt"]
        process = fork(run_program, line, dict(environment), outputs, prepare)
        process.join(timeout=300)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in outputs)
        for path in outputs:
            path.unlink()
        assert not check or process.exitcode == 0, stderr
        return subprocess.CompletedProcess(line, process.exitcode, stdout, stderr)
    return run


def start_ranks(n: int, program: str, *arguments, prepare=None) -> list[multiprocessing.Process]:
    """Does what `torchrun --nproc_per_node=n program …` does, without its start-up time.

    Calls `prepare` in each rank first. The output of rank i is in rank-i.txt.
    """
    line = [str(ROOT / program), *map(str, arguments)]
    port = free_port()
    ranks = []
    for i in range(n):
        variables = zip(RANK_VARIABLES, (str(i), str(n), str(i), "127.0.0.1", str(port)))
        output = Path(f"rank-{i}.txt")
        output.unlink(missing_ok=True)
        ranks.append(fork(run_program, line, dict(variables), [output, output], prepare))
    return ranks


def run_ranks(n: int, program: str, *arguments, prepare=None) -> list[int]:
    """Starts the ranks, waits until they end and returns their exit codes."""
    ranks = start_ranks(n, program, *arguments, prepare=prepare)
    deadline = time.monotonic() + 120
    for process in ranks:
        process.join(timeout=max(0, deadline - time.monotonic()))
    return [process.exitcode for process in ranks]


def torchrun(n: int, *options: str) -> tuple[str, ...]:
    """torchrun's arguments for n processes. Without the --, it would take --run for --run-path."""
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *options, "--")


def wait_until(condition, process: subprocess.Popen | None = None, seconds=120):
    """Waits until `condition()` is true. Fails after some seconds, or if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.01)


@pytest.fixture
def prose(tmp_path):
    """A text file."""
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def train_here(*arguments):
    """Runs `python train.py …` within the test's process."""
    train.main([str(argument) for argument in arguments])


def write_hellaswag(path: Path):
    """Writes 11 examples in HellaSwag's format."""
    lines = []
    for i, verb in enumerate(PROSE.split()[:11]):
        lines.append(json.dumps({
            "activity_label": "fox", "ctx": f"The fox {verb}",
            "endings": ["out.", "town-o", "he", "a mile to go"], "label": i % 4}))
    path.write_text("\n".join(lines))


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


def small_bpe(text: str = PROSE, vocab_size: int = 300) -> BPETokenizer:
    """A byte-level BPE that the `tokenizers` library trained on the text; <|endoftext|> is 0."""
    bpe = byte_level_bpe({}, [])
    bpe.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
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

def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


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


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Serves the files that `find` finds, with the headers of the Hugging Face Hub."""
    error_code = "RepoNotFound"  # when there is no such file

    def find(self, path: str) -> bytes | None:
        raise NotImplementedError

    def do_GET(self):
        content = self.find(urllib.parse.unquote(self.path.partition("?")[0]))
        whole = content or b""
        start, stop = self.requested_range(len(whole))
        is_part = stop - start < len(whole)
        self.send_response(404 if content is None else 206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(whole)}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("X-Error-Code", self.error_code if content is None else "")
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.write(whole, start, stop)

    do_HEAD = do_GET

    def requested_range(self, size: int) -> tuple[int, int]:
        """The first byte to send, and the one after the last."""
        requested = self.headers.get("Range", "bytes=0-")
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", requested).groups()
        return int(first), min(int(last) + 1, size) if last else size

    def write(self, content: bytes, start: int, stop: int):
        self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def web(start_server):
    """Serves files: web({"/path": bytes}) -> the server's address."""
    def serve(files: dict[str, bytes]) -> str:
        class Handler(HubHandler):
            def find(self, path: str) -> bytes | None:
                return files.get(path)

        return start_server(Handler)

    return serve


def hub_model(name: str, folder: Path) -> dict[str, bytes]:
    """The Hub's pages about a model: path -> content."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tree = [{"type": "file", "oid": "", "size": len(content), "path": path}
            for path, content in files.items()]
    return {
        f"/api/models/{name}/revision/main": json.dumps({"id": name, "sha": REVISION}).encode(),
        f"/api/models/{name}/tree/{REVISION}": json.dumps(tree).encode(),
        **{f"/{name}/resolve/{REVISION}/{path}": content for path, content in files.items()}}


@pytest.fixture
def hub(start_server):
    """Serves a dataset as the Hub does: hub("user/name", {"path": bytes}) -> its address."""
    def serve(repository: str, files: dict[str, bytes]) -> str:
        api = f"/api/datasets/{repository}"
        resolve = f"/datasets/{repository}/resolve/"

        class Handler(HubHandler):
            error_code = "EntryNotFound"

            def find(self, path: str) -> bytes | None:
                if path == api or path.startswith(f"{api}/revision/"):
                    siblings = [{"rfilename": name} for name in files]
                    about = {"id": repository, "sha": REVISION, "siblings": siblings}
                    return json.dumps(about).encode()
                if path.startswith(f"{api}/tree/"):
                    folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
                    listed = list_folder(files, folder, "recursive=true" in self.path)
                    return json.dumps(listed).encode()
                if path.startswith(resolve):
                    return files.get(path.removeprefix(resolve).partition("/")[2])
                return None

        return start_server(Handler)

    return serve


def list_folder(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """The files and folders in a folder of a dataset, as the Hub lists them."""
    prefix = f"{folder}/" if folder else ""
    inside = [name for name in files if name.startswith(prefix)]
    listed = [name for name in inside if recursive or "/" not in name[len(prefix):]]
    folders = {prefix + name[len(prefix):].partition("/")[0]
               for name in inside if name not in listed}
    oid = "0" * 40
    return [
        *({"type": "file", "path": name, "size": len(files[name]), "oid": oid} for name in listed),
        *({"type": "directory", "path": name, "size": 0, "oid": oid} for name in folders)]


# --------------------------------------------------------------------------------------------------
# The page

@contextlib.contextmanager
def running_page():
    """Runs app.py on a free port; yields its address."""
    import app  # noqa: PLC0415 (slow, and needed by few tests)
    config = app.AppConfig(model="bundled:shakespeare", port=free_port())
    page = app.main(config, prevent_thread_lock=True, quiet=True)
    try:
        yield f"http://127.0.0.1:{config.port}/"
    finally:
        page.close()


@pytest.fixture(scope="module")
def client(url):
    """Calls the API of the module's page."""
    from gradio_client import Client  # noqa: PLC0415 (slow, and needed by few tests)
    return Client(url, verbose=False, max_workers=40, httpx_kwargs={"timeout": 60})


@pytest.fixture(scope="module")
def bundled_folder(tmp_path_factory):
    """The bundled models, and among them a tiny `chat` whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("bundled")
    for path in checkpoint.BUNDLED.iterdir():
        if path.name != "chat":
            (folder / path.name).symlink_to(path)
    tokenizer = small_bpe()
    tokenizer.chat_template = CHAT_TEMPLATE
    model = tiny_gpt(tokenizer.vocab_size, block_size=128)
    save_huggingface(folder / "chat", model, tokenizer, torch.float32)
    return folder


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A log with two runs: `bpe` with a byte-level BPE, `markup` with an alphabet for HTML."""
    log = tmp_path_factory.mktemp("runs") / "log"
    characters = CharTokenizer("".join(sorted(set(PROSE + MARKUP))))
    for name, tokenizer, block_size in ("bpe", small_bpe(), 16), ("markup", characters, 64):
        (log / name).mkdir(parents=True)
        model = tiny_gpt(tokenizer.vocab_size, block_size)
        checkpoint.save(log / name, 6, model, {}, tokenizer, {}, 1.0)
    return log


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
def new_window(chromium):
    """Opens an address in a new browser window: new_window(address, width=1280, height=900)."""
    contexts = []

    def open_it(address: str, width=1280, height=900, **events):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        for event, handler in events.items():
            page.on(event, handler)
        page.goto(address)
        return page

    yield open_it
    for context in contexts:
        context.close()


def go_to(page, tab: str):
    """Opens a tab of the page."""
    expect(page.get_by_role("tab", name="Write")).to_be_visible()
    button = page.get_by_role("tab", name=tab, exact=True)
    if not button.is_visible():  # on a phone it is in a menu
        page.get_by_label("More tabs").first.click()  # Look inside has tabs of its own
        button = page.locator(".overflow-dropdown").get_by_text(tab, exact=True)
    button.click()


def assert_markup_stays_text(page):
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("window.hacked") is None


@pytest.fixture
def slow_model(monkeypatch):
    """Texts take at least 50 ms per token, on any machine, until the test sets this event."""
    full_speed, step = threading.Event(), Scheduler.step

    def slow_step(self):
        full_speed.wait(0.05)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slow_step)
    return full_speed
