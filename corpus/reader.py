"""Documents out of files: parquet, jsonl and text, compressed or not, here or on the Hugging Face Hub.

A document is what jsonl and parquet hold under `text`, or a whole text file. It comes as one passage, or as several where
it is long: `read(files, cursor)` goes on at any of them, and what it yields depends on the files alone.
"""
import codecs
import errno
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Literal, NamedTuple

# pyarrow, fsspec and datasets are imported where they are needed: the processes that tokenize import this module too.
from common.errors import UserError
from corpus.sources import codec_of, kind_of

BLOCK_BYTES = 2**20  # bytes that are read, characters that are tokenized at a time
LONG = 4 * BLOCK_BYTES  # bytes of a document from which on it is cut into passages of a block
VAL_SHARE = 0.1  # of a single text's characters, its last, where no other share is asked for
SAMPLE_BYTES = 10**8  # of text, at most, that a tokenizer is trained on
WAITS_S = (1, 2, 4, 8, 16, 32)  # before a source that failed is asked again

Cursor = tuple[int, int, int]  # what comes next: file, document in it, passage of that


class Passage(NamedTuple):
    """A document, or a part of a long one."""
    content: bytes
    form: Literal["json", "text", "repaired"]  # a line of JSON, UTF-8, or UTF-8 that was not at first
    starts: bool  # whether the document starts here
    split: str | None  # "train" or "val" where the source decides it
    path: str
    cursor: Cursor  # what comes after it


def read(files: list[str], cursor: Cursor = (0, 0, 0), val_share: float = 0.0) -> Iterator[Passage]:
    """The passages of the files, one file after the other, from `cursor` on.

    With `val_share` the one file is a text of which this share, its last, is for validation. A source that fails on the way is asked
    again after WAITS_S. Raises UserError for one that goes on failing, and for a file that is damaged.
    """
    while cursor[0] < len(files):
        path, waits = files[cursor[0]], iter(WAITS_S)
        while True:
            try:
                for passage in passages(path, cursor, val_share):
                    yield passage
                    cursor, waits = passage.cursor, iter(WAITS_S)
                break
            except UserError:
                raise
            except Exception as error:  # every layer between here and the network has exceptions of its own
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                if not may_pass(path, error):
                    raise UserError(f"{path} is damaged or cannot be read: {reason}.") from None
                wait = next(waits, None)
                if wait is None:
                    raise UserError(f"{path} stopped after document {cursor[1]:,} and does not answer ({reason}): "
                                    "the same command goes on from there.") from None
                print(f"{path}: {reason}; asking again in {wait} s", file=sys.stderr)
                time.sleep(wait)
        cursor = (cursor[0] + 1, 0, 0)


def with_split(passages: Iterator[Passage], val_from: Cursor) -> Iterator[Passage]:
    """The same passages, for validation where they belong to documents from the place `val_from` on."""
    for passage in passages:
        yield passage._replace(split="train" if passage.cursor <= val_from else "val")


def last_documents(files: list[str], share: float) -> Cursor:
    """Where the last documents of the files begin that are this share of all, at least one and not all of them; counting them
    reads all files once."""
    counts = [sum(passage.starts for passage in read([path])) for path in files]
    first = min(max(1, round(sum(counts) * (1 - share))), sum(counts) - 1)
    for file, count in enumerate(counts):
        if first < count:
            return file, first, 0
        first -= count
    raise UserError("There is no text to divide.")


def sample(files: list[str], val_share: float, val_from: Cursor | None) -> Iterator[str]:
    """What a tokenizer is trained on: text that is not known to be for validation, the first SAMPLE_BYTES of it, of several files
    evenly from each."""
    for i in range(len(files)):
        passages, size = read(files[:i + 1], (i, 0, 0), val_share), 0
        for passage in with_split(passages, val_from) if val_from else passages:
            if size >= SAMPLE_BYTES / len(files):
                break
            if passage.split != "val":
                size += len(passage.content)
                yield text_of(passage)[0]


