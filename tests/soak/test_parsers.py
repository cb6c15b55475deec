"""Damaged and hostile files and command lines: one sentence or a correct result, never a traceback.

An input is a valid file with random bytes changed, cut out, repeated or put in, or a pickle that
calls a function. The project writes GGUF and reads none, so there is no parser of it to try.
"""
import contextlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from conftest import PROSE, small_bpe, tiny_gpt
from faults import Soak
from hypothesis import strategies as st
from pydantic import ValidationError

import checkpoint
import generate
import hellaswag
import prepare
import shards
import train
from api import schema
from common.errors import UserError
from tokenizer import CharTokenizer, load_tokenizer
from weights.huggingface import save_huggingface

pytestmark = pytest.mark.soak


def mutate(content: bytes, source: random.Random) -> bytes:
    """The content with a few random changes, most of them small."""
    changed = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 5, 20))):
        at = source.randrange(len(changed) + 1)
        size = source.choice((1, 1, 2, 4, 8, 100))
        kind = source.randrange(5)
        if kind == 0:
            changed[at:at + size] = source.randbytes(len(changed[at:at + size]))
        elif kind == 1:
            del changed[at:at + size]
        elif kind == 2:
            changed[at:at] = changed[at:at + size]
        elif kind == 3:
            changed[at:at] = source.choice((b"0", b"-1", b"1e999", b"null", b"[", b'"', b"\\ud800",
                                            b"{}", b"9" * 30, b"\0\0\0\0", b"\xff\xff\xff\x7f"))
        else:
            del changed[at if at else 1:]
    return bytes(changed)


def read_start(folder: str):
    stream = shards.Shards(folder, "train")
    stream.read(0, min(9, len(stream)))


@pytest.fixture
def files() -> dict:
    """name -> (the file to damage, the function that reads it).

    Where a checksum covers the weights, the function also checks that they are what was saved.
    """
    gpt, bpe = tiny_gpt(vocab_size=300), small_bpe()
    saved = {name: w.clone() for name, w in gpt.state_dict().items()}

    def read_weights(path: str):
        loaded = checkpoint.load_model(path)[0].state_dict()
        assert all(torch.equal(loaded[name], w) for name, w in saved.items())

    save_huggingface("hf", gpt, bpe, torch.float32)
    save_huggingface("plain", gpt, bpe, torch.float32)  # without a checksum, as others write it
    from safetensors.torch import load_file, save_file  # noqa: PLC0415
    save_file(load_file("plain/model.safetensors"), "plain/model.safetensors")
    shutil.copytree("hf", "config")
    for folder in "bpe", "char", "meta", "run", "bins":
        Path(folder).mkdir()
    bpe.save(Path("bpe"))
    CharTokenizer("\n abc").save(Path("char"))
    letters = dict(enumerate("\n abc"))
    Path("meta/meta.pkl").write_bytes(pickle.dumps(
        {"vocab_size": 5, "itos": letters, "stoi": {c: i for i, c in letters.items()}}))
    checkpoint.save(Path("run"), 1, gpt, {"a": torch.ones(2)}, bpe, {}, 1.5)
    shutil.copy("run/model_00001.pt", "lone.pt")
    Path("prose.txt").write_text(PROSE)
    prepare.main(prepare.PrepareConfig("prose.txt"))
    data = Path("data/prose_char")
    shutil.copytree(data, "manifests")
    for split in "train", "val":
        np.arange(2000, dtype=np.uint16).tofile(f"bins/{split}.bin")
    Path("h.jsonl").write_text(json.dumps({"activity_label": "a", "ctx": "b", "label": 1,
                                           "endings": ["c", "d"]}) + "\n")
    return {
        "tokenizer.json": ("bpe/tokenizer.json", lambda: load_tokenizer(Path("bpe")).encode("abc")),
        "character tokenizer": ("char/tokenizer.json",
                                lambda: load_tokenizer(Path("char")).decode([1, 2])),
        "nanoGPT's meta.pkl": ("meta/meta.pkl", lambda: load_tokenizer(Path("meta")).decode([1])),
        ".pt checkpoint": ("lone.pt", lambda: read_weights("lone.pt")),
        "state of a run": ("run/state_00001/state.json", lambda: checkpoint.newest(Path("run"))),
        "best.json of a run": ("run/best.json", lambda: read_weights("run")),
        "safetensors with a checksum": ("hf/model.safetensors", lambda: read_weights("hf")),
        "safetensors of others": ("plain/model.safetensors",
                                  lambda: checkpoint.load_model("plain")),
        "config.json of a model": ("config/config.json", lambda: checkpoint.load_model("config")),
        "manifest": ("manifests/manifest.json", lambda: shards.Shards("manifests", "train")),
        ".npy shard": ("data/prose_char/prose_train_000001.npy",
                       lambda: read_start("data/prose_char")),
        ".bin shard": ("bins/train.bin", lambda: read_start("bins")),
        "HellaSwag's examples": ("h.jsonl", lambda: hellaswag.read_examples(Path("h.jsonl"))),
    }


