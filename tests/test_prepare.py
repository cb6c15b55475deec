import contextlib
import dataclasses
import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROSE, ROOT, tiny_gpt

import fineweb
import prepare
import shards
from common.errors import UserError
from common.files import sha256
from corpus import encoding, reader, shard_writer, sources
from fineweb import FinewebConfig
from prepare import PrepareConfig
from shards import LLMC_MAGIC, Shards, open_shard
from tokenizer import CharTokenizer, load_tokenizer
from weights.huggingface import save_huggingface

GPT2 = load_tokenizer("gpt2")
DOCUMENTS = [PROSE[i * 37 % 500:][:40 + i * 97 % 900] + f" {i} Tschüß, 你好 \U0001f98a<|endoftext|>\n\n" for i in range(300)]


def expected_stream(documents) -> list[int]:
    return [token for text in documents if text and text.strip() for token in [GPT2.eot, *GPT2.encode(text)]]


def stream(folder) -> list[int]:
    """All tokens of the folder's shards, in the order of their indices, part after part."""
    shards.verify(Path(folder))
    listed = shards.read_manifest(folder)["shards"]
    return np.concatenate([open_shard(Path(folder) / shard["file"]) for shard in listed]).tolist()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def write_corpus(folder: Path, documents, form: str, files: int = 3) -> Path:
    """The documents in that many files of one form."""
    folder.mkdir(parents=True)
    for i in range(files):
        part = documents[len(documents) * i // files:len(documents) * (i + 1) // files]
        lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(part)).encode()
        path = folder / f"{i:03d}_00000{form}"
        match form:
            case ".parquet":
                pq.write_table(pa.table({"text": part, "id": list(range(len(part)))}), path, row_group_size=30)
            case ".jsonl":
                path.write_bytes(lines)
            case ".jsonl.gz":
                path.write_bytes(gzip.compress(lines))
            case ".jsonl.zst":
                path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
    return folder


def write_texts(folder: Path, documents) -> Path:
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:05d}.txt").write_bytes(text.encode())
    return folder


# ----------------------------------------------------------------------------------------------------------------
# Exactness

