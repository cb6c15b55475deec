import contextlib
import dataclasses
import errno
import gzip
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROSE, REVISION, fork, run_ranks, tiny_gpt, torchrun

import fineweb
import prepare
import shards
from common.errors import UserError
from common.files import read_json, sha256, write_json
from corpus import encoding, reader, shard_writer, sources
from corpus.shard_writer import ShardWriter
from fineweb import FinewebConfig
from prepare import PrepareConfig
from shards import Shards, open_shard
from tokenizer import CharTokenizer, load_tokenizer
from weights.huggingface import save_huggingface

GPT2 = load_tokenizer("gpt2")
DOCUMENTS = [
    PROSE[i * 37 % 500:][:40 + i * 97 % 900] + f" {i} Tschüß, 你好 🦊<|endoftext|>\n\n"
    for i in range(300)]


def expected_stream(documents) -> list[int]:
    """The tokens of all documents that are not blank, each after <|endoftext|>."""
    tokens = []
    for text in documents:
        if text.strip():
            tokens += [GPT2.eot, *GPT2.encode(text)]
    return tokens


def stream(folder) -> list[int]:
    """All tokens of the folder's shards, in the order of the manifest."""
    shards.verify(Path(folder))
    entries = shards.read_manifest(folder)["shards"]
    return np.concatenate([open_shard(Path(folder) / entry["file"]) for entry in entries]).tolist()


def read_split(folder, split: str) -> list[int]:
    """All tokens of one split."""
    stream = Shards(folder, split)
    return stream.read(0, len(stream)).tolist()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def write_corpus(folder: Path, documents, form: str, files: int = 3) -> Path:
    """Writes the documents into several files of one form, or as .txt into one file each."""
    folder.mkdir(parents=True)
    if form == ".txt":
        for i, text in enumerate(documents):
            (folder / f"{i:05d}.txt").write_bytes(text.encode())
        return folder
    for i in range(files):
        begin = len(documents) * i // files
        end = len(documents) * (i + 1) // files
        part = documents[begin:end]
        rows = [{"id": n, "text": text} for n, text in enumerate(part)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = folder / f"{i:03d}_00000{form}"
        match form:
            case ".parquet":
                table = pa.table({"text": part, "id": list(range(len(part)))})
                pq.write_table(table, path, row_group_size=30)
            case ".jsonl":
                path.write_bytes(lines)
            case ".jsonl.gz":
                path.write_bytes(gzip.compress(lines))
            case ".jsonl.zst":
                path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
    return folder


# --------------------------------------------------------------------------------------------------
# Exactness

@pytest.mark.parametrize("form", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_every_document_is_written_once_from_any_kind_of_file(tmp_path, form):
    source = write_corpus(tmp_path / "in", DOCUMENTS, form)
    prepare.main(PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000))
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)
    manifest = shards.read_manifest(tmp_path / "out")
    tokens = len(expected_stream(DOCUMENTS))
    assert (manifest["documents"], manifest["tokens"]) == (len(DOCUMENTS), tokens)
    assert manifest["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    full_train = [("train", 10_000)] * (tokens // 10_000 - 1)
    listed = [(shard["split"], shard["tokens"]) for shard in manifest["shards"]]
    assert listed == [("val", 10_000), *full_train, ("train", tokens % 10_000)]
    assert sum(shard["documents"] for shard in manifest["shards"]) == len(DOCUMENTS)


@pytest.mark.parametrize("form", [".parquet", ".jsonl.gz", ".txt"])
def test_val_share_uses_the_last_documents_for_validation(command_here, tmp_path, form):
    source = write_corpus(tmp_path / "in", DOCUMENTS, form)
    arguments = [source, "--val-share", "0.41", "--shard-tokens", "10000", "--out"]
    command_here("prepare.py", *arguments, "one")
    assert run_ranks(3, "prepare.py", *arguments, "three") == [0] * 3
    for out in "one", "three":
        assert sorted(stream(tmp_path / out)) == sorted(expected_stream(DOCUMENTS))
        assert read_split(tmp_path / out, "train") == expected_stream(DOCUMENTS[:177])
        assert read_split(tmp_path / out, "val") == expected_stream(DOCUMENTS[177:])


def test_the_size_of_a_folder_with_several_formats_is_estimated_from_each(tmp_path):
    text = PROSE * 20
    (tmp_path / "large.txt").write_text(text)
    with gzip.open(tmp_path / "small.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": text}) + "\n")
    files = [str(path) for path in tmp_path.iterdir()]
    estimate = reader.estimate_content_bytes(files, reader.file_sizes(files))
    assert estimate == pytest.approx(2 * len(text.encode()), rel=0.1)