def test_damaged_files_get_one_sentence_or_are_read_correctly(files):
    originals = {path: Path(path).read_bytes() for path, _ in files.values()}
    with Soak() as soak:
        names = list(files)
        for i, _ in enumerate(soak):
            name = names[i % len(names)]
            path, read = files[name]
            Path(path).write_bytes(mutate(originals[path], soak.random))
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    read()
                outcome = "still valid"
            except UserError:
                outcome = "one sentence"
            except Exception as error:
                error.add_note(f"the {name} is {Path(path).absolute()}")
                raise
            Path(path).write_bytes(originals[path])
            soak.count(f"damage in a {name}", outcome)


class Call:
    """A pickle of this calls a function when it is read without restrictions."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_malicious_pickles_run_no_code(files):
    saved = torch.load("lone.pt")
    trap = Path("ran").absolute()
    write = f"open({str(trap)!r}, 'w')"
    calls = [(os.system, f"touch {trap}"), (open, str(trap), "w"), (exec, write), (eval, write),
             (subprocess.check_output, ["touch", str(trap)]), (os.mkdir, str(trap)),
             (trap.touch,)]
    with Soak() as soak:
        for _ in soak:
            call = Call(*soak.random.choice(calls))
            key = soak.random.choice(list(saved))
            content = soak.random.choice((
                call, [call], {"model": {"x": call}}, {**saved, key: call}, {**saved, "x": call},
                {**saved, "model": {**saved["model"], "y": call}}, (1, call)))
            try:
                if soak.random.random() < 0.5:
                    torch.save(content, "bad.pt")
                    checkpoint.load_model("bad.pt")
                else:
                    Path("meta/meta.pkl").write_bytes(pickle.dumps(
                        content, protocol=soak.random.randint(0, 5)))
                    load_tokenizer(Path("meta"))
                outcome = "loaded without the call"
            except UserError:
                outcome = "refused, nothing ran"
            assert not trap.exists()
            soak.count("a malicious pickle", outcome)


# --------------------------------------------------------------------------------------------------
# Requests and command lines, made by hypothesis

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4), max_leaves=8)


def fuzz(soak: Soak, strategy, check):
    """Calls check(value) with values that hypothesis makes, until the time of the test is over."""
    for _ in soak:
        @hypothesis.seed(soak.random.getrandbits(32))
        @hypothesis.settings(max_examples=200, deadline=None, database=None,
                             suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(strategy)
        def run(value):
            check(value)
        run()


def read_body(kind: type[schema.GenerationRequest], content: bytes) -> str:
    """Reads a body as serve.py does. Returns the outcome."""
    try:
        request = kind.model_validate_json(content)
        generate.Sampling(**request.sampling())
        if kind is schema.ChatRequest:
            [message.plain() for message in request.messages]
        else:
            request.prompts()
        return "a request"
    except (UserError, ValidationError) as error:
        assert schema.error_answer(error).status_code == 400
        return "refused with a sentence"


def test_random_bodies_get_an_error_of_four_hundred_or_a_request():
    fields = list(schema.CompletionRequest.model_fields)
    names = st.sampled_from(fields) | st.sampled_from(fields) | st.text(max_size=8)
    values = st.none() | st.integers(-2, 3) | st.floats(-1, 2) | st.text(max_size=3) | ANYTHING
    bodies = st.dictionaries(names, values, max_size=4).map(
        lambda body: {"model": "m", "prompt": "x", **body})
    with Soak() as soak:
        def check(body):
            content = json.dumps(body).encode()
            outcome = read_body(schema.CompletionRequest, content)
            soak.count("a random body of the API", outcome)
        fuzz(soak, bodies, check)


def test_damaged_bodies_get_an_error_of_four_hundred_or_a_request():
    common = {"model": "m", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "n": 2,
              "repetition_penalty": 1.1, "stop": ["a", "b"], "seed": 1, "stream": True,
              "stream_options": {"include_usage": True}, "min_p": 0, "user": "u"}
    message = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    bodies = [
        (schema.CompletionRequest, {**common, "prompt": "hello", "logprobs": 2, "echo": True}),
        (schema.CompletionRequest, {"model": "m", "prompt": [[1, 2], [3]]}),
        (schema.CompletionRequest, {"model": "m", "prompt": "hello"}),
        (schema.ChatRequest, {**common, "messages": [message], "logprobs": True}),
        (schema.ChatRequest, {"model": "m", "messages": [message]})]
    bodies = [(kind, json.dumps(body).encode()) for kind, body in bodies]
    with Soak() as soak:
        for _ in soak:
            kind, body = soak.random.choice(bodies)
            soak.count("a damaged body of the API", read_body(kind, mutate(body, soak.random)))


def test_command_lines_get_a_usage_error_or_one_sentence():
    """Of train.py, whose parser is the largest: no option starts anything without data."""
    options = ["--data", "--name", "--max-steps", "--seed", "--n-layer", "--batch-tokens",
               "--dtype", "--dry-run", "--resume", "--init-from", "--optimizer", "--micro-batch",
               "--run", "-x", "gpt2-124m", "shakespeare-char", "--wait-s", "--gpu", "--price"]
    values = st.sampled_from([*options, "0", "-1", "1e9", "nan", "auto", "none", "nowhere", ""])
    with Soak() as soak:
        def check(arguments):
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                try:
                    train.main(arguments)
                    outcome = "a plan"
                except UserError:
                    outcome = "one sentence"
                except SystemExit as error:
                    assert error.code in (0, 2)
                    outcome = "the parser's own error"
            soak.count("a random command line", outcome)
        fuzz(soak, st.lists(values | st.text(max_size=6), max_size=6), check)
