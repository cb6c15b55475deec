"""The data, examples and logs that the fuzzer tries: DATA, a table at the end.

See tokenizer_files.py for how such a table works.
"""
import functools
import gzip
import io
import json
import random
import struct
from pathlib import Path

import numpy as np
from mutations import damaged_json, mutate
from small import CHARS, LETTERS, TEXT, VALID, contents, damaged, prepared_data, replaced

import hellaswag
import prepare
import report
import shards
from corpus import reader
from corpus.shard_writer import ShardWriter
from training import runlog, setup

# --------------------------------------------------------------------------------------------------
# Prepared data

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
    Path("text.jsonl").write_text('{"text": "abc"}\n' * 4)

    def open_writer():
        return ShardWriter(folder, "x", CHARS, {"name": "x", "revision": "r"}, shard_tokens=100)

    with open_writer() as writer:
        writer.append(np.arange(250) % len(LETTERS), np.array([0, 150]))
        writer.commit((0, 2, 0))
    begun = contents(folder)
    with open_writer() as writer:
        writer.finish()
    finished = contents(folder)

    def attempt(source):
        files, name = source.choice([(begun, "progress.json"), (finished, "manifest.json")])
        for path in set(folder.iterdir()) - set(files):
            path.unlink()
        for path, content in files.items():
            path.write_bytes(damaged(path, content, source) if path.name == name else content)
        with open_writer() as writer:
            if not writer.finished:
                for passage in reader.read(["text.jsonl"], writer.cursor):
                    ids = CHARS.encode_batch([passage.text])[0]
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
                           "(" * 300, "{" * 99 + "}" * 99, "b'\\xff'", "'<u2', 'x': 1"))
    if source.random() < 0.01:
        descr = "-" * 9000  # too deep for Python's parser
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
        shards.check_ids(stream.read(0, len(stream)), 50257, plain)
        return VALID
    return attempt


def bin_shard(_patch):
    """Shards of llm.c, modded-nanogpt and nanoGPT."""
    tokens = (np.arange(100) % 5).astype("<u2").tobytes()
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 100
    files = [header.tobytes() + tokens, tokens]
    folder = Path("data")
    folder.mkdir()

    def attempt(source):
        content = source.choice(files)
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


# --------------------------------------------------------------------------------------------------
# Documents and examples

def documents(_patch):
    """The .jsonl and .txt files that prepare.py reads."""
    document = {"text": "abc 🦊", "id": 3}
    lines = (json.dumps(document).encode() + b"\n") * 3
    files = {"d.jsonl": lines, "d.jsonl.gz": gzip.compress(lines), "d.txt": TEXT.encode(),
             "d.txt.gz": gzip.compress(TEXT.encode())}

    def attempt(source):
        name = source.choice(list(files))
        if name == "d.jsonl":
            content = lines + damaged_json(json.dumps(document).encode(), document, source)
        else:
            content = mutate(files[name], source)
        Path(name).write_bytes(content)
        val_share = 0.1 if name.startswith("d.txt") and source.random() < 0.5 else 0.0
        for passage in reader.read([name], val_share=val_share):
            passage.text.encode()
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
        for each in hellaswag.read_examples(path):
            for tokenize in hellaswag.PROTOCOLS.values():
                tokenize(each, CHARS)
        return VALID
    return attempt


# --------------------------------------------------------------------------------------------------
# Logs

def run_log(patch):
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
    files = {run / "metrics.jsonl": lines, run / "config.json": [config],
             run / "samples.jsonl": [{"time": 1.5, "step": 1, "prompt": "a", "text": "b"}]}

    def text(lines: list[dict]) -> bytes:
        return b"\n".join(json.dumps(line).encode() for line in lines)

    for path, lines in files.items():
        path.write_bytes(text(lines))
    places = [(path, i) for path, lines in files.items() for i in range(len(lines))]
    # the summary and the tables read the same log
    metrics = functools.lru_cache(1)(report.metrics)
    patch.setattr(report, "metrics", metrics)
    tried = set()  # hashes of what was read: damaged lines are left out, so most logs are alike

    def attempt(source):
        path, i = source.choice(places)
        lines = files[path]
        line = damaged_json(text(lines[i:i + 1]), lines[i], source)
        metrics.cache_clear()
        with replaced(path, b"\n".join((text(lines[:i]), line, text(lines[i + 1:])))):
            if path.name == "samples.jsonl":
                report.samples(run)
                return VALID
            read = hash(repr((report.read_lines(run / "metrics.jsonl"), runlog.read_config(run))))
            # tables take a hundred times as long as reading, and plots tens of times as long again
            if read not in tried and source.random() < 0.2:
                report.summary(run)
                for frame in report.tables(run).values():
                    if source.random() < 0.01:
                        report.plot(frame).draw_without_rendering()
            tried.add(read)
        return VALID
    return attempt


DATA = {
    "a manifest": manifest,
    "the state of a preparation": preparation,
    "a .npy shard": npy_shard,
    "a .bin shard": bin_shard,
    "HellaSwag's examples": hellaswag_examples,
    "documents": documents,
    "a run's log": run_log,
}