def test_val_share_counts_the_rows_of_parquet_by_their_footers(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in", [*DOCUMENTS, ""], ".parquet")
    files = sources.local_source("in", source).files
    counts = [sum(passage.is_start for passage in reader.read([file])) for file in files]
    with monkeypatch.context() as patch:
        patch.setattr(reader, "parquet_rows", None)  # no row can be read
        assert [reader.count_documents(file) for file in files] == counts
        assert reader.find_split(files, 0.5) == (1, 50, 0)
    (source / "000_00000.parquet").write_bytes(b"PAR1 or so")
    with pytest.raises(UserError, match="is damaged or cannot be read"):
        prepare.main(PrepareConfig(str(source), out=tmp_path / "out", val_share=0.1))


def test_another_val_share_is_another_preparation(tmp_path):
    source = str(write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl"))
    prepare.main(PrepareConfig(source, out=tmp_path / "out", val_share=0.01))
    assert shards.read_manifest(tmp_path / "out")["source"]["val_share"] == 0.01
    for other in None, 0.02:
        with pytest.raises(UserError, match="another preparation"):
            prepare.main(PrepareConfig(source, out=tmp_path / "out", val_share=other))
    for share in 0.0, 1.0, -1.0:
        with pytest.raises(UserError, match="above 0 and below 1"):
            prepare.main(PrepareConfig(source, out=tmp_path / "x", val_share=share))


def test_kills_do_not_change_the_output_with_val_share(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    config = PrepareConfig(str(source), "bpe:300", out=tmp_path / "whole", val_share=0.3,
                           shard_tokens=20_000)
    prepare.main(config)
    monkeypatch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 2000)
    calls = 0
    append = ShardWriter.append

    def die_sometimes(self, *arguments):
        nonlocal calls
        calls += 1
        if calls % 20 == 0:
            raise KeyboardInterrupt
        append(self, *arguments)
    monkeypatch.setattr(ShardWriter, "append", die_sometimes)
    for _ in range(100):
        with contextlib.suppress(KeyboardInterrupt):
            prepare.main(dataclasses.replace(config, out=tmp_path / "killed"))
            break
    assert calls > 40
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_bpe_is_not_trained_on_validation(tmp_path, monkeypatch):
    # a corpus
    documents = ["common words " * 30] * 30 + ["zyzzyva " * 50] * 10
    source = write_corpus(tmp_path / "in", documents, ".jsonl")
    prepare.main(PrepareConfig(str(source), "bpe:300", out=tmp_path / "out", val_share=0.25))
    bpe = shards.read_tokenizer(tmp_path / "out")
    assert len(bpe.encode(" words")) == 1 and len(bpe.encode("zyzzyva")) == 7

    # a large corpus: the start of every file
    documents = [f"{i} " * 300 for i in range(10, 50)]
    source = write_corpus(tmp_path / "numbered", documents, ".jsonl")
    files = sources.local_source("x", source).files
    monkeypatch.setattr(reader, "SAMPLE_BYTES", 6000)
    numbers = [int(text[:2]) for text in reader.sample_texts(files, 0.0, None)]
    assert numbers == [10, 11, 12, 23, 24, 25, 36, 37, 38]

    # a single text
    (tmp_path / "text.txt").write_text("a common word " * 90 + "zyzzyva " * 17)
    prepare.main(PrepareConfig(str(tmp_path / "text.txt"), "bpe:8192", out=tmp_path / "text"))
    assert len(shards.read_tokenizer(tmp_path / "text").encode(" zyzzyva")) == 8


@pytest.mark.parametrize("name, sentence", [
    ("bpe:", "has no valid size"), ("bpe:8k", "has no valid size"), ("bpe:256", "at least 257")])
def test_a_bpe_without_a_valid_size_gets_one_sentence(prose, tmp_path, name, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare.main(PrepareConfig(str(prose), name, out=tmp_path / "out"))


def test_a_shard_has_the_bytes_that_numpy_saves(tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    prepare.main(PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000))
    for path in (tmp_path / "out").glob("*.npy"):
        np.save(tmp_path / "copy.npy", np.load(path))
        assert (tmp_path / "copy.npy").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe:300", "char"])
def test_any_number_of_threads_writes_the_same_bytes(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4000)  # many batches
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    for workers in 1, 2, 5:
        prepare.main(PrepareConfig(str(source), tokenizer, out=tmp_path / f"out{workers}",
                                   workers=workers, shard_tokens=10_000))
        assert contents(tmp_path / f"out{workers}") == contents(tmp_path / "out1")
    if tokenizer == "gpt2":
        assert stream(tmp_path / "out1") == expected_stream(DOCUMENTS)


def test_without_gigatoken_the_bytes_are_the_same_and_a_sentence_says_so(
        tmp_path, monkeypatch, capsys):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".parquet")
    prepare.main(PrepareConfig(str(source), out=tmp_path / "with"))
    assert "tiktoken encodes instead" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    prepare.main(PrepareConfig(str(source), out=tmp_path / "without"))
    assert "gigatoken is not installed (pip install gigatoken)" in capsys.readouterr().out
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


def test_a_long_text_is_cut_between_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(reader, "LONG_DOCUMENT_BYTES", 4000)
    rng = random.Random(1)
    pieces = ["word", " ", "  ", "\n", "\n\n ", "1234", "'ll", "...", "你好", "\t"]
    long = "".join(rng.choice(pieces) for _ in range(30_000))
    documents = [long, "short", long[::-1]]
    for form in ".jsonl", ".txt":
        source = write_corpus(tmp_path / f"in{form}", documents, form)
        out = tmp_path / f"out{form}"
        prepare.main(PrepareConfig(str(source), out=out, shard_tokens=50_000))
        assert stream(out) == expected_stream(documents)


# --------------------------------------------------------------------------------------------------
# Kills

class Killed(BaseException):
    pass


def can_train_on(folder) -> bool:
    try:
        return bool(Shards(folder, "train"))
    except UserError:
        return False


@pytest.mark.parametrize("tokenizer, shard_tokens", [
    ("gpt2", 12_000), ("gpt2", 10**6), ("char", 10**6)], ids=["many shards", "few", "char"])
def test_a_kill_at_any_moment_does_not_change_the_output(
        tmp_path, monkeypatch, tokenizer, shard_tokens):
    """Each call that touches the disk is, in turn, the last one before the process dies."""
    monkeypatch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(reader, "LONG_DOCUMENT_BYTES", 8000)
    documents = [*DOCUMENTS[:50], PROSE * 2, *DOCUMENTS[50:100]]
    source = write_corpus(tmp_path / "in", documents, ".jsonl")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = PrepareConfig(str(source), tokenizer, shard_tokens=shard_tokens)
    prepare.main(dataclasses.replace(config, out=whole))
    calls = 0

    def die_at(limit, function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == limit:
                raise Killed
            return function(*arguments, **options)
        return call

    for limit in range(3, 10**6, 7):  # die a little later each time, and resume
        calls = 0
        with monkeypatch.context() as patch:
            for place, name in ((shard_writer.os, "fsync"), (shard_writer.os, "replace"),
                                (ShardWriter, "write"), (ShardWriter, "record"),
                                (shard_writer.Path, "unlink")):
                patch.setattr(place, name, die_at(limit, getattr(place, name)))
            try:
                prepare.main(dataclasses.replace(config, out=killed))
                break
            except Killed:
                assert (killed / "manifest.json").exists() or not can_train_on(killed)
    assert limit > 20
    assert contents(killed) == contents(whole)


@pytest.mark.slow
def test_kill_9_at_random_moments_does_not_change_the_output(tmp_path):
    documents = DOCUMENTS * 60
    source = write_corpus(tmp_path / "in", documents, ".parquet")
    config = PrepareConfig(str(source), out=tmp_path / "whole", shard_tokens=120_000, workers=2)
    prepare.main(config)
    rng = random.Random(0)
    kills = 0
    while True:
        process = fork(prepare.main, dataclasses.replace(config, out=tmp_path / "killed"))
        process.join(timeout=rng.uniform(0.1, 0.3) * 1.5**kills)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills > 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert stream(tmp_path / "killed") == expected_stream(documents)


# --------------------------------------------------------------------------------------------------
# Several processes

@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_the_files_and_join_their_manifests(command, tmp_path, processes):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".parquet", files=5)
    done = command("prepare.py", source, "--out", "out", "--shard-tokens", 10_000,
                   launcher=torchrun(processes))
    assert "300 documents" in done.stdout
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)
    names = list(contents(tmp_path / "out"))
    assert {"in_p00_val_000000.npy", f"in_p0{processes - 1}_train_000000.npy"} < set(names)
    assert sum("_val_" in name for name in names) == 1
    assert sum("json" in name or "lock" in name for name in names) == 1


def test_the_tasks_of_a_slurm_array_run_in_any_order(command_here, tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl", files=3)

    def run_task(number, count=3, **options):
        environment = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": "1",
                       "SLURM_ARRAY_TASK_COUNT": str(count)}
        return command_here("prepare.py", source, "--out", "out", "--shard-tokens", 10_000,
                            environment=environment, **options)
    assert "ready when all 3 parts are" in run_task(2).stdout
    with pytest.raises(UserError, match="not finished"):
        Shards(tmp_path / "out", "train")
    refused = run_task(1, count=1, check=False)  # an array with another number of tasks
    assert refused.returncode == 2 and "parts: 3, not 1" in refused.stderr
    assert "ready when all 3 parts are" in run_task(3).stdout
    assert "300 documents" in run_task(1).stdout
    assert "300 documents" in run_task(3).stdout  # nothing left to do
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)


