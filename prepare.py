"""Tokenize any text into token shards.

    python prepare.py tiny_shakespeare                    # one id per character
    python prepare.py tiny_shakespeare --text FILE        # without a network
    python prepare.py my_novel.txt --tokenizer gpt2 --out data/novel
    python prepare.py my_corpus/                          # .parquet, .jsonl, .txt, also .gz or .zst
    python prepare.py my_corpus/ --tokenizer bpe:8192     # trains a tokenizer on the corpus
    python prepare.py openwebtext                         # a corpus on the Hugging Face Hub
    python prepare.py fineweb10B/ --pretokenized          # existing shards of GPT-2 tokens
    torchrun --nproc_per_node=3 prepare.py my_corpus/     # each process takes a part of the files

Validation is the last 10% of a single text's characters, as in nanoGPT, or the first shard of a
corpus (the first 10% if the corpus fills no shard). With --val-share it is the last part of either.
The output does not depend on the number of threads. Run the same command again to resume.
"""
import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.program import report_user_errors

import numpy as np
import tyro
from tqdm import tqdm

from common.devices import allowed_cores
from common.errors import UserError
from common.files import DISK_FULL
from corpus import encoding, reader, sources
from corpus.fast_bpe import BatchEncoder
from corpus.shard_writer import ShardWriter
from shards import MANIFEST, read_manifest, read_tokenizer
from tokenizer import CharTokenizer, Tokenizer, code_points, load_tokenizer, train_bpe

COMMIT_INTERVAL_S = 1.0  # after the sample for the estimate, a kill loses at most this much work
SAMPLE_S = 2.0  # how long the first batches are measured to estimate the time of all
SAMPLE_TOKENS = 2**26  # at most this many are measured, and kept until the estimate is printed
DISK_BYTES_PER_S = 2e8  # assumed in the estimate for writing and hashing shards


@dataclasses.dataclass(kw_only=True)
class ShardOptions:
    """How to write shards, from any source."""

    workers: int | None = None
    """Number of threads that tokenize; one per core if not given."""
    shard_tokens: int = 100_000_000
    """Number of tokens in a shard."""
    val_share: float | None = None
    """Fraction of the text for validation: a text's last characters, a corpus's last documents."""
    part: str | None = None
    """Process only this part of the files: 3/8 is the fourth of eight.
    torchrun and Slurm arrays set it."""


@dataclasses.dataclass
class PrepareConfig(ShardOptions):
    """Turns text into token shards."""

    source: tyro.conf.Positional[str]
    """tiny_shakespeare, tiny_pushkin, openwebtext, or a file or folder of .parquet, .jsonl or .txt.
    Files may be compressed (.gz or .zst)."""
    tokenizer: str | None = None
    """char (one id per character of the text), gpt2, or bpe:8192 (trains a BPE with 8192 ids).
    A folder of prepared data or a model also works: its tokenizer is used.
    If not given, char for a single text and gpt2 for a corpus."""
    text: Path | None = None
    """File or folder with the content of a named text, instead of downloading it."""
    out: Path | None = None
    """Output folder; data/<name>_<tokenizer> if not given."""
    pretokenized: bool = False
    """The source is a folder of GPT-2 shards: .bin of llm.c or nanoGPT, .npy of build-nanogpt."""


def main(config: PrepareConfig):
    # choose the defaults
    path = config.text or Path(config.source)
    is_single_text = config.source in sources.NAMED_TEXTS or sources.is_text(path)
    tokenizer = config.tokenizer
    if tokenizer is None:
        tokenizer = "char" if is_single_text and not config.pretokenized else "gpt2"
    name = sources.path_name(Path(config.source)).split(".")[0] or "corpus"
    suffix = re.sub(r"[^A-Za-z0-9.-]+", "-", tokenizer)
    out = config.out or sources.DATA / f"{name}_{suffix}"

    source = sources.find_source(config.source, config.text, config.pretokenized, out)
    if config.pretokenized and tokenizer != "gpt2":
        raise UserError("--pretokenized takes GPT-2's tokens: leave out --tokenizer.")
    prepare(source, name, out, tokenizer, config)


