"""The parsers of files and requests that the fuzzer tries: PARSERS, a table at the end.

Each is a function `prepare(patch)` that writes small valid files into the current folder. It
returns `attempt(source)`, which damages one of them with a random.Random, reads it as the programs
do, and returns the outcome. An attempt raises AssertionError if something wrong was read without an
error. `patch` is pytest's monkeypatch.
"""
import dataclasses
import gzip
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import torch
from conftest import small_bpe
from mutations import DEEP, damaged_json, dump_json, mutate, mutate_document
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import checkpoint
import generate
import hellaswag
import prepare
import report
import shards
import tokenizer as tokenizer_module
from api import schema
from common.errors import UserError
from common.files import write_json
from corpus import reader
from corpus.shard_writer import ShardWriter
from model import GPT, GPTConfig
from tokenizer import CharTokenizer, load_tokenizer
from training import optim, setup, sharding
from training.config import TrainConfig
from weights.huggingface import save_huggingface

TEXT = "The fox went out, and prayed for the moon.\n" * 3
LETTERS = "\n abc"
SIZES = {"block_size": 8, "vocab_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 8}
VALID = "still valid"


def tiny_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES)).eval()


def assert_same_weights(model: GPT, expected: dict):
    for name, w in model.state_dict().items():
        assert torch.equal(w, expected[name]), f"{name} was read without an error, but is wrong"


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore(folder: Path, files: dict[Path, bytes]):
    """Gives a folder's files their content again, and removes others."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in files:
            path.unlink()
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# --------------------------------------------------------------------------------------------------
# Tokenizers

# parts of other tokenizer.json files
TOKENIZER_PARTS = (
    "BPE", "WordLevel", "Unigram", "WordPiece", "ByteLevel", "Sequence", "Ġ", "Ġt", "a b",
    ["a", "b"],
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Replace", "pattern": {"String": "o"}, "content": ""},
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Fuse"},
    {"type": "Truncate", "max_length": 0, "stride": 9},
    {"id": 3, "content": "fox", "single_word": True, "lstrip": True, "rstrip": True,
     "normalized": True, "special": True})


def use(tokenizer, source: random.Random) -> str:
    """Reads and writes a text with a tokenizer whose files were damaged."""
    text, _ = tokenizer.replace_unknown(TEXT)
    ids = tokenizer.encode(text)
    tokenizer.decode(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert [array.tolist() for array in tokenizer.encode_batch([text])] == [ids]
    if source.random() < 0.1:
        assert load_tokenizer(tokenizer.to_dict()).encode(text) == ids
    return VALID


def share_tiktoken(patch):
    """Lets equal vocabularies share tiktoken's encoder, which takes longer than all the rest."""
    build, encoders = tokenizer_module.tiktoken_bpe, {}

    def tiktoken_bpe(ranks: dict):
        key = frozenset(ranks.items())
        if key not in encoders:
            if len(encoders) > 100:
                encoders.clear()
            encoders[key] = build(ranks)
        return encoders[key]

    patch.setattr(tokenizer_module, "tiktoken_bpe", tiktoken_bpe)


def bpe_json(patch):
    path = Path("tokenizer.json")
    content = small_bpe(TEXT, 260).description.encode()
    document = json.loads(content)
    content = json.dumps(document).encode()
    share_tiktoken(patch)

    def attempt(source):
        path.write_bytes(damaged_json(content, document, source, TOKENIZER_PARTS))
        return use(load_tokenizer(Path()), source)
    return attempt


def character_json(_patch):
    CharTokenizer(LETTERS).save(Path())
    path = Path("tokenizer.json")
    content = path.read_bytes()
    document = json.loads(content)
    content = json.dumps(document).encode()

    def attempt(source):
        path.write_bytes(damaged_json(content, document, source, TOKENIZER_PARTS))
        return use(load_tokenizer(Path()), source)
    return attempt


