"""Exports, model cards, uploads and downloads."""
import base64
import functools
import json
import re

import pytest
import torch
import yaml
from conftest import HubHandler, free_port, hub_model, limit_files, small_bpe, tiny_gpt
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import checkpoint
import publish
from common.errors import UserError
from generate import Engine
from tokenizer import CharTokenizer, load_tokenizer
from weights.huggingface import save_huggingface

LETTERS = CharTokenizer("\n ,.abcdefghijklmnopqrstuvwxyz")


def save_run(run, tokenizer, **sizes):
    """Writes a run folder with one checkpoint and its measurements, as train.py does."""
    run.mkdir(parents=True)
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size + 7, block_size=64, **sizes)
    checkpoint.save(run, 20, gpt, {"step": torch.zeros(1)}, tokenizer, {}, 2.5)
    source = {"name": "someone/texts:part", "revision": "c0ffee"}
    (run / "config.json").write_text(json.dumps({
        "batch_tokens": 1000, "data": "data/x", "learning_rate": 6e-4,
        "corpus": {"source": source, "documents": 12, "tokens": 34_567}}))
    device = {"device": "NVIDIA H100 80GB HBM3", "processes": 2}
    lines = [{"time": 0, "event": "start", "step": 0, **device},
             {"time": 10, "step": 10, "train_loss": 3.0, "tokens_per_s": 500},
             {"time": 3600, "step": 20, "val_loss": 2.5, "hellaswag": 0.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"time": 1, "step": 20, "prompt": "\n", "text": "\nthe fox"}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return gpt


# --------------------------------------------------------------------------------------------------
# Exporting

@pytest.mark.parametrize("tokenizer", [load_tokenizer("gpt2"), small_bpe(), LETTERS],
                         ids=["gpt2", "bpe", "char"])
def test_transformers_opens_an_export_and_generates_what_we_do(tokenizer, tmp_path):
    gpt = save_run(tmp_path / "log" / "r", tokenizer)
    publish.export("log/r", tmp_path / "out", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # the same ids and logits
    text = "the fox went out"
    ids = torch.tensor([tokenizer.encode(text)])
    assert their_tokenizer(text)["input_ids"] == ids[0].tolist()
    logits = gpt(ids)[0][..., :tokenizer.vocab_size]
    torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=0)
    # the same text
    write = pipeline("text-generation", model=str(tmp_path / "out"))
    engine = Engine(*checkpoint.load_model(tmp_path / "out")[:2])
    ours = engine.generate(text, temperature=0, max_new_tokens=40)[0]
    greedy = write(text, max_new_tokens=40, do_sample=False)[0]["generated_text"]
    assert greedy == text + ours
    sampled = write(text, max_new_tokens=20, do_sample=True, temperature=0.8, top_k=20,
                    top_p=0.95)[0]["generated_text"]
    assert sampled.startswith(text) and len(sampled) > len(text)
    # transformers' own defaults stay within the context
    assert write("the fox")[0]["generated_text"].startswith("the fox")
    # the card's example runs
    readme = (tmp_path / "out" / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], {})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == tokenizer.eot
    assert config["n_ctx"] == 64 and config["vocab_size"] == tokenizer.vocab_size
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("tokenizer", [
    pytest.param(load_tokenizer("gpt2"), marks=pytest.mark.slow), small_bpe()], ids=["gpt2", "bpe"])
def test_an_export_has_the_chat_template_that_it_is_given_and_later_exports_keep_it(
        tokenizer, tmp_path):
    save_run(tmp_path / "log" / "r", tokenizer)
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n" \
               "{% endfor %}\n"
    (tmp_path / "chat.jinja").write_text(template)
    publish.export("log/r", tmp_path / "plain")
    publish.export("log/r", tmp_path / "chat", chat_template=tmp_path / "chat.jinja")
    publish.export(str(tmp_path / "chat"), tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "chat").chat_template == template
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == template
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    assert checkpoint.load_model("log/r")[1].chat_template is None