@pytest.mark.parametrize("form", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_every_document_is_in_once_whatever_the_files(tmp_path, form):
    source = write_texts(tmp_path / "in", DOCUMENTS) if form == ".txt" else write_corpus(tmp_path / "in", DOCUMENTS, form)
    prepare.main(PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000))
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)
    manifest = shards.read_manifest(tmp_path / "out")
    tokens = len(expected_stream(DOCUMENTS))
    assert (manifest["documents"], manifest["tokens"]) == (len(DOCUMENTS), tokens)
    assert manifest["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    listed = [(shard["split"], shard["tokens"]) for shard in manifest["shards"]]
    assert listed == [("val", 10_000), *[("train", 10_000)] * (tokens // 10_000 - 1), ("train", tokens % 10_000)]
    assert sum(shard["documents"] for shard in manifest["shards"]) == len(DOCUMENTS)


@pytest.mark.parametrize("form", [".parquet", ".jsonl.gz", ".txt"])
def test_the_last_documents_are_validation_where_a_share_is_asked_for(command, tmp_path, form):
    source = write_texts(tmp_path / "in", DOCUMENTS) if form == ".txt" else write_corpus(tmp_path / "in", DOCUMENTS, form)
    for out, launcher in ("one", ()), ("three", ("-m", "torch.distributed.run", "--nproc_per_node=3")):
        command("prepare.py", source, "--val-share", "0.41", "--shard-tokens", "10000", "--out", out, launcher=launcher)
        folder = tmp_path / out
        assert sorted(stream(folder)) == sorted(expected_stream(DOCUMENTS))
        assert np.array_equal(Shards(folder, "train").read(0, len(Shards(folder, "train"))), expected_stream(DOCUMENTS[:177]))
        assert np.array_equal(Shards(folder, "val").read(0, len(Shards(folder, "val"))), expected_stream(DOCUMENTS[177:]))


def test_the_share_belongs_to_the_preparation(tmp_path):
    source = str(write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl"))
    prepare.main(PrepareConfig(source, out=tmp_path / "out", val_share=0.01))
    assert shards.read_manifest(tmp_path / "out")["source"]["val_share"] == 0.01
    for other in None, 0.02:
        with pytest.raises(UserError, match="another preparation"):
            prepare.main(PrepareConfig(source, out=tmp_path / "out", val_share=other))
    for share in 0.0, 1.0, -1.0:
        with pytest.raises(UserError, match="above 0 and below 1"):
            prepare.main(PrepareConfig(source, out=tmp_path / "x", val_share=share))


def test_a_kill_changes_nothing_where_the_last_documents_are_validation(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    config = PrepareConfig(str(source), "bpe:300", out=tmp_path / "whole", val_share=0.3, shard_tokens=20_000)
    prepare.main(config)
    monkeypatch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 2000)
    calls, append = [0], shard_writer.ShardWriter.append

    def dies(self, *arguments):
        calls[0] += 1
        if calls[0] % 20 == 0:
            raise KeyboardInterrupt
        append(self, *arguments)
    monkeypatch.setattr(shard_writer.ShardWriter, "append", dies)
    for _ in range(100):
        with contextlib.suppress(KeyboardInterrupt):
            prepare.main(dataclasses.replace(config, out=tmp_path / "killed"))
            break
    assert calls[0] > 40 and contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_bpe_is_trained_on_what_is_not_validation(tmp_path, monkeypatch):
    """And on the beginning of every file, where all would be too much; a text of one file gives its first part."""
    source = write_corpus(tmp_path / "in", ["common words " * 30] * 30 + ["zyzzyva " * 50] * 10, ".jsonl")
    prepare.main(PrepareConfig(str(source), "bpe:300", out=tmp_path / "out", val_share=0.25))
    bpe = shards.read_tokenizer(tmp_path / "out")
    assert len(bpe.encode(" words")) == 1 and len(bpe.encode("zyzzyva")) == 7
    files = sources.local_source("x", write_corpus(tmp_path / "numbered", [f"{i} " * 300 for i in range(10, 50)], ".jsonl")).files
    monkeypatch.setattr(reader, "SAMPLE_BYTES", 6000)
    assert [int(text[:2]) for text in reader.sample_texts(files, 0.0, None)] == [10, 11, 12, 23, 24, 25, 36, 37, 38]
    (tmp_path / "text.txt").write_text("a common word " * 90 + "zyzzyva " * 17)
    prepare.main(PrepareConfig(str(tmp_path / "text.txt"), "bpe:8192", out=tmp_path / "text"))
    assert len(shards.read_tokenizer(tmp_path / "text").encode(" zyzzyva")) == 8


@pytest.mark.parametrize("name, sentence", [("bpe:", "has no valid size"), ("bpe:8k", "has no valid size"), ("bpe:256", "at least 257")])
def test_a_bpe_without_a_size_is_one_sentence(prose, tmp_path, name, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare.main(PrepareConfig(str(prose), name, out=tmp_path / "out"))


def test_a_shard_is_what_numpy_would_have_saved(tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    prepare.main(PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000))
    for path in (tmp_path / "out").glob("*.npy"):
        np.save(tmp_path / "again.npy", np.load(path))
        assert (tmp_path / "again.npy").read_bytes() == path.read_bytes()


def test_any_number_of_workers_writes_the_same_bytes(command, tmp_path, monkeypatch):
    documents = DOCUMENTS * 50  # enough for more than one process
    source = write_corpus(tmp_path / "in", documents, ".jsonl")
    for workers in 1, 2, 3:
        command("prepare.py", source, "--out", f"out{workers}", "--workers", workers, "--shard-tokens", 500_000)
    monkeypatch.setattr(prepare, "MIN_POOL_BYTES", 10**9)  # in this process
    prepare.main(PrepareConfig(str(source), out=tmp_path / "out0", shard_tokens=500_000))
    assert stream(tmp_path / "out0") == expected_stream(documents)
    for workers in 1, 2, 3:
        assert contents(tmp_path / f"out{workers}") == contents(tmp_path / "out0")


def test_a_long_text_is_cut_where_tokens_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(reader, "LONG_DOCUMENT_BYTES", 4000)
    rng = random.Random(1)
    long = "".join(rng.choice(["word", " ", "  ", "\n", "\n\n ", "1234", "'ll", "...", "你好", "\t"]) for _ in range(30_000))
    documents = [long, "short", long[::-1]]
    for form, source in ("jsonl", write_corpus(tmp_path / "lines", documents, ".jsonl")), \
                        ("txt", write_texts(tmp_path / "texts", documents)):
        prepare.main(PrepareConfig(str(source), out=tmp_path / form, shard_tokens=50_000))
        assert stream(tmp_path / form) == expected_stream(documents)


class Killed(BaseException):
    pass


def trains_on(folder) -> bool:
    try:
        return bool(Shards(folder, "train"))
    except UserError:
        return False


def test_a_kill_at_any_moment_changes_nothing(tmp_path, monkeypatch):
    """Every call that touches the disk is, in turn, the last one before the process dies."""
    monkeypatch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(reader, "LONG_DOCUMENT_BYTES", 8000)
    for name, tokenizer, size in ("many", "gpt2", 12_000), ("few", "gpt2", 10**6), ("char", "char", 10**6):
        source = write_corpus(tmp_path / name, [*DOCUMENTS[:50], PROSE * 2, *DOCUMENTS[50:100]], ".jsonl")
        config = PrepareConfig(str(source), tokenizer, shard_tokens=size)
        prepare.main(dataclasses.replace(config, out=tmp_path / f"{name}-whole"))
        calls = 0

        def counted(function, limit):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == limit:
                    raise Killed
                return function(*arguments, **options)
            return call
        for limit in range(3, 10**6, 7):  # dies a little later each time, and goes on where it was
            calls = 0
            with monkeypatch.context() as patch:
                writer = shard_writer.ShardWriter
                for module, function in (shard_writer.os, "fsync"), (shard_writer.os, "replace"), (writer, "write"), \
                                        (writer, "record"), (shard_writer.Path, "unlink"):
                    patch.setattr(module, function, counted(getattr(module, function), limit))
                try:
                    prepare.main(dataclasses.replace(config, out=tmp_path / f"{name}-killed"))
                    break
                except Killed:
                    assert (tmp_path / f"{name}-killed" / "manifest.json").exists() or not trains_on(tmp_path / f"{name}-killed")
        assert limit > 20
        assert contents(tmp_path / f"{name}-killed") == contents(tmp_path / f"{name}-whole")


def test_kill_9_at_random_moments(tmp_path):
    documents = DOCUMENTS * 150
    source = write_corpus(tmp_path / "in", documents, ".parquet")
    line = [sys.executable, ROOT / "prepare.py", source, "--shard-tokens", "300000", "--workers", "2", "--out"]
    subprocess.run([*line, tmp_path / "whole"], check=True, capture_output=True)
    rng, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen([*line, tmp_path / "killed"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said, _ = process.communicate(timeout=rng.uniform(0.4, 1.6) + kills / 10)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    assert process.returncode == 0, said
    assert kills > 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert stream(tmp_path / "killed") == expected_stream(documents)


def test_workers_end_with_the_process_that_was_killed(tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS * 400, ".jsonl")
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", source, "--workers", "2", "--out", tmp_path / "out"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def children():
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == process.pid]

    def _parent(path):
        try:
            return int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            return None
    if not Path("/proc/self/stat").exists():
        pytest.skip("reads /proc")
    deadline = time.monotonic() + 60
    while len(found := children()) < 3 and time.monotonic() < deadline:  # two workers, and what watches their resources
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) >= 3 and not any(Path(f"/proc/{pid}").exists() for pid in found)


# ----------------------------------------------------------------------------------------------------------------
# Several processes, and FineWeb-Edu

@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_the_files_and_join_their_manifests(command, tmp_path, processes):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".parquet", files=5)
    said = command("prepare.py", source, "--out", "out", "--shard-tokens", 10_000, launcher=(
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"))
    assert "300 documents" in said.stdout
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)
    names = list(contents(tmp_path / "out"))
    assert {"in_p00_val_000000.npy", f"in_p0{processes - 1}_train_000000.npy"} < set(names)
    assert sum("_val_" in name for name in names) == 1 and sum("json" in name or "lock" in name for name in names) == 1


def test_a_slurm_array_one_task_after_the_other(command, tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl", files=3)

    def task(number, count=3, **options):
        return command("prepare.py", source, "--out", "out", "--shard-tokens", 10_000, **options, environment={
            "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": str(count)})
    assert "ready when all 3 parts are" in task(2).stdout
    with pytest.raises(UserError, match="not finished"):
        Shards(tmp_path / "out", "train")
    refused = task(1, count=1, check=False)  # the array was started again with another number of tasks
    assert refused.returncode == 2 and "parts: 3, not 1" in refused.stderr
    assert "ready when all 3 parts are" in task(3).stdout
    assert "300 documents" in task(1).stdout
    assert "300 documents" in task(3).stdout  # again: it is there
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)


def test_fineweb_is_the_same_from_the_hub_from_a_copy_and_from_jsonl(command, hub, tmp_path):
    documents = DOCUMENTS
    copy = write_corpus(tmp_path / "copy" / "sample" / "10BT", documents, ".parquet").parent.parent
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
        for name, path in (("default", "data/*/*"), ("sample-10BT", "sample/10BT/*"))) + "---\n"
    files = {f"sample/10BT/{path.name}": path.read_bytes() for path in (copy / "sample" / "10BT").iterdir()}
    files |= {"README.md": card.encode(), "data/x/0.parquet": next(iter(files.values()))}
    address = hub("HuggingFaceFW/fineweb-edu", files)
    online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    command("fineweb.py", "--shard-tokens", 10_000, environment=online)
    command("fineweb.py", "--shard-tokens", 10_000, "--source", copy, "--out", "copied")
    jsonl = write_corpus(tmp_path / "other", documents, ".jsonl.zst")
    prepare.main(PrepareConfig(str(jsonl), out=tmp_path / "lines", shard_tokens=10_000))
    assert stream("edu_fineweb10B") == expected_stream(documents)
    assert shards.read_manifest("edu_fineweb10B")["source"]["revision"] == "a" * 40
    for path in sorted(Path("edu_fineweb10B").glob("*.npy")):
        assert path.read_bytes() == (tmp_path / "copied" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "lines" / path.name.replace("edufineweb", "other")).read_bytes()
    assert "is ready" in command("fineweb.py", "--shard-tokens", 10_000, environment=online).stdout  # nothing to do
    done = command("fineweb.py", "--subset", "sample-9BT", environment=online, check=False)
    assert done.returncode == 2 and "sample-9BT" in done.stderr


def test_where_a_copy_of_fineweb_keeps_a_subset(tmp_path):
    for place in "hub/sample/10BT", "hub/data/CC-MAIN-2024-10", "plain":
        (tmp_path / place).mkdir(parents=True)
    assert fineweb.find_subset(tmp_path / "hub", "sample-10BT") == tmp_path / "hub" / "sample" / "10BT"
    assert fineweb.find_subset(tmp_path / "hub", "CC-MAIN-2024-10") == tmp_path / "hub" / "data" / "CC-MAIN-2024-10"
    assert fineweb.find_subset(tmp_path / "plain", "sample-10BT") == tmp_path / "plain"
    with pytest.raises(UserError, match="holds no sample-100BT"):
        fineweb.find_subset(tmp_path / "hub", "sample-100BT")


def test_published_tokens_are_taken_without_tokenizing(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "COPY_TOKENS", 3000)
    tokens = np.array(expected_stream(DOCUMENTS), dtype=np.uint16)
    (tmp_path / "published").mkdir()
    for i, part in enumerate(np.split(tokens, [5000, 17_000])):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = LLMC_MAGIC, 1, len(part)
        name = f"fineweb_{'train' if i else 'val'}_{i:06d}.bin"
        (tmp_path / "published" / name).write_bytes(header.tobytes() + part.tobytes())
    fineweb.main(FinewebConfig(source=tmp_path / "published", pretokenized=True, shard_tokens=10_000))
    assert stream("edu_fineweb10B") == tokens.tolist()
    manifest = shards.read_manifest("edu_fineweb10B")
    assert manifest["documents"] == len(DOCUMENTS)
    assert [shard["tokens"] for shard in manifest["shards"]][:2] == [5000, 10_000]
    assert len(Shards("edu_fineweb10B", "val")) == 5000


# ----------------------------------------------------------------------------------------------------------------
# Bad input

def test_empty_documents_are_left_out_and_counted(tmp_path, capsys):
    documents = ["", *DOCUMENTS[:50], " \n\t ", DOCUMENTS[50]]
    prepare.main(PrepareConfig(str(write_corpus(tmp_path / "in", documents, ".jsonl")), out=tmp_path / "out", shard_tokens=2000))
    assert stream(tmp_path / "out") == expected_stream(documents)
    assert shards.read_manifest(tmp_path / "out")["empty"] == 2
    assert "2 empty documents were left out" in capsys.readouterr().out


def test_bytes_that_are_not_utf8_are_repaired_and_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    lines = b'{"text": "caf\xe9 and more of it"}\n' + b'{"text": "a lone \\ud83e surrogate"}\n' * 9
    (tmp_path / "in" / "a.jsonl").write_bytes(lines)
    table = pa.table({"text": pa.array([b"caf\xe9 and more of it"] * 9, pa.binary()).view(pa.string())})
    pq.write_table(table, tmp_path / "in" / "b.parquet")
    prepare.main(PrepareConfig(str(tmp_path / "in"), out=tmp_path / "out"))
    text = "caf� and more of it"
    assert stream(tmp_path / "out") == expected_stream([text, *["a lone � surrogate"] * 9, *[text] * 9])
    assert "19 documents held bytes that are not UTF-8" in capsys.readouterr().out


@pytest.mark.parametrize("files, sentence", [
    ({}, "holds no documents"),
    ({"a.jsonl": b""}, "holds no text"),
    ({"a.jsonl": b'{"text": "fine"}\n{"text": 7}\n'}, r"a.jsonl, line 2, is not a JSON object with a string `text`"),
    ({"a.jsonl": b'{"text": "fine"}\n{"text": 0}\n'}, r"line 2, is not a JSON object"),
    ({"a.jsonl": b'{"text": "fine"}\n{"text": "cut of'}, r"line 2, is not a JSON object"),
    ({"a.jsonl.gz": gzip.compress(b'{"text": "fine"}\n' * 999)[:-20]}, "damaged or cannot be read: .*Truncated"),
    ({"a.jsonl.gz": b"no gzip at all"}, "damaged or cannot be read"),
    ({"a.parquet": b"PAR1 or so"}, "damaged or cannot be read"),
    ({"a.txt": b"good\n" * 40, "b.txt": b"\xff\xfe" * 40}, "b.txt is not UTF-8"),
])
def test_damaged_files_are_named(tmp_path, files, sentence):
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prepare.main(PrepareConfig(str(tmp_path / "in"), out=tmp_path / "out"))


def test_a_parquet_file_without_text_says_what_it_has(tmp_path):
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column `text`; its columns are: content, url"):
        prepare.main(PrepareConfig("x.parquet"))


def test_a_source_that_stops_is_asked_again_and_loses_nothing(tmp_path, monkeypatch, capsys):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    monkeypatch.setattr(reader, "RETRY_WAITS_S", (0, 0, 0))
    monkeypatch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4000)
    steady, failing = reader.read_file, True

    def flaky(path, cursor, val_share):
        for n, passage in enumerate(steady(path, cursor, val_share)):
            if n == 20 or (failing and "002" in path):  # breaks now and then in each file, and for good in the last
                raise OSError(errno.EIO, "the wire broke")
            yield passage
    monkeypatch.setattr(reader, "read_file", flaky)
    config = PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000)
    with pytest.raises(UserError, match=r"002_00000.jsonl stopped after document 0 .* run the same command again to resume"):
        prepare.main(config)
    assert "000_00000.jsonl: [Errno 5] the wire broke; retrying in 0 s" in capsys.readouterr().err
    failing = False
    prepare.main(config)
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4000)
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    config = PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000)
    room, write = 60_000, shard_writer.ShardWriter.write

    def full(writer, data):
        nonlocal room
        data = memoryview(data).cast("B")
        write(writer, data[:room])
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "write", full)
        with pytest.raises(UserError, match=r"disk of .* is full: free some space and run the same command again"):
            prepare.main(config)
    assert shard_writer.read_json(tmp_path / "out" / "progress.json")["tokens"] > 0
    prepare.main(config)
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)