def vocab_and_merges(patch):
    """vocab.json, merges.txt, added_tokens.json, tokenizer_config.json, chat_template.jinja."""
    bpe = small_bpe(TEXT, 260)
    vocab = bpe.vocabulary()
    merges = tokenizer_module.format_merges(bpe.merges()).encode()
    added = {"<a>": len(vocab), "<b>": len(vocab) + 1}
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ messages }}"}
    documents = {"vocab.json": vocab, "added_tokens.json": added, "tokenizer_config.json": config}
    contents = {name: json.dumps(document).encode() for name, document in documents.items()}
    contents |= {"merges.txt": merges, "chat_template.jinja": b"{% for m in messages %}x"}
    for name, content in contents.items():
        Path(name).write_bytes(content)
    share_tiktoken(patch)

    def attempt(source):
        name = source.choice(list(contents))
        if name in documents:
            content = damaged_json(contents[name], documents[name], source)
        else:
            content = mutate(contents[name], source)
        Path(name).write_bytes(content)
        try:
            return use(load_tokenizer(Path()), source)
        finally:
            Path(name).write_bytes(contents[name])
    return attempt


def meta_pickle(_patch):
    """nanoGPT's meta.pkl."""
    characters = dict(enumerate(LETTERS))
    document = {"vocab_size": 5, "itos": characters, "stoi": {c: i for i, c in characters.items()}}
    contents = [pickle.dumps(document, protocol) for protocol in range(6)]
    path = Path("meta.pkl")

    def attempt(source):
        content = source.choice(contents)
        if source.random() < 0.7:
            content = mutate(content, source, PICKLE_SNIPPETS)
        else:
            content = pickle.dumps(mutate_document(document, source), source.randrange(6))
        path.write_bytes(content)
        return use(load_tokenizer(Path()), source)
    return attempt


# opcodes: memo entries, counted strings, calls, frames, and references to functions
HUGE = b"\xff\xff\xff\x7f"
PICKLE_SNIPPETS = (
    b"r\xff\xff\xff\x07", b"r" + HUGE, b"p99999999\n", b"j" + HUGE, b"h\x09", b"q\x09",
    b"B" + HUGE, b"X" + HUGE, b"T" + HUGE, b"\x8b" + HUGE, b"\x8e" + HUGE * 2, b"\x95" + HUGE * 2,
    b"\x8a\xff", b"cos\nsystem\n", b"cnt\n_\n", b"R", b"\x81", b"b", b"o", b"i", b"(", b"t", b"l",
    b"d", b"0", b"2", b"1", b"N", b"s", b"u", b"a", b"e", b"}", b"]", b")", b"\x85", b"\x8f",
    b"\x90", b"\x93", b"\x96", b"Q", b"P1\n", b".", b"I" + b"9" * 30 + b"\n", b"L1L\n", b"F1e999\n",
    b"S'a'\n", b"Vx\n", b"\x80\x63", b"\x82\x01", b"\x94")


# --------------------------------------------------------------------------------------------------
# Checkpoints