def prepare(source: sources.Source, name: str, out: Path, tokenizer_name: str,
            options: ShardOptions):
    """Writes the source's tokens, or this process's part, into the shards `out`/`name`_….

    Resumes an earlier call that was interrupted.
    """
    check_options(options, source)

    # take this process's part of the files
    part, parts = find_part(options.part)
    if parts > len(source.files):
        raise UserError(f"{source.name} has {len(source.files)} files, too few for {parts} "
                        "processes, each of which takes whole files: start fewer processes.")
    first = len(source.files) * part // parts
    stop = len(source.files) * (part + 1) // parts
    files = source.files[first:stop]

    # find where validation begins: a share of a text's characters, or a document of a corpus
    val_share = 0.0
    val_from = None
    if source.kind == "text":
        val_share = options.val_share or reader.VAL_SHARE
    elif options.val_share:
        val_from = reader.find_split(source.files, options.val_share)

    tokenizer = choose_tokenizer(tokenizer_name, source, val_share, val_from)
    identity = {"name": source.name, "revision": source.revision}
    if options.val_share:
        identity["val_share"] = options.val_share
    encoder = BatchEncoder(tokenizer)

    with report_full_disk(out), ShardWriter(out, name, tokenizer, identity, options.shard_tokens,
                                            part, parts) as writer:
        if not writer.finished:
            if source.kind == "tokens":
                batches = encoding.copy_shards(files, writer.cursor)
            else:
                passages = reader.read(files, writer.cursor, val_share)
                if val_from:
                    file, document, passage = val_from
                    val_in_part = file - first, document, passage  # counts this part's files only
                    passages = reader.assign_split(passages, val_in_part)
                threads = options.workers or available_cores()
                batches = encoding.encode_passages(passages, encoder, threads)
            with contextlib.closing(batches):
                plan, sample = make_plan(source, files, batches, writer.counts)
                print_plan(plan, source, files, out, writer.counts)
                write_shards(writer, plan, itertools.chain(sample, batches))
    print_summary(out, parts)


def check_options(options: ShardOptions, source: sources.Source):
    if options.shard_tokens < 1 or (options.workers is not None and options.workers < 1):
        raise UserError("--shard-tokens and --workers must be at least 1.")
    share = options.val_share
    if share is not None and source.kind == "tokens":
        raise UserError("--val-share needs text: existing shards keep their splits.")
    if share is not None and not 0 < share < 1:
        raise UserError("--val-share must be above 0 and below 1, for example 0.01.")


def choose_tokenizer(name: str, source: sources.Source, val_share: float,
                     val_from: reader.Cursor | None) -> Tokenizer:
    """Returns the tokenizer that --tokenizer names.

    `char` takes its alphabet from the whole source; `bpe:N` is trained on a sample of it.
    """
    if name == "char":
        alphabet = np.zeros(0x110000, dtype=bool)  # for each code point
        for passage in reader.read(source.files, val_share=val_share):
            alphabet[code_points(passage.text)] = True
        return CharTokenizer("".join(map(chr, np.flatnonzero(alphabet))))
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isdecimal():
            raise UserError(f"--tokenizer {name} has no valid size: write bpe:8192 for a BPE with "
                            "8192 ids.")
        return train_bpe(reader.sample_texts(source.files, val_share, val_from), int(size))
    if name == "gpt2":
        return load_tokenizer("gpt2")
    if (Path(name) / MANIFEST).exists():
        return read_tokenizer(name)
    from checkpoint import load_model  # noqa: PLC0415 (imports torch)
    return load_model(name)[1]


# --------------------------------------------------------------------------------------------------
# The plan, printed before the work starts

class Plan(NamedTuple):
    """An estimate of the work."""
    bytes: int  # of text, 0 for existing shards
    tokens: int
    disk_bytes: int
    seconds: float


