"""Any text into token shards.

    python prepare.py tiny_shakespeare                       # by character; --text FILE where there is no network
    python prepare.py my_novel.txt --tokenizer gpt2 --out data/novel
    python prepare.py my_corpus/                             # .parquet, .jsonl and .txt, alone or as .gz or .zst
    python prepare.py my_corpus/ --tokenizer bpe:8192        # a vocabulary of its own, trained on it
    python prepare.py openwebtext                            # a corpus of the Hugging Face Hub
    torchrun --nproc_per_node=3 prepare.py my_corpus/        # or a Slurm array: each process takes a part of the files
    python prepare.py fineweb10B/ --pretokenized             # shards that others made

Of one text the last 10% of the characters are validation, as in nanoGPT; of a corpus the first shard, or the first tenth
where it fills none; with --val-share the last of either. The output is the same for any number of workers, and the same
command goes on where a killed one stopped.
"""
import contextlib
import dataclasses
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

from common.devices import allowed_cores
from common.errors import UserError, report_user_errors
from common.files import DISK_FULL
from corpus import reader, sources
from corpus.encoding import Encoded, copied, encode, start_workers, tokenized
from corpus.shard_writer import ShardWriter
from shards import read_manifest
from tokenizer import CharTokenizer, Tokenizer, load_tokenizer, train_bpe

COMMIT_S = 1.0  # so much work, and no more, is done again after a kill
SMALL = 4 * reader.BLOCK_BYTES  # bytes in files that are tokenized before another process would have started


@dataclasses.dataclass(kw_only=True)
class Options:
    """How shards are written, whatever their source."""

    workers: int | None = None
    """Processes that tokenize; one a core when not given."""
    shard_tokens: int = 100_000_000
    """Tokens of a shard."""
    val_share: float | None = None
    """Share of the text for validation: one text's last characters, a corpus's last documents."""
    part: str | None = None
    """Do this part of the files alone, such as 3/8 for the fourth of eight, as torchrun or a Slurm array would say."""


@dataclasses.dataclass
class PrepareConfig(Options):
    """Turns text into token shards."""

    source: tyro.conf.Positional[str]
    """tiny_shakespeare, tiny_pushkin, openwebtext, or a file or folder of .parquet, .jsonl or .txt, also as .gz or .zst."""
    tokenizer: str | None = None
    """char (an id for each character of the text), gpt2, bpe:8192 (a byte-level BPE of that many ids, trained on the text), or a
    model, under any of its names, whose tokenizer is used. When not given, char for one text and gpt2 for a corpus."""
    text: Path | None = None
    """The file or folder that holds a named text, where there is no network."""
    out: Path | None = None
    """Folder for the shards; data/<name>_<tokenizer> when not given."""
    pretokenized: bool = False
    """The source is a folder of GPT-2 shards that others made: .bin as llm.c's or nanoGPT's, .npy as build-nanogpt's."""


def main(config: PrepareConfig):
    path = config.text or Path(config.source)
    one_text = not config.pretokenized and (config.source in sources.NAMED_TEXTS or sources.is_text(path))
    tokenizer = config.tokenizer or ("char" if one_text else "gpt2")
    name = sources.path_name(Path(config.source)).split(".")[0] or "corpus"
    out = config.out or sources.DATA / f"{name}_{re.sub(r'[^A-Za-z0-9.-]+', '-', tokenizer)}"
    source = sources.named_source(config.source, config.text, config.pretokenized, out)
    if config.pretokenized and tokenizer != "gpt2":
        raise UserError("--pretokenized takes GPT-2's tokens: leave --tokenizer out.")
    prepare(source, name, out, tokenizer, config)