def pack(content) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def repack(archive: bytes, source: random.Random) -> bytes:
    """A `.pt` whose pickle is damaged, with correct checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = mutate(content, source, PICKLE_SNIPPETS)
            new.writestr(entry.filename, content)
    return buffer.getvalue()


def odd_tensors() -> list:
    return [torch.zeros(()), torch.zeros(0), torch.ones(8), torch.ones(5, 8), torch.ones(8).int(),
            torch.ones(8, dtype=torch.complex64), torch.ones(8).bool(), torch.ones(1).expand(24, 8),
            torch.ones(5, 8).to_sparse(), torch.full((8,), torch.nan), torch.ones(8).half(),
            torch.ones(8, requires_grad=True), torch.nn.Parameter(torch.ones(5, 8)),
            torch.empty(8, device="meta")]


def own_pt(_patch):
    gpt = tiny_gpt()
    content = {"format": 1, "config": dataclasses.asdict(gpt.config), "step": 1, "val_loss": 1.5,
               "tokenizer": CharTokenizer(LETTERS).to_dict(), "model": dict(gpt.state_dict())}
    archive = pack(content)
    odd = odd_tensors()
    path = Path("model.pt")

    def attempt(source):
        kind = source.random()
        if kind < 0.5:
            path.write_bytes(mutate(archive, source))
            assert_same_weights(checkpoint.load_model("model.pt")[0], content["model"])
            return VALID
        if kind < 0.75:
            path.write_bytes(repack(archive, source))
        else:
            path.write_bytes(pack(mutate_document(content, source, odd)))
        checkpoint.load_model("model.pt")
        return VALID
    return attempt


def foreign_pt(patch):
    """Checkpoints of nanoGPT and build-nanogpt."""
    Path("meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(LETTERS))}))
    state = dict(tiny_gpt().state_dict())
    program = types.ModuleType("train_gpt2")
    program.GPTConfig = dataclasses.make_dataclass("GPTConfig", SIZES)
    program.GPTConfig.__module__ = "train_gpt2"
    patch.setitem(sys.modules, "train_gpt2", program)
    documents = [
        {"model": {f"_orig_mod.{name}": w for name, w in state.items()}, "config": dict(SIZES),
         "step": 3, "val_loss": 3.1},
        {"model": state, "model_args": {**SIZES, "bias": True, "dropout": 0.2}, "iter_num": 5,
         "best_val_loss": torch.tensor(2.9), "config": {"dataset": "x"}, "optimizer": {}}]
    odd = odd_tensors()
    path = Path("ckpt.pt")

    def finish(document) -> bytes:
        """build-nanogpt pickles an object as its configuration."""
        if isinstance(document, dict) and "model_args" not in document:
            config = document.get("config")
            if isinstance(config, dict):
                instance = program.GPTConfig(**SIZES)
                instance.__dict__ = {str(name): value for name, value in config.items()}
                document = {**document, "config": instance}
        return pack(document)

    archives = [finish(document) for document in documents]

    def attempt(source):
        i = source.randrange(2)
        if source.random() < 0.4:
            path.write_bytes(repack(archives[i], source))
        else:
            path.write_bytes(finish(mutate_document(documents[i], source, odd)))
        checkpoint.load_model("ckpt.pt")
        return VALID
    return attempt


def damage(path: Path, content: bytes, source: random.Random):
    """Writes the damaged content into the file."""
    if path.suffix == ".json":
        content = damaged_json(content, json.loads(content), source)
    else:
        content = mutate(content, source)
    path.write_bytes(content)


def run_folder(_patch):
    """A run's state.json, optimizer.safetensors, model and best.json, read as a resume does."""
    run = Path("run")
    run.mkdir()
    config = TrainConfig(name="run", n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=5)
    checksums = {"data": "d", "data_sample": "s"}

    def new_parts():
        model = tiny_gpt()
        optimizers = optim.build_optimizers(model, "adamw", 0.1, (0.9, 0.95), 1.0)
        return model, optimizers, torch.amp.GradScaler("cpu")

    model, optimizers, scaler = new_parts()
    idx = torch.zeros(1, 8, dtype=torch.int64)
    model(idx, idx)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    fingerprint = setup.run_fingerprint(config, checksums, 1)
    checkpoint.save(run, 1, model, optim.named_state(model, optimizers),
                    CharTokenizer(LETTERS), fingerprint | {"grad_scaler": scaler.state_dict()}, 1.5)
    expected = {name: w.clone() for name, w in model.state_dict().items()}
    files = snapshot(run)
    parts = new_parts()

    def attempt(source):
        path = source.choice([*files, Path("run/state_00001/state.json")])
        damage(path, files[path], source)
        try:
            return read(path)
        finally:
            restore(run, files)

    def read(path):
        if path.name == "best.json":
            assert checkpoint.find_model("run") == Path("run/model_00001.pt")
            return VALID
        step = checkpoint.newest(run)
        if step is None:
            return "an older checkpoint"
        setup.load_checkpoint(run, step, config, checksums, *parts)
        assert_same_weights(parts[0], expected)
        return VALID
    return attempt