# --------------------------------------------------------------------------------------------------
# FineWeb-Edu and existing shards

def test_fineweb_is_the_same_from_the_hub_from_a_copy_and_from_jsonl(
        command, command_here, hub, tmp_path):
    # serve a dataset with two subsets
    subset = write_corpus(tmp_path / "copy" / "sample" / "10BT", DOCUMENTS, ".parquet")
    card = "---\nconfigs:\n"
    for name, path in ("default", "data/*/*"), ("sample-10BT", "sample/10BT/*"):
        card += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
    files = {f"sample/10BT/{name}": content for name, content in contents(subset).items()}
    files["data/x/0.parquet"] = next(iter(files.values()))
    files["README.md"] = f"{card}---\n".encode()
    address = hub("HuggingFaceFW/fineweb-edu", files)
    online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}

    # prepare it in three ways
    command("fineweb.py", "--shard-tokens", 10_000, environment=online)
    command_here("fineweb.py", "--shard-tokens", 10_000, "--source", tmp_path / "copy",
                 "--out", "copied")
    jsonl = write_corpus(tmp_path / "other", DOCUMENTS, ".jsonl.zst")
    prepare.main(PrepareConfig(str(jsonl), out=tmp_path / "lines", shard_tokens=10_000))
    assert stream("edu_fineweb10B") == expected_stream(DOCUMENTS)
    assert shards.read_manifest("edu_fineweb10B")["source"]["revision"] == REVISION
    for path in sorted(Path("edu_fineweb10B").glob("*.npy")):
        name_in_lines = path.name.replace("edufineweb", "other")
        assert path.read_bytes() == (tmp_path / "copied" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "lines" / name_in_lines).read_bytes()

    # run it again, and with a subset that does not exist
    again = command("fineweb.py", "--shard-tokens", 10_000, environment=online)
    assert "is ready" in again.stdout
    done = command("fineweb.py", "--subset", "sample-9BT", environment=online, check=False)
    assert done.returncode == 2 and "sample-9BT" in done.stderr