def test_another_preparation_is_never_mixed_in(command, tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    config = PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000)
    prepare.main(config)
    before = contents(tmp_path / "out")
    prepare.main(config)  # the same again: it is there
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="files that do not belong to this preparation"):
        prepare.main(config)
    (tmp_path / "out" / "thesis.txt").unlink()
    for other, sentence in (({"shard_tokens": 20_000}, "shard tokens: 10000, not 20000"),
                            ({"tokenizer": "char"}, "tokenizer: "),
                            ({"source": str(source / "000_00000.jsonl")}, "name: in, not 000_00000")):
        with pytest.raises(UserError, match=sentence):
            prepare.main(dataclasses.replace(config, **other))
    with open(source / "000_00000.jsonl", "a") as file:
        file.write('{"text": "a document more"}\n')
    with pytest.raises(UserError, match="another preparation .source: "):
        prepare.main(config)
    assert contents(tmp_path / "out") == before
    (tmp_path / "theirs").mkdir()
    np.save(tmp_path / "theirs" / "in_train_000001.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match="files that do not belong to this preparation"):
        prepare.main(dataclasses.replace(config, out=tmp_path / "theirs"))


def test_a_refusal_changes_nothing_in_a_folder_that_was_begun(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    config = PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
        patch.setattr(reader, "BLOCK_BYTES", 4000)
        patch.setattr(shard_writer.ShardWriter, "finish", lambda writer: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare.main(config)
    begun = contents(tmp_path / "out")
    assert any(name.endswith(".open") for name in begun)
    for other in {"shard_tokens": 20_000}, {"tokenizer": "char"}, {"part": "0/2"}:
        with pytest.raises(UserError, match="another preparation"):
            prepare.main(dataclasses.replace(config, **other))
        assert contents(tmp_path / "out").items() - {("progress.lock", b"")} == begun.items() - {("progress.lock", b"")}
    open_shard_path = next((tmp_path / "out").glob("*.open"))
    open_shard_path.write_bytes(begun[open_shard_path.name][:-2])
    with pytest.raises(UserError, match=f"{open_shard_path.name} is cut off"):
        prepare.main(config)
    open_shard_path.write_bytes(begun[open_shard_path.name])
    prepare.main(config)
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)


def test_joining_the_parts_can_fail_and_be_done_again(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in", DOCUMENTS[:60], ".jsonl", files=2)
    config = PrepareConfig(str(source), out=tmp_path / "out")
    prepare.main(dataclasses.replace(config, part="1/2"))
    write_json = shard_writer.write_json

    def full(path, content):
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_json", full)
        with pytest.raises(UserError, match="full"):
            prepare.main(dataclasses.replace(config, part="0/2"))
    prepare.main(dataclasses.replace(config, part="0/2"))
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS[:60])
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".npy", ".json"}
    with pytest.raises(UserError, match="no part 2/2"):
        prepare.main(dataclasses.replace(config, part="2/2"))


def test_blanks_before_a_document_and_without_end(tmp_path):
    (tmp_path / "texts").mkdir()
    for name, text in ("a", "first"), ("b", " " * 1_100_000 + "second"), ("c", "third"), ("d", " \n" * 700_000):
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    prepare.main(PrepareConfig(str(tmp_path / "texts"), out=tmp_path / "out"))
    manifest = shards.read_manifest(tmp_path / "out")
    assert (manifest["documents"], manifest["empty"]) == (3, 1)
    assert GPT2.decode(stream(tmp_path / "out")).replace(" ", "") == "<|endoftext|>first<|endoftext|>second<|endoftext|>third"
    documents = ["\n" * 5_000_000 + "x" * 100, " " * 3_000_000, "y" * 100]
    prepare.main(PrepareConfig(str(write_corpus(tmp_path / "lines", documents, ".jsonl")), out=tmp_path / "lines_out"))
    text = GPT2.decode(stream(tmp_path / "lines_out"))
    assert text.replace("\n", "") == "<|endoftext|>" + "x" * 100 + "<|endoftext|>" + "y" * 100


def test_what_a_folder_may_hold(tmp_path):
    """Output inside the source, links, capitals, and files that only look like documents."""
    source = write_corpus(tmp_path / "in", DOCUMENTS[:50], ".jsonl", files=2)
    (source / "000_00000.jsonl").rename(source / "000_00000.JSONL")
    (tmp_path / "elsewhere").mkdir()
    (source / "001_00000.jsonl").rename(tmp_path / "elsewhere" / "x::y.jsonl")
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    config = PrepareConfig(str(source), out=source / "tokens")
    for _ in range(2):
        prepare.main(config)
        assert stream(source / "tokens") == expected_stream(DOCUMENTS[:50])
    (source / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="broken"):
        prepare.main(dataclasses.replace(config, out=tmp_path / "out"))
    (source / "broken.jsonl").unlink()
    (source / "download.jsonl.gz").touch()
    with pytest.raises(UserError, match=r"download.jsonl.gz is empty"):
        prepare.main(dataclasses.replace(config, out=tmp_path / "out"))


def test_verify_finds_a_manifest_that_was_edited(tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    prepare.main(PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000))
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    first, *rest = manifest["shards"]
    for change, sentence in (({"tokens": 7}, "says 7 tokens"), ({"documents": 7}, "says 7 documents"),
                             ({"shards": rest}, "holds no val shards"), ({"shards": [first, *rest[1:]]}, "add up"),
                             ({"shards": [first, first, *rest]}, "not a manifest"),
                             ({"shards": [{**first, "split": "test"}, *rest]}, "not a manifest"),
                             ({"shards": [{**first, "file": "../x.npy"}, *rest]}, "not a manifest"),
                             ({"shards": [{**first, "documents": 1}, *rest]}, "documents but the manifest says 1"),
                             ({"source": "x"}, "not a manifest")):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=sentence):
            shards.verify(tmp_path / "out")
    path.write_text(json.dumps(manifest))
    shards.verify(tmp_path / "out")
    np.save(tmp_path / "out" / "in_train_000099.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match=r"in_train_000099.npy is not in the manifest"):
        shards.verify(tmp_path / "out")
    (tmp_path / "out" / rest[0]["file"]).unlink()
    (tmp_path / "out" / "in_train_000099.npy").unlink()
    with pytest.raises(UserError, match="is missing, although it was complete"):
        prepare.main(PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000))