def sharded_run(_patch):
    """A state that holds the weights too, as training with --shard writes it for a large model."""
    gpt, run, state = tiny_gpt(), Path("run"), Path("run/state_00001")
    expected = dict(gpt.state_dict())
    run.mkdir()
    sharding.write_shards(state, sharding.named_weights(expected))
    write_json(state / "model.json", {
        "format": 1, "config": dataclasses.asdict(gpt.config), "step": 1, "val_loss": 1.5,
        "tokenizer": CharTokenizer(LETTERS).to_dict()})
    checksums = checkpoint.compute_checksums(state, Path("none"))
    write_json(state / "state.json", {"format": 1, "step": 1, "config": {}, "sha256": checksums})
    files = snapshot(run)

    def attempt(source):
        path = source.choice([*files, state / "model.json"])
        damage(path, files[path], source)
        try:
            assert_same_weights(checkpoint.load_model("run")[0], expected)
            return VALID
        finally:
            restore(run, files)
    return attempt


def huggingface_folder(_patch):
    """config.json and model.safetensors, with a checksum and as others write it."""
    gpt = tiny_gpt()
    expected = dict(gpt.state_dict())
    folder = Path("hf")
    save_huggingface(folder, gpt, CharTokenizer(LETTERS), torch.float32, step=3, val_loss=1.5)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    data = content[start:]
    config_path = folder / "config.json"
    config = config_path.read_bytes()
    # the same without a checksum, and the index of a model in several files
    weights = load_file(path)
    save_file(weights, "plain.safetensors")
    plain = Path("plain.safetensors").read_bytes()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    index_path = folder / "model.safetensors.index.json"
    dtypes = ("F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", [0, 0],
              [2**62, 4], [0, 2**40], {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})

    def attempt(source):
        kind = source.random()
        path.write_bytes(content)
        config_path.write_bytes(config)
        index_path.unlink(missing_ok=True)
        if kind < 0.25:  # the checksum covers the weights
            path.write_bytes(content[:start] + mutate(data, source))
            assert_same_weights(checkpoint.load_model("hf")[0], expected)
        elif kind < 0.4:
            path.write_bytes(mutate(source.choice((content, plain)), source))
        elif kind < 0.6:
            changed = dump_json(mutate_document(header, source, dtypes), source)
            size = len(changed) if source.random() < 0.95 else source.choice((0, 2**40, 2**63))
            path.write_bytes(struct.pack("<Q", size) + changed + data)
        elif kind < 0.8:
            config_path.write_bytes(damaged_json(config, json.loads(config), source))
        else:
            index_path.write_bytes(damaged_json(json.dumps(index).encode(), index, source))
        checkpoint.load_model("hf")
        return VALID
    return attempt