def test_a_chat_template_that_is_not_there_gets_one_sentence(command_here):
    done = command_here("publish.py", "export", "bundled:shakespeare", "out", "--chat-template",
                        "nothing.jinja", check=False)
    assert done.returncode == 2
    assert done.stderr == "error: nothing.jinja: No such file or directory.\n"


def test_gguf_is_written_for_byte_level_bpes_and_refused_in_one_sentence_for_others(tmp_path):
    save_run(tmp_path / "log" / "bpe", small_bpe(), n_embd=64)
    for dtype in "float32", "float16", "bfloat16", "q8_0":
        publish.export("log/bpe", tmp_path / "out", to="gguf", dtype=dtype)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sizes["model-float32.gguf"] > sizes["model-float16.gguf"] > sizes["model-q8_0.gguf"]
    assert sizes["model-float16.gguf"] == sizes["model-bfloat16.gguf"]
    with pytest.raises(UserError, match="byte-level BPE"):
        publish.export("bundled:shakespeare", tmp_path / "char", to="gguf")
    with pytest.raises(UserError, match="no q8_0"):
        publish.export("log/bpe", tmp_path / "out", dtype="q8_0")
    state = torch.load("log/bpe/model_00020.pt")
    config = state["config"] | {"activation": "gelu"}
    torch.save({**state, "config": config}, tmp_path / "exact.pt")
    with pytest.raises(UserError, match="the exact one"):
        publish.export(str(tmp_path / "exact.pt"), tmp_path / "out", to="gguf")


# --------------------------------------------------------------------------------------------------
# The model card