@pytest.mark.parametrize("name", ["medieval", "train_of_thought", "x"])
def test_published_splits_stay_apart_whatever_the_name(tmp_path, name):
    (tmp_path / "in").mkdir()
    train, val = np.arange(40_000, dtype=np.uint16), np.full(5000, 7, dtype=np.uint16)
    np.save(tmp_path / "in" / f"{name}_train_000001.npy", train)
    np.save(tmp_path / "in" / f"{name}_val_000000.npy", val)
    config = PrepareConfig(str(tmp_path / "in"), pretokenized=True, out=tmp_path / "out")
    for part in "0/2", "1/2":
        prepare.main(dataclasses.replace(config, part=part))
    assert np.array_equal(Shards(tmp_path / "out", "val").read(0, 5000), val)
    assert np.array_equal(Shards(tmp_path / "out", "train").read(0, 40_000), train)
    with pytest.raises(UserError, match="takes GPT-2's tokens"):
        prepare.main(dataclasses.replace(config, tokenizer="char"))


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    source = {"name": "x", "revision": "y"}
    with shard_writer.ShardWriter(tmp_path / "out", "in", GPT2, source):
        with pytest.raises(UserError, match="Another process is writing"):
            shard_writer.ShardWriter(tmp_path / "out", "in", GPT2, source)