def on_hub(path: str) -> bool:
    return path.startswith("hf://")


def may_pass(path: str, error: Exception) -> bool:
    """Whether the failure may be over when the file is asked again."""
    return on_hub(path) or getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)


# ----------------------------------------------------------------------------------------------------------------
# How much is in them

def file_sizes(files: list[str]) -> list[int]:
    """Bytes of each file."""
    if not on_hub(files[0]):
        return [os.path.getsize(file) for file in files]
    import fsspec  # noqa: PLC0415
    filesystem, _ = fsspec.core.url_to_fs(files[0])
    return [filesystem.size(file) for file in files]


def content_bytes(files: list[str], sizes: list[int]) -> int:
    """About how many bytes `read` will yield, from a look into the first file of each kind."""
    shares, total = {}, 0
    for path, size in zip(files, sizes):
        kind = kind_of(path), codec_of(path)
        if kind not in shares and size:
            shares[kind] = share_of_content(path, size)
        total += size and size * shares[kind]
    return round(total)


def share_of_content(path: str, size: int) -> float:
    """Bytes of content in a byte of the file."""
    try:
        if kind_of(path) == ".parquet":
            with open_parquet(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                column = file.schema_arrow.names.index("text")
                return sum(group.column(column).total_uncompressed_size for group in groups) / size
        if codec_of(path):
            raw, stream = open_stream(path)
            return len(stream.read(16 * BLOCK_BYTES)) / max(1, raw.tell())
    except (OSError, ValueError):
        pass  # damaged, as reading will say
    return 1.0


# ----------------------------------------------------------------------------------------------------------------
# What is in them

def passages(path: str, cursor: Cursor, val_share: float) -> Iterator[Passage]:
    """The passages of one file, from `cursor` on."""
    file, document, part = cursor
    if kind_of(path) == ".txt" or val_share:
        texts = halves(path, val_share) if val_share else [(None, text_blocks(path))]
        for number, (split, blocks) in islice(enumerate(texts), document, None):
            for i, block in islice(enumerate(blocks if split else without_blank(blocks)), part, None):
                yield Passage(block.encode(), "text", i == 0, split, path, (file, number, i + 1))
            part = 0
        return
    form = "text" if kind_of(path) == ".parquet" else "json"
    contents = parquet_rows(path, document) if form == "text" else islice(open_stream(path)[1], document, None)
    for number, content in enumerate(contents, document):
        passage = Passage(content, form, True, None, path, (file, number + 1, 0))
        if len(content) <= LONG:
            yield passage
        else:
            text, whole = text_of(passage)
            del content, passage  # hundreds of megabytes, perhaps
            for i, block in islice(enumerate(without_blank(cut_text(text))), part, None):
                yield Passage(block.encode(), "text" if whole else "repaired", i == 0, None, path,
                              (file, number, i + 1))
        part = 0


def without_blank(blocks: Iterator[str]) -> Iterator[str]:
    """The blocks of a document; a single empty one where there is nothing to see in any."""
    blank = []
    for block in blocks:
        if block.strip():
            yield from blank
            yield block
            yield from blocks
            return
        blank.append(block)
    yield ""


def halves(path: str, val_share: float) -> Iterator[tuple[str, Iterator[str]]]:
    """One text's two splits: the blocks of its last `val_share` for validation, then of the rest for training."""
    length = sum(map(len, text_blocks(path)))
    if length < 100:  # each split needs a token and the one that follows it
        raise UserError(f"{path} holds {length} characters, too few to learn from; at least 100 are needed.")
    cut = int(length * (1 - val_share))
    yield "val", excerpt(path, cut, length)
    yield "train", excerpt(path, 0, cut)


def excerpt(path: str, begin: int, end: int) -> Iterator[str]:
    """Blocks of the file's characters begin to end-1."""
    position = 0
    for block in text_blocks(path):
        if part := block[max(0, begin - position):max(0, end - position)]:
            yield part
        position += len(block)


def open_file(path: str):
    """The file, here or on the Hub."""
    if not on_hub(path):
        return open(path, "rb")
    import fsspec  # noqa: PLC0415
    return fsspec.open(path).open()


def open_parquet(path: str):
    """The parquet file, whose column `text` is known to be there."""
    import pyarrow.parquet as pq  # noqa: PLC0415
    file = pq.ParquetFile(open_file(path), buffer_size=16 * BLOCK_BYTES)
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path} has no column `text`, but: {', '.join(file.schema_arrow.names)}.")
    return file