def make_plan(source: sources.Source, files: list[str], batches: Iterator[encoding.EncodedBatch],
              counts: Counter) -> tuple[Plan, list[encoding.EncodedBatch]]:
    """Take batches for SAMPLE_S and extrapolate. Returns the plan and the batches taken.

    `counts` is what an earlier call has written.
    """
    sizes = reader.file_sizes(files)
    if source.kind == "tokens":
        total = sum(sizes)
        return Plan(0, total // 2, total, total / DISK_BYTES_PER_S), []
    times = [time.monotonic()]  # before and after each batch
    sample = []
    sample_tokens = 0
    content_bytes = 0  # of all files; not needed if the sample is everything
    for batch in batches:
        sample.append(batch)
        sample_tokens += len(batch.tokens)
        times.append(time.monotonic())
        # the first batch waits until others have been read
        if times[-1] - times[1] > SAMPLE_S or sample_tokens > SAMPLE_TOKENS:
            content_bytes = reader.estimate_content_bytes(files, sizes)
            break

    # extrapolate the text and its tokens
    sample_bytes = sum(batch.counts["bytes"] for batch in sample)
    done_bytes = counts["bytes"] + sample_bytes
    ratio = sample_bytes / max(1, sum(batch.size for batch in sample))
    total_bytes = max(done_bytes, round(content_bytes * ratio))
    tokens = round(total_bytes * sample_tokens / max(1, sample_bytes))
    itemsize = sample[0].tokens.itemsize if sample else 2

    # extrapolate the time of the second half, because the first fills the tokenizer's caches
    middle = len(sample) // 2
    measured_bytes = sum(batch.counts["bytes"] for batch in sample[middle:])
    seconds_per_byte = (times[-1] - times[middle]) / max(1, measured_bytes)
    seconds = times[-1] - times[0] + (total_bytes - done_bytes) * seconds_per_byte
    disk_bytes = tokens * itemsize
    seconds += disk_bytes / DISK_BYTES_PER_S
    return Plan(total_bytes, tokens, disk_bytes, seconds), sample


def print_plan(plan: Plan, source: sources.Source, files: list[str], out: Path, counts: Counter):
    """Prints the plan, and what an earlier call has finished."""
    free = shutil.disk_usage(out).free
    enough = "" if free > plan.disk_bytes else "; NOT ENOUGH"
    number = "1 file" if len(files) == 1 else f"{len(files):,} files"
    text = f"about {format_millions(plan.bytes)} MB of text, " if plan.bytes else ""
    duration = f"{plan.seconds:.2g} s"
    if plan.seconds > 90:
        duration = f"{plan.seconds / 60:.0f} min"
    if reader.is_on_hub(files[0]):
        duration += " and the download"
    done = f"; {counts['tokens'] / 1e6:,.1f}M tokens are already done" if counts else ""
    print(f"{source.name}: {number}, {text}{format_millions(plan.tokens)}M tokens: "
          f"{format_millions(plan.disk_bytes)} MB of disk ({free / 1e9:,.0f} GB free{enough}), "
          f"about {duration}{done}")


def format_millions(number: int) -> str:
    return f"{number / 1e6:,.0f}" if number > 1e7 else f"{number / 1e6:.2g}"


# --------------------------------------------------------------------------------------------------
# Writing

def write_shards(writer: ShardWriter, plan: Plan, batches: Iterator[encoding.EncodedBatch]):
    """Writes the batches to disk with a progress bar, and commits once in a while."""
    unit = "bytes" if plan.bytes else "tokens"
    unknown = {}  # an ordered set
    last_commit = time.monotonic()
    bar = tqdm(total=getattr(plan, unit), initial=writer.counts[unit], unit=unit[0].upper(),
               unit_scale=True, mininterval=0.5, disable=writer.part > 0)
    with bar:
        for batch in batches:
            writer.append(batch.tokens, batch.starts, batch.split)
            writer.counts.update(batch.counts)
            unknown |= dict.fromkeys(batch.unknown)
            if time.monotonic() - last_commit > COMMIT_INTERVAL_S:
                writer.commit(batch.cursor)
                last_commit = time.monotonic()
            documents = writer.counts["documents"]
            tokens = writer.counts["tokens"] / 1e6
            bar.set_postfix_str(f"{documents:,} documents, {tokens:,.1f}M tokens", refresh=False)
            bar.update(writer.counts[unit] - bar.n)
    writer.finish()
    if unknown:
        print("The tokenizer lacks these characters, which become spaces or are left out: "
              + "".join(unknown))


@contextlib.contextmanager
def report_full_disk(out: Path):
    """Turns the error of a full disk into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"The disk of {out} is full: free some space and run the same command "
                        "again to resume.") from None


def print_summary(out: Path, parts: int):
    """Prints what the finished folder holds."""
    manifest = read_manifest(out)
    if not manifest:
        print(f"This part is finished; {out} is ready when all {parts} parts are.")
        return
    tokens = Counter()
    for shard in manifest["shards"]:
        tokens[shard["split"]] += shard["tokens"]
    vocab_size = load_tokenizer(manifest["tokenizer"]).vocab_size
    print(f"{out} is ready: vocabulary of {vocab_size:,}, {manifest['documents']:,} documents, "
          f"{tokens['train']:,} tokens for training and {tokens['val']:,} for validation")
    if tokens["train"] < tokens["val"]:
        print("Validation is larger than training: choose a smaller --shard-tokens and another "
              "--out to change that.")
    if manifest.get("empty"):
        print(f"{manifest['empty']:,} empty documents were left out.")
    if manifest.get("repaired"):
        print(f"{manifest['repaired']:,} documents held bytes that are not UTF-8; they became "
              "U+FFFD.")


# --------------------------------------------------------------------------------------------------
# Cores and parts

def available_cores() -> int:
    """Returns the cores for this process, shared with the processes that torchrun started here."""
    return max(1, allowed_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def find_part(option: str | None) -> tuple[int, int]:
    """Returns (this process's part of the files, number of parts).

    They come from the option --part, else from torchrun, else from a Slurm array.
    """
    def variable(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    if option is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", option)
        part, parts = map(int, match.groups()) if match else (0, 0)
    elif variable("WORLD_SIZE", 1) > 1:
        part = variable("RANK", 0)
        parts = variable("WORLD_SIZE", 1)
    else:
        task = variable("SLURM_ARRAY_TASK_ID", 0) - variable("SLURM_ARRAY_TASK_MIN", 0)
        part = task // max(1, variable("SLURM_ARRAY_TASK_STEP", 1))
        parts = variable("SLURM_ARRAY_TASK_COUNT", 1)
    if not 0 <= part < parts:
        raise UserError(f"The files have no part {option or f'{part}/{parts}'}: "
                        "--part 3/8 is the fourth of eight.")
    return part, parts


if __name__ == "__main__":
    with report_user_errors(every_rank=True):
        main(tyro.cli(PrepareConfig))