def test_bad_published_tokens_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    config = PrepareConfig(str(tmp_path / "in"), pretokenized=True, out=tmp_path / "out")
    with pytest.raises(UserError, match="holds no shards"):
        prepare.main(config)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = LLMC_MAGIC, 1, 1000
    path = tmp_path / "in" / "x_train_000001.bin"
    path.write_bytes(header.tobytes() + bytes(1990))
    with pytest.raises(UserError, match="announces 1,000 tokens"):
        prepare.main(config)
    np.save(tmp_path / "in" / "x_train_000000.npy", np.array([50256, 7, 50257], dtype=np.uint16))
    with pytest.raises(UserError, match="holds the id 50,257"):
        prepare.main(config)
# ----------------------------------------------------------------------------------------------------------------
# One text

def test_a_text_called_train_keeps_its_splits_apart(tmp_path):
    (tmp_path / "my_train_text.txt").write_text(PROSE)
    prepare.main(PrepareConfig("my_train_text.txt", out=tmp_path / "out"))
    for _ in range(2):
        assert len(Shards(tmp_path / "out", "train")) == int(0.9 * len(PROSE))
        (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)


def test_a_text_becomes_shards_with_its_last_tenth_for_validation(prose, tmp_path):
    prepare.main(PrepareConfig(str(prose)))
    out = tmp_path / "data" / "prose_char"
    manifest = json.loads((out / "manifest.json").read_text())
    tokenizer = load_tokenizer(manifest["tokenizer"])
    cut = int(len(PROSE) * 0.9)
    for split, part in ("train", PROSE[:cut]), ("val", PROSE[cut:]):
        shards = Shards(out, split)
        assert tokenizer.decode(shards.read(0, len(shards)).tolist()) == part
    assert manifest["format"] == 1 and manifest["source"]["revision"] == sha256(prose)
    for shard in manifest["shards"]:
        assert sha256(out / shard["file"]) == shard["sha256"]
        assert np.load(out / shard["file"]).shape == (shard["tokens"],)