def prepare(source: sources.Source, name: str, out: Path, tokenizer_name: str, options: Options):
    """Writes the source's tokens, or this process's part of them, into shards `out`/`name`_…, and goes on where an earlier
    call was killed."""
    if options.shard_tokens < 1 or (options.workers is not None and options.workers < 1):
        raise UserError("--shard-tokens and --workers are at least 1.")
    if options.val_share is not None and (not 0 < options.val_share < 1 or source.kind == "tokens"):
        raise UserError("--val-share is a share of text above 0 and below 1, such as 0.01.")
    part, parts = share_of_work(options.part)
    if parts > len(source.files):
        raise UserError(f"{source.name} has {len(source.files)} files, too few for {parts} processes: each takes whole files.")
    first = len(source.files) * part // parts
    files = source.files[first:len(source.files) * (part + 1) // parts]
    val_share = (options.val_share or reader.VAL_SHARE) * (source.kind == "text")
    val_from = reader.last_documents(source.files, options.val_share) if options.val_share and not val_share else None
    tokenizer, sizes = choose_tokenizer(tokenizer_name, source, val_share, val_from), reader.file_sizes(files)
    workers = 0 if source.kind == "tokens" or sum(sizes) < SMALL else options.workers or cores()
    share = {"val_share": options.val_share} if options.val_share else {}
    identity = {"name": source.name, "revision": source.revision, **share}
    with start_workers(workers, tokenizer) as pool, full_disk_explained(out):
        plan = make_plan(source, files, sizes, tokenizer, val_share, workers or 1)
        with ShardWriter(out, name, tokenizer, identity, options.shard_tokens, part, parts) as writer:
            if not writer.finished:
                print(f"{source.name}: {plan.describe(out)}" + " and the download" * reader.on_hub(files[0])
                      + f"; {writer.counts['tokens'] / 1e6:,.1f}M tokens are there already" * bool(writer.counts))
                passages = reader.read(files, writer.cursor, val_share)
                if val_from:
                    passages = reader.with_split(passages, (val_from[0] - first, *val_from[1:]))
                fill(writer, plan, tokenized(passages, tokenizer, pool) if source.kind != "tokens" else
                     copied(files, writer.cursor))
    report(out, parts)


def fill(writer: ShardWriter, plan: "Plan", encoded: Iterator[Encoded]):
    """Takes the tokens to the disk."""
    measure = "bytes" if plan.bytes else "tokens"
    unknown, committed = {}, time.monotonic()
    with contextlib.closing(encoded), tqdm(
            total=getattr(plan, measure), initial=writer.counts[measure], unit=measure[0].upper(), unit_scale=True,
            mininterval=0.5, disable=writer.part > 0) as bar:
        for piece in encoded:
            writer.append(piece.tokens, piece.starts, piece.split)
            writer.counts.update(piece.counts)
            unknown |= dict.fromkeys(piece.unknown)
            if time.monotonic() - committed > COMMIT_S:
                writer.commit(piece.cursor)
                committed = time.monotonic()
            bar.set_postfix_str(f"{writer.counts['documents']:,} documents, {writer.counts['tokens'] / 1e6:,.1f}M tokens",
                                refresh=False)
            bar.update(writer.counts[measure] - bar.n)
    writer.finish()
    if unknown:
        print(f"The tokenizer's alphabet lacks these characters, which become spaces or are left out: {''.join(unknown)}")


@contextlib.contextmanager
def full_disk_explained(out: Path):
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"The disk of {out} is full: make room and give the same command again; it goes on where this one "
                        "stopped.") from None


def report(out: Path, parts: int):
    """Says what is in the finished folder."""
    manifest = read_manifest(out)
    if not manifest:
        print(f"This part is ready; {out} is when all {parts} are")
        return
    tokens = Counter()
    for shard in manifest["shards"]:
        tokens[shard["split"]] += shard["tokens"]
    print(f"{out} is ready: vocabulary of {load_tokenizer(manifest['tokenizer']).vocab_size:,}, "
          f"{manifest['documents']:,} documents, {tokens['train']:,} tokens for training and {tokens['val']:,} for validation")
    if tokens["train"] < tokens["val"]:
        print("Validation is larger than training: with a smaller --shard-tokens, and another --out, it would not be")
    if manifest.get("empty"):
        print(f"{manifest['empty']:,} empty documents were left out")
    if manifest.get("repaired"):
        print(f"{manifest['repaired']:,} documents held bytes that are not UTF-8, which became U+FFFD")