def test_the_card_says_how_a_model_was_trained_and_with_what_results(tmp_path):
    save_run(tmp_path / "log" / "r", LETTERS)
    publish.export("log/r", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["datasets"] == ["someone/texts"]
    metrics = [result["metrics"][0] for result in metadata["model-index"][0]["results"]]
    values = {metric["type"]: metric["value"] for metric in metrics}
    assert values == {"cross_entropy_nats_per_token": 2.5, "acc_norm": 0.25}
    for part in ("| energy | 1.4 kWh", "2 x NVIDIA H100", '"learning_rate": 0.0006',
                 "revision `c0ffee`", "12 documents. 34,567 tokens.", "    the fox",
                 "![loss](loss.png)", "![hellaswag](hellaswag.png)", "## Limits"):
        assert part in text
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    # the folder keeps all of it, also for a second export
    info = checkpoint.load_model(tmp_path / "out")[2]
    assert info["train_config"]["learning_rate"] == 6e-4
    assert (info["step"], info["val_loss"]) == (20, 2.5)
    publish.export(str(tmp_path / "out"), tmp_path / "again")
    assert '"learning_rate": 0.0006' in (tmp_path / "again" / "README.md").read_text()


def test_a_card_written_by_hand_is_kept_and_our_own_is_overwritten(tmp_path, capsys):
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


# --------------------------------------------------------------------------------------------------
# Uploading, to a stand-in for the Hub

@pytest.fixture
def upload_hub(start_server):
    """(address, uploaded files by name, repository settings) of a Hub that accepts uploads."""
    files = {}
    settings = {}

    class Handler(HubHandler):
        error_code = "EntryNotFound"

        def do_POST(self):
            repository = f"http://{self.headers['Host']}/me/fox"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != "Bearer hf_right":
                return self.answer({"error": "Invalid username or password."}, 401)
            if self.path == "/api/repos/create":
                settings.update(json.loads(body))
                return self.answer({"url": repository})
            if "/preupload/" in self.path:
                return self.answer({"files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]]})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        files[line["value"]["path"]] = content
                return self.answer({"commitUrl": f"{repository}/commit/1", "commitOid": "1" * 40})
            return self.answer({"warnings": [], "errors": []})  # checks the card's metadata

        def find(self, path):
            return files.get("card on the hub")

        def answer(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return start_server(Handler), files, settings


def test_an_upload_sends_nothing_without_push(
        command, command_forked, command_here, upload_hub, tmp_path):
    address, files, settings = upload_hub
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
                   "HF_TOKEN": "hf_right"}

    def upload(*arguments, run=command_forked, **options):
        options = {"environment": environment, **options}
        return run("publish.py", "upload", "bundled:shakespeare", *arguments, **options)

    # without --push, the files are listed
    listing = upload("me/fox", run=command).stdout
    assert "model.safetensors" in listing and f"in total, for {address}/me/fox" in listing
    assert "Nothing was sent" in listing and not files

    # with it, they are sent
    upload("me/fox", "--private", "--push")
    assert set(re.findall(r"bytes  (\S+\.\S+)", listing)) == set(files)
    assert "private" in (settings.get("visibility"), *settings)
    assert 'model="me/fox"' in files["README.md"].decode()
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    for name, content in files.items():
        (uploaded / name).write_bytes(content)
    texts = []
    for name in "bundled:shakespeare", uploaded:
        engine = Engine(*checkpoint.load_model(name)[:2])
        texts.append(engine.generate("ROMEO:", temperature=0, max_new_tokens=30))
    assert texts[0] == texts[1]

    # a card written by hand is kept
    files["card on the hub"] = b"# Mine\n"
    del files["README.md"]
    done = upload("me/fox", "--push")
    assert "written by hand" in done.stdout and "README.md" not in files

    # errors
    wrong_token = {**environment, "HF_TOKEN": "hf_wrong"}
    refused = upload("me/fox", "--push", environment=wrong_token, check=False)
    misnamed = command_here("publish.py", "upload", "bundled:shakespeare", "fox", check=False)
    for done, sentence in ((refused, "upload to me/fox failed"), (misnamed, "named user/name")):
        assert done.returncode == 2 and sentence in done.stderr
        assert done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Downloading, from a stand-in for the Hub

@pytest.fixture
def download_hub(start_server, tmp_path):
    """(address, cache folder, offsets from which the weights were requested) of a Hub.

    It has the model me/fox of 26 MB, and closes the connection halfway through the first download
    of its weights.
    """
    folder = tmp_path / "on the hub"
    model = tiny_gpt(vocab_size=50304, n_embd=128)
    save_huggingface(folder, model, load_tokenizer("gpt2"), torch.float32)
    pages = hub_model("me/fox", folder)
    offsets = []

    class Handler(HubHandler):
        def find(self, path):
            return pages.get(path)

        def write(self, content, start, stop):
            if self.path.endswith("model.safetensors"):
                offsets.append(start)
                if len(offsets) == 1:
                    stop //= 2
            super().write(content, start, stop)

    return start_server(Handler), tmp_path / "hf", offsets


def generate_with(run, address, cache, name="me/fox", **options):
    """Runs generate.py with a model of the Hub at `address`."""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    return run("generate.py", "-m", name, "-p", "Hello", "--max-new-tokens", 3, "--seed", 1,
               check=False, environment=environment, **options)


def test_an_interrupted_download_resumes_and_later_needs_no_network(command_forked, download_hub):
    address, cache, offsets = download_hub
    done = generate_with(command_forked, address, cache)
    assert done.returncode == 0 and done.stdout.startswith("Hello")
    assert len(offsets) == 2 and offsets[1] > 0
    offline = generate_with(command_forked, f"http://127.0.0.1:{free_port()}", cache)
    assert offline.stdout == done.stdout


def test_a_model_that_cannot_be_downloaded_gets_one_sentence(command_forked, download_hub):
    address, cache, _ = download_hub
    for name, used_address, sentence in (
            ("me/wolf", address, "has no model of that name"),
            ("me/fox", f"http://127.0.0.1:{free_port()}", "the Hub cannot be reached"),
            ("a/b/c", address, "not a valid id of a model")):
        done = generate_with(command_forked, used_address, cache, name)
        assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_disk_that_becomes_full_gets_one_sentence(command_forked, download_hub):
    address, cache, offsets = download_hub
    offsets.append(0)  # this Hub does not close the connection
    done = generate_with(command_forked, address, cache,
                         prepare=functools.partial(limit_files, 15_000_000))
    assert done.returncode == 2 and "became full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert generate_with(command_forked, address, cache).returncode == 0
