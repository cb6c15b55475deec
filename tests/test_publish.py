import base64
import http.server
import json
import re
import socket

import pytest
import torch
import yaml
from conftest import small_bpe, tiny_gpt
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import checkpoint
import publish
from common.errors import UserError
from generate import Engine
from tokenizer import CharTokenizer, load_tokenizer
from weights.huggingface import save_huggingface

LETTERS = CharTokenizer("\n ,.abcdefghijklmnopqrstuvwxyz")


def save_run(run, tokenizer, **sizes):
    """A run folder with one checkpoint and its measurements, as train.py leaves it."""
    run.mkdir(parents=True)
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size + 7, block_size=64, **sizes)
    checkpoint.save(run, 20, gpt, {"step": torch.zeros(1)}, tokenizer, {}, 2.5)
    (run / "config.json").write_text(json.dumps({
        "batch_tokens": 1000, "data": "data/x", "learning_rate": 6e-4,
        "corpus": {"source": {"name": "someone/texts:part", "revision": "c0ffee"}, "documents": 12, "tokens": 34_567}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
        {"time": 0, "event": "start", "step": 0, "device": "NVIDIA H100 80GB HBM3", "processes": 2},
        {"time": 10, "step": 10, "train_loss": 3.0, "tokens_per_s": 500},
        {"time": 3600, "step": 20, "val_loss": 2.5, "hellaswag": 0.25})))
    (run / "samples.jsonl").write_text(json.dumps({"time": 1, "step": 20, "prompt": "\n", "text": "\nthe fox"}) + "\n")
    return gpt