def choose_tokenizer(name: str, source: sources.Source, val_share: float, val_from: reader.Cursor | None) -> Tokenizer:
    """The tokenizer that --tokenizer names; `char` takes its alphabet from the text, `bpe:N` its merges from a sample of it."""
    if name == "char":
        return CharTokenizer("".join(sorted(set().union(*(
            reader.text_of(passage)[0] for passage in reader.read(source.files, val_share=val_share))))))
    if name.startswith("bpe:"):
        if not name[4:].isdecimal():
            raise UserError(f"--tokenizer {name} names no size: bpe:8192 is a BPE of 8192 ids.")
        return train_bpe(reader.sample(source.files, val_share, val_from), int(name[4:]))
    if name == "gpt2":
        return load_tokenizer("gpt2")
    from checkpoint import load_model  # noqa: PLC0415 (imports torch, which the tokenizing processes can do without)
    return load_model(name)[1]


# ----------------------------------------------------------------------------------------------------------------
# Before it starts

class Plan(NamedTuple):
    """About how much is to come."""
    files: int
    bytes: int  # of text
    tokens: int
    disk_bytes: int
    seconds: float

    def describe(self, out: Path) -> str:
        free = shutil.disk_usage(next(path for path in out.absolute().joinpath("x").parents if path.exists())).free
        minutes = f"about {self.seconds / 60:.0f} min" if self.seconds > 90 else f"about {self.seconds:.0f} s"
        enough = "" if free > self.disk_bytes else "; THAT IS TOO LITTLE"
        text = f"about {millions(self.bytes)} MB of text, " if self.bytes else ""
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        return (f"{files}, {text}{millions(self.tokens)}M tokens: {millions(self.disk_bytes)} MB of disk "
                f"({free / 1e9:,.0f} GB are free{enough}), {minutes}")


def millions(number: int) -> str:
    return f"{number / 1e6:,.0f}" if number > 1e7 else f"{number / 1e6:.2g}"


def make_plan(source: sources.Source, files: list[str], sizes: list[int], tokenizer: Tokenizer, val_share: float,
              workers: int) -> Plan:
    """Measures the first of the text, and takes the rest for alike."""
    if source.kind == "tokens":
        return Plan(len(files), 0, sum(sizes) // 2, sum(sizes), sum(sizes) / 2e8)  # a disk that does 200 MB/s
    content, sample, size = reader.content_bytes(files, sizes), [], 0
    for passage in reader.read(files, val_share=val_share):
        sample.append(passage)
        size += len(passage.content)
        if size > reader.BLOCK_BYTES:
            break
    if not sample:
        return Plan(len(files), 0, 0, 0, 0.0)
    began = time.thread_time()  # others may be busy now
    piece = encode(tokenizer.to_dict(), sample)
    seconds = time.thread_time() - began
    share = content / max(1, size)
    text, tokens = round(share * piece.counts["bytes"]), round(share * len(piece.tokens))
    return Plan(len(files), text, tokens, tokens * piece.tokens.itemsize, share * seconds / workers)


def cores() -> int:
    """Cores that this process may use, shared with the others that torchrun started here."""
    return max(1, allowed_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_of_work(part_of: str | None) -> tuple[int, int]:
    """This process's part of the files, and the number of parts: from `part_of`, else torchrun, else a Slurm array."""
    rank, world, task, first, step, tasks = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", "0"), ("WORLD_SIZE", "1"), ("SLURM_ARRAY_TASK_ID", "0"), ("SLURM_ARRAY_TASK_MIN", "0"),
        ("SLURM_ARRAY_TASK_STEP", "1"), ("SLURM_ARRAY_TASK_COUNT", "1")))
    part, parts = (rank, world) if world > 1 else ((task - first) // max(1, step), tasks)
    if part_of is not None:
        named = re.fullmatch(r"(\d+)/(\d+)", part_of)
        part, parts = map(int, named.groups()) if named else (0, 0)
    if not 0 <= part < parts:
        raise UserError(f"There is no part {part_of or f'{part}/{parts}'}: --part 3/8 is the fourth of eight.")
    return part, parts


if __name__ == "__main__":
    with report_user_errors(every_rank=True):
        main(tyro.cli(PrepareConfig))