def test_with_gpt2s_tokenizer_a_document_starts_with_end_of_text(prose, tmp_path):
    prepare.main(PrepareConfig("tiny_pushkin", tokenizer="gpt2", text=prose, out=tmp_path / "poems"))
    for split in "train", "val":
        shards = Shards(tmp_path / "poems", split)
        assert shards.read(0, 1)[0] == 50256
        assert load_tokenizer("gpt2").decode(shards.read(1, len(shards)).tolist()) in PROSE


def test_a_named_text_is_downloaded_and_checked(web, prose, tmp_path, monkeypatch):
    url = web({"/input.txt": prose.read_bytes()})
    monkeypatch.setitem(sources.NAMED_TEXTS, "tiny_shakespeare", (f"{url}/input.txt", sha256(prose)))
    assert sources.download("tiny_shakespeare").read_text() == PROSE
    monkeypatch.setitem(sources.NAMED_TEXTS, "tiny_shakespeare", (f"{url}/elsewhere", sha256(prose)))
    assert sources.download("tiny_shakespeare").exists()  # the second time it is there already
    monkeypatch.setitem(sources.NAMED_TEXTS, "other", (f"{url}/input.txt", "0" * 64))
    with pytest.raises(UserError, match="sha256 differs"):
        sources.download("other")
    monkeypatch.setitem(sources.NAMED_TEXTS, "lost", (f"{url}/lost.txt", "0" * 64))
    with pytest.raises(UserError, match="could not be downloaded"):
        sources.download("lost")
    left = {path.name for path in (tmp_path / "data" / "downloads").iterdir() if path.suffix != ".lock"}
    assert left == {"tiny_shakespeare.txt"}