def parquet_rows(path: str, skip: int) -> Iterator[bytes]:
    """UTF-8 of the column `text`; whole row groups that are skipped are not read."""
    import pyarrow as pa  # noqa: PLC0415
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if rows > skip:
                for table in file.iter_batches(32, row_groups=[group], columns=["text"], use_threads=False):
                    column = table.column(0)
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    column = column.cast("large_binary")  # a row may hold bytes that are no UTF-8
                    for value in column[min(skip, len(column)):]:  # one by one: a list would hold them all
                        yield value.as_py() or b""
                    skip = max(0, skip - len(column))
            else:
                skip -= rows


def open_stream(path: str) -> tuple[io.IOBase, io.BufferedReader]:
    """The file, and the stream of what it holds, decompressed."""
    import pyarrow as pa  # noqa: PLC0415
    raw = open_file(path)
    codec = codec_of(path)
    if codec and not raw.read(1):
        raise UserError(f"{path} is empty, which no compressed file is: its download broke off.")
    raw.seek(0)
    return raw, io.BufferedReader(pa.CompressedInputStream(raw, codec) if codec else raw, BLOCK_BYTES)


def text_blocks(path: str) -> Iterator[str]:
    """A text file in blocks of about BLOCK_BYTES characters, cut where tokens end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    stream, rest, position = open_stream(path)[1], "", 0
    while data := stream.read(BLOCK_BYTES):
        try:
            rest += decoder.decode(data)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (about byte {position + error.start:,}): convert it first, for "
                            "instance with iconv.") from None
        position += len(data)
        cut = token_end(rest, len(rest))
        yield rest[:cut]
        rest = rest[cut:]
    if decoder.getstate()[0]:
        raise UserError(f"{path} is cut off inside a character.")
    if rest:
        yield rest


def cut_text(text: str) -> Iterator[str]:
    """The text in parts of at most BLOCK_BYTES characters, cut where tokens end: tokenizing a part takes memory in proportion."""
    begin = 0
    while len(text) - begin > BLOCK_BYTES:
        end = token_end(text, begin + BLOCK_BYTES, begin)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def token_end(text: str, end: int, begin: int = 0) -> int:
    """The last place up to `end` where a blank or line feed follows something visible; `end` where there is none.

    GPT-2's pattern always ends a token there, so the parts have the tokens that the whole has, but for a megabyte without
    such a place.
    """
    found = re.compile(r"[\s\S]*\S(?=[ \n])").match(text, begin, end)
    return found.end() if found else end


def text_of(passage: Passage) -> tuple[str, bool]:
    """The passage's text, and whether it is all there: bytes that are not UTF-8, and halves of surrogate pairs, become
    U+FFFD."""
    text, whole = passage.content, passage.form != "repaired"
    try:
        text = text.decode()
    except UnicodeDecodeError:
        text, whole = text.decode(errors="replace"), False
    if passage.form != "json" or text.isspace():
        return text, whole
    try:
        document = json.loads(text)["text"]
        if not isinstance(document, str | None):
            raise TypeError
        if document and "\\u" in text:  # the only way for half of a surrogate pair to come in
            document.encode()
    except UnicodeEncodeError:
        document, whole = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), False
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{passage.path}, line {passage.cursor[1]:,}, is not a JSON object with a string `text` (this program "
                        f"reads one object a line, in UTF-8): {text[:60]!r}.") from None
    return document or "", whole