@pytest.mark.parametrize("tokenizer", [load_tokenizer("gpt2"), small_bpe(), LETTERS], ids=["gpt2", "bpe", "char"])
def test_transformers_opens_an_export_and_writes_what_we_do(tokenizer, tmp_path):
    gpt = save_run(tmp_path / "log" / "r", tokenizer)
    publish.export("log/r", tmp_path / "out", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the fox went out"
    ids = torch.tensor([tokenizer.encode(text)])
    assert their_tokenizer(text)["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(theirs(ids).logits, gpt(ids)[0][..., :tokenizer.vocab_size], atol=1e-4, rtol=0)
    write = pipeline("text-generation", model=str(tmp_path / "out"))
    ours = Engine(*checkpoint.load_model(tmp_path / "out")[:2]).generate(text, temperature=0, max_new_tokens=40)[0]
    assert write(text, max_new_tokens=40, do_sample=False)[0]["generated_text"] == text + ours
    sampled = write(text, max_new_tokens=20, do_sample=True, temperature=0.8, top_k=20, top_p=0.95)[0]["generated_text"]
    assert sampled.startswith(text) and len(sampled) > len(text)
    assert write("the fox")[0]["generated_text"].startswith("the fox"), "what transformers does by itself stays in the context"
    exec(re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1], {})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_ctx"] == 64 and config["bos_token_id"] == config["eos_token_id"] == tokenizer.eot
    assert config["vocab_size"] == tokenizer.vocab_size and (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_card_says_how_a_model_was_made_and_what_came_of_it(tmp_path):
    save_run(tmp_path / "log" / "r", LETTERS)
    publish.export("log/r", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["pipeline_tag"] == "text-generation" and metadata["datasets"] == ["someone/texts"]
    measured = {result["metrics"][0]["type"]: result["metrics"][0]["value"] for result in metadata["model-index"][0]["results"]}
    assert measured == {"cross_entropy_nats_per_token": 2.5, "acc_norm": 0.25}
    for said in ("| energy | 1.4 kWh", "2 x NVIDIA H100", '"learning_rate": 0.0006', "revision `c0ffee`",
                 "12 documents. 34,567 tokens.", "    the fox", "![loss](loss.png)", "![hellaswag](hellaswag.png)", "## Limits"):
        assert said in text
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    info = checkpoint.load_model(tmp_path / "out")[2]  # all of it goes with the model
    assert (info["step"], info["val_loss"], info["train_config"]["learning_rate"]) == (20, 2.5, 6e-4)
    publish.export(str(tmp_path / "out"), tmp_path / "again")
    assert '"learning_rate": 0.0006' in (tmp_path / "again" / "README.md").read_text()


def test_a_card_that_somebody_wrote_stays_and_our_own_is_written_again(tmp_path, capsys):
    save_run(tmp_path / "log" / "r", LETTERS)
    publish.export("log/r", tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    own = card.read_text()
    card.write_text(own.replace("## Limits", "## Limitations"))
    publish.export("log/r", tmp_path / "out")
    assert card.read_text() == own
    card.write_text("# Mine\n")
    publish.export("log/r", tmp_path / "out")
    assert card.read_text() == "# Mine\n" and "written by hand" in capsys.readouterr().out


def test_gguf_is_written_for_byte_level_bpes_and_refused_in_a_sentence_for_the_rest(tmp_path):
    save_run(tmp_path / "log" / "bpe", small_bpe(), n_embd=64)
    for dtype in "float32", "float16", "bfloat16", "q8_0":
        publish.export("log/bpe", tmp_path / "out", to="gguf", dtype=dtype)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sizes["model-float32.gguf"] > sizes["model-float16.gguf"] == sizes["model-bfloat16.gguf"] > sizes["model-q8_0.gguf"]
    with pytest.raises(UserError, match="byte-level BPE"):
        publish.export("bundled:shakespeare", tmp_path / "char", to="gguf")
    with pytest.raises(UserError, match="no q8_0"):
        publish.export("log/bpe", tmp_path / "out", dtype="q8_0")
    state = torch.load("log/bpe/model_00020.pt")
    torch.save({**state, "config": state["config"] | {"activation": "gelu"}}, tmp_path / "exact.pt")
    with pytest.raises(UserError, match="the exact one"):
        publish.export(str(tmp_path / "exact.pt"), tmp_path / "out", to="gguf")


# ----------------------------------------------------------------------------------------------------------------
# Uploading, on a stand-in for the Hub

@pytest.fixture
def sent(start_server):
    """(the address of a Hub that takes everything, what it was sent: file by file, and the repository's settings)."""
    files, settings = {}, {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != "Bearer hf_right":
                return self.answer({"error": "Invalid username or password."}, 401)
            if self.path == "/api/repos/create":
                settings.update(json.loads(body))
                return self.answer({"url": f"http://{self.headers['Host']}/me/fox"})
            if "/preupload/" in self.path:
                return self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                              for file in json.loads(body)["files"]]})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer({"commitUrl": f"http://{self.headers['Host']}/me/fox/commit/1", "commitOid": "1" * 40})
            return self.answer({"warnings": [], "errors": []})  # of the card's metadata

        def do_GET(self):
            card = files.get("card there", b"")
            self.send_response(200 if card else 404)
            for name, value in (("X-Error-Code", "" if card else "EntryNotFound"), ("X-Repo-Commit", "0" * 40), ("ETag", '"1"'),
                                ("Content-Length", str(len(card)))):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(card)

        do_HEAD = do_GET

        def answer(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    return start_server(Handler), files, settings


def test_an_upload_is_a_rehearsal_until_it_is_pushed(command, sent, tmp_path):
    address, files, settings = sent
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_right"}
    shown = command("publish.py", "upload", "bundled:shakespeare", "me/fox", environment=environment).stdout
    assert "model.safetensors" in shown and f"in total, for {address}/me/fox" in shown and "Nothing was sent" in shown and not files
    command("publish.py", "upload", "bundled:shakespeare", "me/fox", "--private", "--push", environment=environment)
    assert set(re.findall(r"bytes  (\S+\.\S+)", shown)) == set(files) and "private" in (settings.get("visibility"), *settings)
    (tmp_path / "there").mkdir()
    for name, content in files.items():
        (tmp_path / "there" / name).write_bytes(content)
    assert 'model="me/fox"' in files["README.md"].decode()
    text = [Engine(*checkpoint.load_model(name)[:2]).generate("ROMEO:", temperature=0, max_new_tokens=30)
            for name in ("bundled:shakespeare", tmp_path / "there")]
    assert text[0] == text[1]
    files["card there"] = b"# Mine\n"
    del files["README.md"]
    done = command("publish.py", "upload", "bundled:shakespeare", "me/fox", "--push", environment=environment)
    assert "written by hand" in done.stdout and "README.md" not in files
    for arguments, environment_, sentence in (
            (["me/fox", "--push"], {**environment, "HF_TOKEN": "hf_wrong"}, "upload to me/fox failed"),
            (["fox"], environment, "named user/name")):
        done = command("publish.py", "upload", "bundled:shakespeare", *arguments, environment=environment_, check=False)
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------
# Downloading

@pytest.fixture
def model_hub(start_server, tmp_path):
    """(address, cache, the places from which the weights were asked for) of a Hub with the 26 MB of me/fox, whose first
    download of the weights breaks off half way."""
    save_huggingface(tmp_path / "there", tiny_gpt(vocab_size=50304, n_embd=128), load_tokenizer("gpt2"), torch.float32)
    files, commit, asked = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}, "0" * 40, []
    tree = [{"type": "file", "oid": "", "size": len(content), "path": name} for name, content in files.items()]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            if path == "/api/models/me/fox/revision/main":
                content = json.dumps({"id": "me/fox", "sha": commit}).encode()
            elif path == f"/api/models/me/fox/tree/{commit}":
                content = json.dumps(tree).encode()
            else:
                content = files.get(path.removeprefix(f"/me/fox/resolve/{commit}/"))
            start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])
            self.send_response(404 if content is None else 206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = (content or b"")[start:]
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Error-Code", "" if content else "RepoNotFound")
            self.send_header("ETag", f'"{path.split("/")[-1]}"')
            self.end_headers()
            if self.command == "GET":
                weights = path.endswith("model.safetensors")
                if weights:
                    asked.append(start)
                self.wfile.write(content[:len(content) // 2] if weights and len(asked) == 1 else content)
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    return start_server(Handler), tmp_path / "hf", asked


def try_to_write(command, address, cache, name="me/fox", **options):
    return command("generate.py", "-m", name, "-p", "Hello", "--max-new-tokens", 3, "--seed", 1, check=False,
                   environment={"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}, **options)


def test_a_download_that_broke_off_goes_on_and_is_then_there_without_a_network(command, model_hub):
    address, cache, asked = model_hub
    done = try_to_write(command, address, cache)
    assert done.returncode == 0 and done.stdout.startswith("Hello")
    assert len(asked) == 2 and asked[1] > 0
    assert try_to_write(command, nobody_listens(), cache).stdout == done.stdout


def test_a_model_that_cannot_be_had_gets_one_sentence(command, model_hub):
    address, cache, _ = model_hub
    for name, there, sentence in (("me/wolf", address, "has no model of that name"),
                                  ("me/fox", nobody_listens(), "the Hub cannot be reached"),
                                  ("a/b/c", address, "not a valid id of a model")):
        done = try_to_write(command, there, cache, name)
        assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_disk_that_becomes_full_gets_one_sentence(command, model_hub):
    """A limit on the size of a file stands for it."""
    address, cache, asked = model_hub
    asked.append(0)  # no broken connection here
    done = try_to_write(command, address, cache, launcher=["-c", LIMITED])
    assert done.returncode == 2 and "became full" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert try_to_write(command, address, cache).returncode == 0


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (15_000_000, 15_000_000))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def nobody_listens() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"