@pytest.mark.parametrize("content, tokenizer, sentence", [
    (b"", "char", "0 characters, too few"),
    (b"\xff\xfe" * 100, "char", "not UTF-8"),
    (b"abc" * 100, "gpt5", "no file, folder or run"),
    (None, "char", "no file"),
])
def test_bad_texts_get_one_sentence(tmp_path, content, tokenizer, sentence):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prepare.main(PrepareConfig("text.txt", tokenizer))
    assert not (tmp_path / "data").exists()


def test_a_model_lends_its_tokenizer_and_what_it_lacks_is_named(tmp_path, capsys):
    save_huggingface(tmp_path / "model", tiny_gpt(vocab_size=8), CharTokenizer("\n abc"))
    (tmp_path / "text.txt").write_text("\ufeff" + "abc é cab\n" * 20, encoding="utf-8")
    prepare.main(PrepareConfig("text.txt", tokenizer=str(tmp_path / "model"), out=tmp_path / "out"))
    assert "left out: é" in capsys.readouterr().out
    assert CharTokenizer("\n abc").decode(Shards(tmp_path / "out", "train").read(0, 10).tolist()) == "abc   cab\n"


def test_the_command_lines_prepare_and_verify(command, prose, tmp_path):
    assert "prose_char is ready: vocabulary of" in command("prepare.py", prose).stdout
    out = tmp_path / "data" / "prose_char"
    said = command("shards.py", "info", out).stdout
    assert "The fox went out on a chilly night" in said and f"{int(len(PROSE) * 0.9):,} tokens in 1 shards" in said
    assert "2 shards" in command("shards.py", "verify", out).stdout
    shard = next(out.glob("*_train_*.npy"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    done = command("shards.py", "verify", out, check=False)
    assert done.returncode == 2 and f"{shard.name} is damaged" in done.stderr
    done = command("prepare.py", "nothing.txt", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: There is no file or folder nothing.txt")