def test_a_subset_is_found_in_a_copy_of_fineweb(tmp_path):
    hub, plain = tmp_path / "hub", tmp_path / "plain"
    for folder in hub / "sample" / "10BT", hub / "data" / "CC-MAIN-2024-10", plain:
        folder.mkdir(parents=True)
    assert fineweb.find_subset(hub, "sample-10BT") == hub / "sample" / "10BT"
    assert fineweb.find_subset(hub, "CC-MAIN-2024-10") == hub / "data" / "CC-MAIN-2024-10"
    assert fineweb.find_subset(plain, "sample-10BT") == plain
    with pytest.raises(UserError, match="holds no sample-100BT"):
        fineweb.find_subset(hub, "sample-100BT")


def llmc_shard(tokens: np.ndarray, announced: int | None = None) -> bytes:
    """A shard in llm.c's format."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens) if announced is None else announced
    return header.tobytes() + tokens.tobytes()


def test_published_tokens_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "COPY_TOKENS", 3000)
    tokens = np.array(expected_stream(DOCUMENTS), dtype=np.uint16)
    (tmp_path / "published").mkdir()
    for i, part in enumerate(np.split(tokens, [5000, 17_000])):
        name = f"fineweb_{'train' if i else 'val'}_{i:06d}.bin"
        (tmp_path / "published" / name).write_bytes(llmc_shard(part))
    fineweb.main(FinewebConfig(
        source=tmp_path / "published", pretokenized=True, shard_tokens=10_000))
    assert stream("edu_fineweb10B") == tokens.tolist()
    manifest = shards.read_manifest("edu_fineweb10B")
    assert manifest["documents"] == len(DOCUMENTS)
    assert [shard["tokens"] for shard in manifest["shards"]][:2] == [5000, 10_000]
    assert len(Shards("edu_fineweb10B", "val")) == 5000


@pytest.mark.parametrize("name", ["medieval", "train_of_thought", "x"])
def test_published_shards_keep_their_splits_with_any_name(tmp_path, name):
    (tmp_path / "in").mkdir()
    train = np.arange(40_000, dtype=np.uint16)
    val = np.full(5000, 7, dtype=np.uint16)
    np.save(tmp_path / "in" / f"{name}_train_000001.npy", train)
    np.save(tmp_path / "in" / f"{name}_val_000000.npy", val)
    config = PrepareConfig(str(tmp_path / "in"), pretokenized=True, out=tmp_path / "out")
    for part in "0/2", "1/2":
        prepare.main(dataclasses.replace(config, part=part))
    assert read_split(tmp_path / "out", "val") == val.tolist()
    assert read_split(tmp_path / "out", "train") == train.tolist()
    with pytest.raises(UserError, match="takes GPT-2's tokens"):
        prepare.main(dataclasses.replace(config, tokenizer="char"))
    with pytest.raises(UserError, match="existing shards keep their splits"):
        prepare.main(dataclasses.replace(config, val_share=0.1))


def test_damaged_published_shards_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    config = PrepareConfig(str(tmp_path / "in"), pretokenized=True, out=tmp_path / "out")
    with pytest.raises(UserError, match="holds no shards"):
        prepare.main(config)
    shard = llmc_shard(np.zeros(995, dtype=np.uint16), announced=1000)
    (tmp_path / "in" / "x_train_000001.bin").write_bytes(shard)
    with pytest.raises(UserError, match="announces 1,000 tokens"):
        prepare.main(config)
    tokens = np.array([50256, 7, 50257], dtype=np.uint16)
    np.save(tmp_path / "in" / "x_train_000000.npy", tokens)
    with pytest.raises(UserError, match="holds the id 50,257"):
        prepare.main(config)


# --------------------------------------------------------------------------------------------------
# Bad input

def test_empty_documents_are_left_out_and_counted(tmp_path, capsys):
    documents = ["", *DOCUMENTS[:50], " \n\t ", DOCUMENTS[50]]
    source = write_corpus(tmp_path / "in", documents, ".jsonl")
    prepare.main(PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=2000))
    assert stream(tmp_path / "out") == expected_stream(documents)
    assert shards.read_manifest(tmp_path / "out")["empty"] == 2
    assert "2 empty documents were left out" in capsys.readouterr().out


def test_bytes_that_are_not_utf8_are_repaired_and_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    line = b'{"text": "caf\xe9 and more of it"}\n'
    surrogate_line = b'{"text": "a lone \\ud83e surrogate"}\n'
    (tmp_path / "in" / "a.jsonl").write_bytes(line + surrogate_line * 9)
    column = pa.array([b"caf\xe9 and more of it"] * 9, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "in" / "b.parquet")
    prepare.main(PrepareConfig(str(tmp_path / "in"), out=tmp_path / "out"))
    text = "caf\ufffd and more of it"
    expected = [text, *["a lone \ufffd surrogate"] * 9, *[text] * 9]
    assert stream(tmp_path / "out") == expected_stream(expected)
    assert "19 documents held bytes that are not UTF-8" in capsys.readouterr().out


@pytest.mark.parametrize("files, sentence", [
    ({}, "holds no documents"),
    ({"a.jsonl": b""}, "holds no text"),
    ({"a.jsonl": b'{"text": "fine"}\n{"text": 7}\n'},
     r"a.jsonl, line 2, is not a JSON object with a string `text`"),
    ({"a.jsonl": b'{"text": "fine"}\n{"text": 0}\n'}, r"line 2, is not a JSON object"),
    ({"a.jsonl": b'{"text": "fine"}\n{"text": "cut of'}, r"line 2, is not a JSON object"),
    ({"a.jsonl.gz": gzip.compress(b'{"text": "fine"}\n' * 999)[:-20]},
     "damaged or cannot be read: .*Truncated"),
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


def test_a_parquet_file_without_text_names_its_columns(tmp_path):
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column `text`; its columns are: content, url"):
        prepare.main(PrepareConfig("x.parquet"))


@pytest.mark.parametrize("column, kind", [([1, 2], "int64"), ([["a"], ["b"]], "list<")])
def test_a_column_text_of_another_type_is_named(tmp_path, column, kind):
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=f"the column `text` holds values of type {kind}"):
        prepare.main(PrepareConfig("x.parquet"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.null(),
                                  pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_a_column_text_may_have_any_type_of_string(tmp_path, kind):
    texts = [None, *([None] if pa.types.is_null(kind) else DOCUMENTS[:9])]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "x.parquet")
    passages = reader.read([str(tmp_path / "x.parquet")])
    assert [passage.text for passage in passages] == [text or "" for text in texts]


def test_a_pipe_is_refused_instead_of_waiting_for_it(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("has no named pipes")
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "x.jsonl")
    for source in "in", "in/x.jsonl":
        with pytest.raises(UserError, match="is not a regular file"):
            prepare.main(PrepareConfig(source, out=tmp_path / "out"))


def test_a_byte_order_mark_before_a_jsonl_file_is_skipped(tmp_path):
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    (tmp_path / "in" / "x.jsonl").write_text(lines, encoding="utf-8-sig")
    prepare.main(PrepareConfig(str(tmp_path / "in"), out=tmp_path / "out"))
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)


def test_a_failing_source_is_retried_and_loses_nothing(tmp_path, monkeypatch, capsys):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    monkeypatch.setattr(reader, "RETRY_WAITS_S", (0, 0, 0))
    monkeypatch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4000)
    read_file = reader.read_file
    last_file_fails = True

    def flaky(path, cursor, val_share):
        for n, passage in enumerate(read_file(path, cursor, val_share)):
            if n == 20 or (last_file_fails and "002" in path):
                raise OSError(errno.EIO, "the wire broke")
            yield passage
    monkeypatch.setattr(reader, "read_file", flaky)
    config = PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000)
    sentence = r"002_00000.jsonl stopped after document 0 .* run the same command again to resume"
    with pytest.raises(UserError, match=sentence):
        prepare.main(config)
    warning = "000_00000.jsonl: [Errno 5] the wire broke; retrying in 0 s"
    assert warning in capsys.readouterr().err
    last_file_fails = False
    prepare.main(config)
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)


def test_a_full_disk_gets_one_sentence_and_the_same_command_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4000)
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    config = PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000)
    free = 60_000
    write = ShardWriter.write

    def write_to_small_disk(writer, data):
        nonlocal free
        data = memoryview(data).cast("B")
        write(writer, data[:free])
        free -= len(data)
        if free < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write_to_small_disk)
        sentence = r"disk of .* is full: free some space and run the same command again"
        with pytest.raises(UserError, match=sentence):
            prepare.main(config)
    assert shard_writer.read_json(tmp_path / "out" / "progress.json")["tokens"] > 0
    prepare.main(config)
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS)


@pytest.mark.parametrize("damage", [
    {"cursor": 5}, {"cursor": [0, 0]}, {"counts": {"tokens": "x"}}, {"tokens": None}, {"split": 3},
    {"starts": [0.5]}, {"starts": ""}, {"shards": [{}]}, {"shards": 1}], ids=str)
def test_a_damaged_state_of_a_preparation_gets_one_sentence(tmp_path, damage):
    def open_writer():
        return ShardWriter(tmp_path, "x", CharTokenizer("ab"), {"name": "x"})

    with open_writer() as writer:
        writer.append(np.array([0, 1]), np.array([0]))
        writer.commit((0, 1, 0))
    path = tmp_path / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError, match="is damaged: delete its folder"):
        open_writer()


def test_a_state_can_contain_a_lone_surrogate(tmp_path):
    state = {"name": "мир \ud800"}
    write_json(tmp_path / "progress.json", state)
    assert read_json(tmp_path / "progress.json") == state
    assert "мир" in (tmp_path / "progress.json").read_text(encoding="utf-8")


def test_an_output_folder_never_mixes_two_preparations(tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    config = PrepareConfig(str(source), out=tmp_path / "out", shard_tokens=10_000)
    prepare.main(config)
    before = contents(tmp_path / "out")
    prepare.main(config)  # nothing left to do

    # a file of the user
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="files that do not belong to this preparation"):
        prepare.main(config)
    (tmp_path / "out" / "thesis.txt").unlink()

    # other options, and another source
    one_file = str(source / "000_00000.jsonl")
    for other, sentence in (({"shard_tokens": 20_000}, "shard tokens: 10000, not 20000"),
                            ({"tokenizer": "char"}, "tokenizer: "),
                            ({"source": one_file}, "name: in, not 000_00000")):
        with pytest.raises(UserError, match=sentence):
            prepare.main(dataclasses.replace(config, **other))
    with open(one_file, "a") as file:
        file.write('{"text": "a document more"}\n')
    with pytest.raises(UserError, match=r"another preparation \(source: "):
        prepare.main(config)
    assert contents(tmp_path / "out") == before

    # shards without a manifest
    (tmp_path / "theirs").mkdir()
    np.save(tmp_path / "theirs" / "in_train_000001.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match="files that do not belong to this preparation"):
        prepare.main(dataclasses.replace(config, out=tmp_path / "theirs"))


def test_a_refusal_does_not_change_an_unfinished_folder(tmp_path, monkeypatch):
    # interrupt a preparation
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    out = tmp_path / "out"
    config = PrepareConfig(str(source), out=out, shard_tokens=10_000)

    def die(writer):
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "COMMIT_INTERVAL_S", 0)
        patch.setattr(reader, "BLOCK_BYTES", 4000)
        patch.setattr(ShardWriter, "finish", die)
        with pytest.raises(Killed):
            prepare.main(config)
    unfinished = contents(out)
    assert any(name.endswith(".open") for name in unfinished)

    # other options
    lock = {("progress.lock", b"")}
    for other in {"shard_tokens": 20_000}, {"tokenizer": "char"}, {"part": "0/2"}:
        with pytest.raises(UserError, match="another preparation"):
            prepare.main(dataclasses.replace(config, **other))
        assert contents(out).items() - lock == unfinished.items() - lock

    # a growing shard that lost its end
    growing = next(out.glob("*.open"))
    growing.write_bytes(unfinished[growing.name][:-2])
    with pytest.raises(UserError, match=f"{growing.name} is cut off"):
        prepare.main(config)
    growing.write_bytes(unfinished[growing.name])
    prepare.main(config)
    assert stream(out) == expected_stream(DOCUMENTS)


def test_joining_the_parts_can_fail_and_be_repeated(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in", DOCUMENTS[:60], ".jsonl", files=2)
    config = PrepareConfig(str(source), out=tmp_path / "out")
    prepare.main(dataclasses.replace(config, part="1/2"))
    write_json = shard_writer.write_json

    def fail_on_manifest(path, content):
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_json", fail_on_manifest)
        with pytest.raises(UserError, match="full"):
            prepare.main(dataclasses.replace(config, part="0/2"))
    prepare.main(dataclasses.replace(config, part="0/2"))
    assert stream(tmp_path / "out") == expected_stream(DOCUMENTS[:60])
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".npy", ".json"}
    with pytest.raises(UserError, match="no part 2/2"):
        prepare.main(dataclasses.replace(config, part="2/2"))


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    source = {"name": "x", "revision": "y"}
    with ShardWriter(tmp_path / "out", "in", GPT2, source):
        with pytest.raises(UserError, match="Another process is writing"):
            ShardWriter(tmp_path / "out", "in", GPT2, source)


def test_documents_that_start_with_a_megabyte_of_blanks_or_hold_nothing_else(tmp_path):
    texts = ["first", " " * 1_100_000 + "second", "third", " \n" * 700_000]
    source = write_corpus(tmp_path / "texts", texts, ".txt")
    prepare.main(PrepareConfig(str(source), out=tmp_path / "out"))
    manifest = shards.read_manifest(tmp_path / "out")
    assert (manifest["documents"], manifest["empty"]) == (3, 1)
    text = GPT2.decode(stream(tmp_path / "out")).replace(" ", "")
    assert text == "<|endoftext|>first<|endoftext|>second<|endoftext|>third"

    documents = ["\n" * 5_000_000 + "x" * 100, " " * 3_000_000, "y" * 100]
    source = write_corpus(tmp_path / "lines", documents, ".jsonl")
    prepare.main(PrepareConfig(str(source), out=tmp_path / "lines_out"))
    text = GPT2.decode(stream(tmp_path / "lines_out")).replace("\n", "")
    assert text == "<|endoftext|>" + "x" * 100 + "<|endoftext|>" + "y" * 100


def test_a_folder_may_hold_its_output_links_capital_suffixes_and_other_files(tmp_path):
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


def test_verify_rejects_an_edited_manifest(tmp_path):
    source = write_corpus(tmp_path / "in", DOCUMENTS, ".jsonl")
    out = tmp_path / "out"
    prepare.main(PrepareConfig(str(source), out=out, shard_tokens=10_000))
    manifest = shards.read_manifest(out)
    first, *rest = manifest["shards"]
    for change, sentence in (
            ({"tokens": 7}, "says 7 tokens"),
            ({"documents": 7}, "says 7 documents"),
            ({"shards": rest}, "holds no val shards"),
            ({"shards": [first, *rest[1:]]}, "add up"),
            ({"shards": [first, first, *rest]}, "not a manifest"),
            ({"shards": [{**first, "split": "test"}, *rest]}, "not a manifest"),
            ({"shards": [{**first, "file": "../x.npy"}, *rest]}, "not a manifest"),
            ({"shards": [{**first, "documents": 1}, *rest]}, "documents but the manifest says 1:"),
            ({"source": "x"}, "not a manifest")):
        (out / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=sentence):
            shards.verify(out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    shards.verify(out)

    # a shard too many, and one too few
    np.save(out / "in_train_000099.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match=r"in_train_000099.npy is not in the manifest"):
        shards.verify(out)
    (out / "in_train_000099.npy").unlink()
    (out / rest[0]["file"]).unlink()
    with pytest.raises(UserError, match="is missing, although it was complete"):
        prepare.main(PrepareConfig(str(source), out=out, shard_tokens=10_000))


# --------------------------------------------------------------------------------------------------
# A single text

def test_a_text_called_train_keeps_its_splits_apart(tmp_path):
    (tmp_path / "my_train_text.txt").write_text(PROSE)
    prepare.main(PrepareConfig("my_train_text.txt", out=tmp_path / "out"))
    assert len(Shards(tmp_path / "out", "train")) == int(0.9 * len(PROSE))
    (tmp_path / "out" / "manifest.json").unlink()
    assert len(Shards(tmp_path / "out", "train")) == int(0.9 * len(PROSE))


def test_the_last_tenth_of_a_text_is_for_validation(prose, tmp_path):
    prepare.main(PrepareConfig(str(prose)))
    out = tmp_path / "data" / "prose_char"
    manifest = json.loads((out / "manifest.json").read_text())
    tokenizer = load_tokenizer(manifest["tokenizer"])
    cut = int(len(PROSE) * 0.9)
    assert tokenizer.decode(read_split(out, "train")) == PROSE[:cut]
    assert tokenizer.decode(read_split(out, "val")) == PROSE[cut:]
    assert manifest["format"] == 1 and manifest["source"]["revision"] == sha256(prose)
    for shard in manifest["shards"]:
        assert sha256(out / shard["file"]) == shard["sha256"]
        assert np.load(out / shard["file"]).shape == (shard["tokens"],)


def test_with_gpt2s_tokenizer_each_split_starts_with_end_of_text(prose, tmp_path):
    config = PrepareConfig("tiny_pushkin", tokenizer="gpt2", text=prose, out=tmp_path / "poems")
    prepare.main(config)
    for split in "train", "val":
        first, *tokens = read_split(tmp_path / "poems", split)
        assert first == 50256
        assert GPT2.decode(tokens) in PROSE


def test_a_named_text_is_downloaded_and_its_checksum_compared(web, prose, tmp_path, monkeypatch):
    url = web({"/input.txt": prose.read_bytes()})

    def name_text(name, file, checksum):
        monkeypatch.setitem(sources.NAMED_TEXTS, name, (f"{url}/{file}", checksum))
    name_text("tiny_shakespeare", "input.txt", sha256(prose))
    assert sources.download("tiny_shakespeare").read_text() == PROSE
    name_text("tiny_shakespeare", "elsewhere", sha256(prose))
    assert sources.download("tiny_shakespeare").exists()  # it is not downloaded again
    name_text("other", "input.txt", "0" * 64)
    with pytest.raises(UserError, match="sha256 differs"):
        sources.download("other")
    name_text("lost", "lost.txt", "0" * 64)
    with pytest.raises(UserError, match="could not be downloaded"):
        sources.download("lost")
    files = (tmp_path / "data" / "downloads").iterdir()
    assert {path.name for path in files if path.suffix != ".lock"} == {"tiny_shakespeare.txt"}


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


def test_a_models_tokenizer_can_be_used_and_characters_it_lacks_are_named(tmp_path, capsys):
    tokenizer = CharTokenizer("\n abc")
    save_huggingface(tmp_path / "model", tiny_gpt(vocab_size=8), tokenizer)
    (tmp_path / "text.txt").write_text("\ufeff" + "abc é cab\n" * 20, encoding="utf-8")
    model = str(tmp_path / "model")
    prepare.main(PrepareConfig("text.txt", tokenizer=model, out=tmp_path / "out"))
    assert "left out: é" in capsys.readouterr().out
    assert tokenizer.decode(read_split(tmp_path / "out", "train")[:10]) == "abc   cab\n"


def test_the_tokenizer_of_prepared_data_can_be_used(prose, tmp_path):
    prepare.main(PrepareConfig(str(prose), tokenizer="bpe:300", out=tmp_path / "first"))
    (tmp_path / "other.txt").write_text("The moon gave the fox his light. " * 10)
    first = str(tmp_path / "first")
    prepare.main(PrepareConfig("other.txt", tokenizer=first, out=tmp_path / "second"))
    tokenizer = shards.read_tokenizer(tmp_path / "second")
    assert tokenizer.to_dict() == shards.read_tokenizer(tmp_path / "first").to_dict()
    assert tokenizer.decode(read_split(tmp_path / "second", "train")[1:]).startswith("The moon")


def test_the_command_lines_prepare_and_verify(command, command_here, prose, tmp_path):
    assert "prose_char is ready: vocabulary of" in command("prepare.py", prose).stdout
    out = tmp_path / "data" / "prose_char"
    output = command("shards.py", "info", out).stdout
    assert "The fox went out on a chilly night" in output
    assert f"{int(len(PROSE) * 0.9):,} tokens in 1 shards" in output
    assert "2 shards" in command_here("shards.py", "verify", out).stdout
    (tmp_path / "other.txt").write_text("Tschüß 🦊 " * 99, encoding="utf-8")
    ascii_only = {"PYTHONIOENCODING": "ascii"}  # a terminal that is not UTF-8
    command("prepare.py", "other.txt", environment=ascii_only)
    assert "Tsch?? ?" in command("shards.py", "info", "data/other_char",
                                 environment=ascii_only).stdout
    shard = next(out.glob("*_train_*.npy"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    done = command_here("shards.py", "verify", out, check=False)
    assert done.returncode == 2 and f"{shard.name} is damaged" in done.stderr
    done = command_here("prepare.py", "nothing.txt", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no file or folder nothing.txt")