class Call:
    """A pickle of this calls a function when it is read without restrictions."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def malicious_pickle(_patch):
    """A checkpoint or a meta.pkl that would write a file."""
    saved = {"format": 1, "config": dict(SIZES), "step": 1, "val_loss": 1.5,
             "tokenizer": CharTokenizer(LETTERS).to_dict(), "model": dict(tiny_gpt().state_dict())}
    trap = Path("ran").absolute()
    write = f"open({str(trap)!r}, 'w')"
    calls = [(os.system, f"touch {trap}"), (open, str(trap), "w"), (exec, write), (eval, write),
             (subprocess.check_output, ["touch", str(trap)]), (os.mkdir, str(trap)),
             (trap.touch,)]

    def attempt(source):
        call = Call(*source.choice(calls))
        key = source.choice(list(saved))
        content = source.choice((
            call, [call], {"model": {"x": call}}, {**saved, key: call}, {**saved, "x": call},
            {**saved, "model": {**saved["model"], "y": call}}, (1, call)))
        try:
            if source.random() < 0.5:
                Path("bad.pt").write_bytes(pack(content))
                checkpoint.load_model("bad.pt")
            else:
                Path("meta.pkl").write_bytes(pickle.dumps(content, source.randrange(6)))
                load_tokenizer(Path())
            return VALID
        finally:
            assert not trap.exists(), "the call ran"
    return attempt


# --------------------------------------------------------------------------------------------------
# Data

def prepared_data(folder: str) -> Path:
    """A folder of two shards with 100 tokens each."""
    folder = Path(folder)
    tokens = np.arange(200) % len(LETTERS)
    with ShardWriter(folder, "x", CharTokenizer(LETTERS), {"name": "x", "revision": "r"},
                     shard_tokens=100) as writer:
        writer.append(tokens, np.array([0, 150]))
        writer.finish()
    return folder


def manifest(_patch):
    folder = prepared_data("data")
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    content = json.dumps(document).encode()
    values = ("val", "train", "x_val_000000.npy", "x_train_000001.npy", "manifest.json", "..")

    def attempt(source):
        path.write_bytes(damaged_json(content, document, source, values))
        stream = shards.Shards(folder, "train")
        stream.read(0, len(stream))
        shards.read_tokenizer(folder)
        setup.checksum_data(folder, shards.read_manifest(folder))
        shards.verify(folder)
        shards.info(folder)
        return VALID
    return attempt


def preparation(_patch):
    """progress.json and manifest.json, from which prepare.py resumes."""
    folder = Path("data")
    chars = CharTokenizer(LETTERS)
    tokens = np.arange(250) % len(LETTERS)
    Path("text.jsonl").write_text('{"text": "abc"}\n' * 9)

    def open_writer():
        return ShardWriter(folder, "x", chars, {"name": "x", "revision": "r"}, shard_tokens=100)

    with open_writer() as writer:
        writer.append(tokens, np.array([0, 150]))
        writer.commit((0, 2, 0))
    begun = snapshot(folder)
    with open_writer() as writer:
        writer.finish()
    finished = snapshot(folder)

    def attempt(source):
        files, name = source.choice([(begun, "progress.json"), (finished, "manifest.json")])
        restore(folder, files)
        path = folder / name
        path.write_bytes(damaged_json(files[path], json.loads(files[path]), source))
        with open_writer() as writer:
            if not writer.finished:
                for passage in reader.read(["text.jsonl"], writer.cursor):
                    ids = chars.encode_batch([passage.text])[0]
                    writer.append(ids, np.array([0]), passage.split)
                    writer.commit(passage.cursor)
                writer.finish()
        prepare.print_summary(folder, 1)
        return VALID
    return attempt


def npy_header(source: random.Random) -> bytes:
    """A header of a .npy file with values of other arrays."""
    descr = source.choice(("'<u2'", "'<u4'", "'>u2'", "'<f4'", "'|O'", "'<u8'", "'|V0'", "'<U1'",
                           "[('a', '<u2')]", "'<m8[Y]'", "''", "'" + "u" * 300 + "'", "None", "3",
                           "(" * 300, "-" * 9000, "{" * 99 + "}" * 99, "b'\\xff'", "'<u2', 'x': 1"))
    shape = source.choice(("(100,)", "(50, 2)", "()", "(0,)", "(-1,)", "(-100, -1)", "(2**63,)",
                           f"({2**63},)", f"({2**62}, 4)", f"({10**30},)", "(100.0,)", "(True,)",
                           "100", "[100]", "None", "(" + "1," * 64 + ")", "(100,) * 9", "('a',)"))
    order = source.choice(("False", "True", "None", "1"))
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    if source.random() < 0.3:
        header = mutate(header, source)
    version = source.choice((1, 1, 1, 2, 3, 0, 255))
    size = len(header) if source.random() < 0.9 else source.choice((0, 2**15, 2**16 - 1))
    length = struct.pack("<H" if version == 1 else "<I", size)
    return b"\x93NUMPY" + bytes((version, 0)) + length + header


def npy_shard(_patch):
    """Shards of ours, where `verify` must find any change, and of build-nanogpt."""
    folder, plain = prepared_data("data"), prepared_data("plain")
    (plain / "manifest.json").unlink()
    CharTokenizer(LETTERS).save(Path())
    name = "x_train_000001.npy"
    content = (folder / name).read_bytes()
    archive = io.BytesIO()
    np.savez(archive, tokens=np.arange(9, dtype=np.uint16))

    def attempt(source):
        kind = source.random()
        if kind < 0.5:
            changed = mutate(content, source)
        elif kind < 0.95:
            changed = npy_header(source) + content[128:]
        else:
            changed = mutate(archive.getvalue(), source)
        if source.random() < 0.5:
            (folder / name).write_bytes(changed)
            shards.verify(folder)
            assert changed == content, "a damaged shard was verified"
        (plain / name).write_bytes(changed)
        stream = shards.Shards(plain, "train")
        shards.check_ids(stream.read(0, len(stream)), 5, plain)
        return VALID
    return attempt


def bin_shard(_patch):
    """Shards of llm.c, modded-nanogpt and nanoGPT."""
    tokens = (np.arange(100) % 5).astype("<u2").tobytes()
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 100
    contents = [header.tobytes() + tokens, tokens]
    folder = Path("data")
    folder.mkdir()

    def attempt(source):
        content = source.choice(contents)
        if source.random() < 0.5:
            content = mutate(content, source)
        else:
            magic = source.choice((20240520, 20240801, 0, -1))
            count = source.choice((100, 0, 1, -1, 50, 2**31 - 1, -2**31))
            content = struct.pack("<iii", magic, 1, count) + mutate(content[12:], source)
        (folder / "train.bin").write_bytes(content)
        stream = shards.Shards(folder, "train")
        shards.check_ids(stream.read(0, len(stream)), 50257, folder)
        return VALID
    return attempt


def hellaswag_examples(_patch):
    example = {"activity_label": "a", "ctx": "b", "ctx_a": "b", "ctx_b": "", "label": 1,
               "endings": ["c", "d"]}
    lines = json.dumps(example).encode() + b"\n" + json.dumps({**example, "label": "0"}).encode()
    packed = gzip.compress(lines)

    def attempt(source):
        if source.random() < 0.2:
            path, content = Path("h.jsonl.gz"), mutate(packed, source)
        else:
            path, content = Path("h.jsonl"), damaged_json(lines, example, source)
        path.write_bytes(content)
        chars = CharTokenizer(LETTERS)
        for each in hellaswag.read_examples(path):
            for tokenize in hellaswag.PROTOCOLS.values():
                tokenize(each, chars)
        return VALID
    return attempt


def documents(_patch):
    """The .jsonl and .txt files that prepare.py reads."""
    document = {"text": "abc 🦊", "id": 3}
    lines = (json.dumps(document).encode() + b"\n") * 3
    contents = {"d.jsonl": lines, "d.jsonl.gz": gzip.compress(lines), "d.txt": TEXT.encode(),
                "d.txt.gz": gzip.compress(TEXT.encode())}

    def attempt(source):
        name = source.choice(list(contents))
        if name == "d.jsonl":
            content = lines + damaged_json(json.dumps(document).encode(), document, source)
        else:
            content = mutate(contents[name], source)
        Path(name).write_bytes(content)
        val_share = 0.1 if name.startswith("d.txt") and source.random() < 0.5 else 0.0
        for passage in reader.read([name], val_share=val_share):
            passage.text.encode()
        return VALID
    return attempt


def run_log(_patch):
    """metrics.jsonl, samples.jsonl and config.json of a run, as report.py reads them."""
    run = Path("run")
    run.mkdir()
    config = {"batch_tokens": 128, "max_steps": 6, "vocab_size": 50304, "data": "edu_fineweb10B"}
    device = {"device": "NVIDIA A100-SXM4-80GB", "processes": 8}
    lines = [{"time": 1.5, "event": "start", "step": 0, **device},
             {"time": 2.5, "step": 1, "train_loss": 4.5, "tokens_per_s": 99.5, "skipped": 0},
             {"time": 3.5, "step": 1, "val_loss": 4.5, "hellaswag": 0.25},
             {"time": 4.5, "event": "resume", "step": 1, "measured": True, **device},
             {"time": 5.5, "step": 2, "train_loss": 3.5, "val_loss": 3.5}]
    samples = [{"time": 1.5, "step": 1, "prompt": "a", "text": "b"}]

    def write(name: str, lines: list, source, which: int):
        """Damages one of the lines."""
        texts = [json.dumps(line).encode() for line in lines]
        if which >= 0:
            texts[which] = damaged_json(texts[which], lines[which], source)
        (run / name).write_bytes(b"\n".join(texts))

    def attempt(source):
        which = source.randrange(len(lines) + 2)
        write("metrics.jsonl", lines, source, which if which < len(lines) else -1)
        write("samples.jsonl", samples, source, 0 if which == len(lines) else -1)
        write("config.json", [config], source, 0 if which > len(lines) else -1)
        if which == len(lines):
            report.samples(run)
        else:
            report.summary(run)
            report.tables(run)
        return VALID
    return attempt


# --------------------------------------------------------------------------------------------------
# Requests

COMMON = {"model": "m", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "n": 2,
          "repetition_penalty": 1.1, "stop": ["a", "b"], "seed": 1, "stream": True,
          "stream_options": {"include_usage": True}, "min_p": 0, "user": "u"}
MESSAGE = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
BODIES = [
    (schema.CompletionRequest, {**COMMON, "prompt": "hello", "logprobs": 2, "echo": True}),
    (schema.CompletionRequest, {"model": "m", "prompt": [[1, 2], [3]]}),
    (schema.CompletionRequest, {"model": "m", "prompt": "hello"}),
    (schema.ChatRequest, {**COMMON, "messages": [MESSAGE], "logprobs": True}),
    (schema.ChatRequest, {"model": "m", "messages": [MESSAGE]})]


def api_body(_patch):
    bodies = [(kind, document, json.dumps(document).encode()) for kind, document in BODIES]

    def attempt(source):
        kind, document, content = source.choice(bodies)
        return read_body(kind, damaged_json(content, document, source, (DEEP, MESSAGE, [MESSAGE])))
    return attempt


def read_body(kind: type[schema.GenerationRequest], content: bytes) -> str:
    """Reads a body as serve.py does."""
    try:
        request = kind.model_validate_json(content)
        generate.Sampling(**request.sampling())
        if kind is schema.ChatRequest:
            for message in request.messages:
                message.plain()
        else:
            request.prompts()
        return VALID
    except (UserError, ValidationError) as error:
        assert schema.error_answer(error).status_code == 400
        return "one sentence"


PARSERS = {
    "tokenizer.json of a BPE": bpe_json,
    "tokenizer.json of characters": character_json,
    "vocab.json and merges.txt": vocab_and_merges,
    "nanoGPT's meta.pkl": meta_pickle,
    "our .pt": own_pt,
    "a .pt of nanoGPT or build-nanogpt": foreign_pt,
    "a malicious pickle": malicious_pickle,
    "a run's checkpoint": run_folder,
    "a sharded run's checkpoint": sharded_run,
    "a Hugging Face folder": huggingface_folder,
    "a manifest": manifest,
    "the state of a preparation": preparation,
    "a .npy shard": npy_shard,
    "a .bin shard": bin_shard,
    "HellaSwag's examples": hellaswag_examples,
    "documents": documents,
    "a run's log": run_log,
    "a body of the API": api_body,
}
