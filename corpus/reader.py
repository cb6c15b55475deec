"""Read documents from parquet, jsonl and text files: local or on the Hub, compressed or not.

A document is the `text` of a parquet row or of a jsonl line, or a whole text file. It is read as
one passage, a long one as several. `read(files, cursor)` resumes after any passage, and what it
yields depends on the files only.
"""
import codecs
import contextlib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import parse_json
from corpus.sources import codec_of, kind_of
from tokenizer import without_surrogates

BLOCK_BYTES = 2**20  # bytes to read, or characters to tokenize, at a time
LONG_DOCUMENT_BYTES = 4 * BLOCK_BYTES  # a longer document is cut into passages of one block
VAL_SHARE = 0.1  # by default, the last 10% of a single text's characters are for validation
SAMPLE_BYTES = 10**8  # a tokenizer is trained on at most this much text
MIN_TEXT_CHARS = 100  # each split needs a token and the one that follows
RETRY_WAITS_S = (1, 2, 4, 8, 16, 32)  # after a temporary failure
TEMPORARY_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)

Cursor = tuple[int, int, int]  # what to read next: file, document in it, passage of that document


class Passage(NamedTuple):
    """A document, or a part of a long one."""
    text: str
    size: int  # bytes in the file: of the text, or of the JSON line
    intact: bool  # False for a passage of a document that had to be repaired
    is_start: bool  # True for the first passage of a document
    split: str | None  # "train" or "val", or None if the shard writer decides
    cursor: Cursor  # of the next passage


def read(files: list[str], cursor: Cursor = (0, 0, 0),
         val_share: float = 0.0) -> Iterator[Passage]:
    """Yields the passages of the files in order, starting at `cursor`.

    With `val_share` there is one file, a single text whose last part is for validation. Temporary
    failures are retried after RETRY_WAITS_S. Raises UserError if they persist or a file is damaged.
    """
    waits = iter(RETRY_WAITS_S)
    while cursor[0] < len(files):
        path = files[cursor[0]]
        try:
            for passage in read_file(path, cursor, val_share):
                yield passage
                cursor = passage.cursor
                waits = iter(RETRY_WAITS_S)
            cursor = (cursor[0] + 1, 0, 0)
        except UserError:
            raise
        except Exception as error:  # fsspec, the Hub's client and pyarrow raise their own types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if not is_on_hub(path) and getattr(error, "errno", None) not in TEMPORARY_ERRORS:
                raise UserError(f"{path} is damaged or cannot be read: {reason}.") from None
            wait = next(waits, None)
            if wait is None:
                raise UserError(f"{path} stopped after document {cursor[1]:,} and does not answer "
                                f"({reason}): run the same command again to resume.") from None
            print(f"{path}: {reason}; retrying in {wait} s", file=sys.stderr)
            time.sleep(wait)


def is_on_hub(path: str) -> bool:
    return path.startswith("hf://")


# --------------------------------------------------------------------------------------------------
# Splits and samples

def find_split(files: list[str], val_share: float) -> Cursor:
    """Returns where the last `val_share` of all documents begins.

    Both splits get at least one document. Files other than parquet are read once to count theirs.
    """
    counts = [count_documents(path) for path in files]
    total = sum(counts)
    first = min(max(1, round(total * (1 - val_share))), total - 1)
    file = 0
    while first >= counts[file]:
        first -= counts[file]
        file += 1
    return file, first, 0


def count_documents(path: str) -> int:
    """Returns the number of documents, which a parquet file states in its footer."""
    if kind_of(path) == ".parquet":
        with contextlib.suppress(OSError, ValueError):  # reading the file reports what is wrong
            with open_parquet(path) as file:
                return file.metadata.num_rows
    return sum(passage.is_start for passage in read([path]))


def assign_split(passages: Iterator[Passage], val_from: Cursor) -> Iterator[Passage]:
    """Assign the passages of documents from `val_from` on to validation, the others to training."""
    for passage in passages:
        # the cursor points behind the passage
        yield passage._replace(split="train" if passage.cursor <= val_from else "val")


def sample_texts(files: list[str], val_share: float, val_from: Cursor | None) -> Iterator[str]:
    """Yields text to train a tokenizer on: an equal share of SAMPLE_BYTES from each file.

    Text that is known to be for validation is left out.
    """
    for i in range(len(files)):
        passages = read(files[:i + 1], (i, 0, 0), val_share)  # of file i, with its true cursors
        if val_from:
            passages = assign_split(passages, val_from)
        size = 0
        for passage in passages:
            if size >= SAMPLE_BYTES / len(files):
                break
            if passage.split != "val":
                size += passage.size
                yield passage.text


# --------------------------------------------------------------------------------------------------
# Sizes

def file_sizes(files: list[str]) -> list[int]:
    """Returns the bytes of each file."""
    if not is_on_hub(files[0]):
        return [os.path.getsize(file) for file in files]
    import fsspec  # noqa: PLC0415
    filesystem, _ = fsspec.core.url_to_fs(files[0])
    return [filesystem.size(file) for file in files]


def estimate_content_bytes(files: list[str], sizes: list[int]) -> int:
    """Estimate how many bytes `read` yields, from the largest file of each format."""
    ratios = {}  # by suffix
    content_bytes = 0.0
    for size, path in sorted(zip(sizes, files), reverse=True):
        suffix = os.path.splitext(path)[1]
        if suffix not in ratios:
            ratios[suffix] = content_ratio(path, size)
        content_bytes += ratios[suffix] * size
    return round(content_bytes)


def content_ratio(path: str, size: int) -> float:
    """Returns the bytes of content per byte of the file."""
    try:
        if kind_of(path) == ".parquet":
            with open_parquet(path) as file:
                column = file.schema_arrow.names.index("text")
                groups = map(file.metadata.row_group, range(file.num_row_groups))
                return sum(group.column(column).total_uncompressed_size for group in groups) / size
        codec = codec_of(path)
        if codec:
            with open_file(path) as file, pa.CompressedInputStream(file, codec) as content:
                return len(content.read(16 * BLOCK_BYTES)) / max(1, file.tell())
    except (OSError, ValueError):
        pass  # the file is damaged, which `read` will report
    return 1.0


# --------------------------------------------------------------------------------------------------
# Passages

def read_file(path: str, cursor: Cursor, val_share: float) -> Iterator[Passage]:
    """Yields the passages of one file, starting at `cursor`."""
    if val_share:
        return read_single_text(path, cursor, val_share)
    if kind_of(path) == ".txt":
        blocks = skip_leading_blank(text_blocks(path))
        return read_blocks(blocks, cursor, 0, True)  # as one document
    return read_documents(path, cursor)


def read_single_text(path: str, cursor: Cursor, val_share: float) -> Iterator[Passage]:
    """Yields a text's two splits as two documents: its last `val_share`, then the rest."""
    length = sum(map(len, text_blocks(path)))
    if length < MIN_TEXT_CHARS:
        raise UserError(f"{path} holds {length} characters, too few to train on: "
                        f"at least {MIN_TEXT_CHARS} are needed.")
    cut = int(length * (1 - val_share))
    splits = [("val", cut, length), ("train", 0, cut)]
    for number, (split, begin, end) in islice(enumerate(splits), cursor[1], None):
        yield from read_blocks(read_range(path, begin, end), cursor, number, True, split)


def read_blocks(blocks: Iterator[str], cursor: Cursor, number: int, intact: bool,
                split: str | None = None) -> Iterator[Passage]:
    """Yields the blocks of document `number`, from the cursor's on if it is in this document."""
    file, document, part = cursor
    for i, block in enumerate(blocks):
        if number > document or i >= part:
            size = len(block.encode())
            yield Passage(block, size, intact, i == 0, split, (file, number, i + 1))


def read_documents(path: str, cursor: Cursor) -> Iterator[Passage]:
    """Yields the rows of a parquet file or the lines of a jsonl file as documents."""
    is_parquet = kind_of(path) == ".parquet"
    if is_parquet:
        contents = parquet_rows(path, cursor[1])
    else:
        contents = islice(open_stream(path), cursor[1], None)
    for number, content in enumerate(contents, cursor[1]):
        text, intact = decode(content) if is_parquet else parse_line(path, content, number)
        size = len(content)
        if size <= LONG_DOCUMENT_BYTES:
            yield Passage(text, size, intact, True, None, (cursor[0], number + 1, 0))
        else:
            del content  # may be hundreds of megabytes
            yield from read_blocks(skip_leading_blank(cut_text(text)), cursor, number, intact)


def skip_leading_blank(blocks: Iterator[str]) -> Iterator[str]:
    """Yields the blocks of a document, or one empty block if all of them are blank."""
    blank = []
    for block in blocks:
        if block.strip():
            yield from blank
            yield block
            yield from blocks
            return
        blank.append(block)
    yield ""


def read_range(path: str, begin: int, end: int) -> Iterator[str]:
    """Yields the file's characters begin to end-1 in blocks."""
    position = 0
    for block in text_blocks(path):
        part = block[max(0, begin - position):max(0, end - position)]
        if part:
            yield part
        position += len(block)


def decode(content: bytes) -> tuple[str, bool]:
    """Returns the text, and whether it is intact. Bytes that are not UTF-8 become U+FFFD."""
    try:
        return content.decode(), True
    except UnicodeDecodeError:
        return content.decode(errors="replace"), False


def parse_line(path: str, content: bytes, number: int) -> tuple[str, bool]:
    """Returns the text of a JSON line, and whether it is intact. Lone surrogates become U+FFFD."""
    line, intact = decode(content.removeprefix(codecs.BOM_UTF8))
    if not line.strip():
        return "", True
    try:
        text = parse_json(line)["text"]
        if not isinstance(text, str | None):
            raise TypeError
        text = text or ""
        if "\\u" in line:  # only escapes can give a lone surrogate
            text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text), False
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}, line {number + 1:,}, is not a JSON object with a string `text` "
                        f"(expected one object per line, in UTF-8): {line[:60]!r}.") from None
    return text, intact


# --------------------------------------------------------------------------------------------------
# Files

def open_file(path: str):
    """Opens a local file or one on the Hub."""
    if not is_on_hub(path):
        return open(path, "rb")
    import fsspec  # noqa: PLC0415
    return fsspec.open(path).open()


def open_parquet(path: str):
    """Opens a parquet file. Raises UserError if it has no column `text` of strings."""
    file = pq.ParquetFile(open_file(path), buffer_size=16 * BLOCK_BYTES)
    columns = file.schema_arrow
    if "text" not in columns.names:
        raise UserError(f"{path} has no column `text`; its columns are: "
                        f"{', '.join(columns.names)}.")
    kind = columns.field("text").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not re.fullmatch("null|(large_)?(string|binary)", str(kind)):
        raise UserError(f"{path}: the column `text` holds values of type {kind}, not strings.")
    return file


def parquet_rows(path: str, skip: int) -> Iterator[bytes]:
    """Yields the column `text` from row `skip` on, as UTF-8. Skipped row groups are not read."""
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if rows <= skip:
                skip -= rows
                continue
            tables = file.iter_batches(32, row_groups=[group], columns=["text"], use_threads=False)
            for table in tables:
                column = table.column(0).cast("large_binary")  # some rows may not be valid UTF-8
                for value in column[min(skip, len(column)):]:  # a list would hold all of them
                    yield value.as_py() or b""
                skip = max(0, skip - len(column))


def open_stream(path: str) -> io.BufferedReader:
    """Opens a file as the stream of its decompressed content."""
    file = open_file(path)
    codec = codec_of(path)
    if codec and not file.read(1):
        raise UserError(f"{path} is empty, which a compressed file cannot be: download it again.")
    file.seek(0)
    content = pa.CompressedInputStream(file, codec) if codec else file
    return io.BufferedReader(content, BLOCK_BYTES)


def text_blocks(path: str) -> Iterator[str]:
    """Yields a text file in blocks of about BLOCK_BYTES characters, cut between tokens."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    stream = open_stream(path)
    rest = ""
    position = 0  # bytes read
    while data := stream.read(BLOCK_BYTES):
        try:
            rest += decoder.decode(data)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (near byte {position + error.start:,}): "
                            "convert it first, for example with iconv.") from None
        position += len(data)
        cut = token_boundary(rest, len(rest))
        yield rest[:cut]
        rest = rest[cut:]
    if decoder.getstate()[0]:
        raise UserError(f"{path} is cut off inside a character: download it again.")
    if rest:
        yield rest


def cut_text(text: str) -> Iterator[str]:
    """Yields the text in parts of at most BLOCK_BYTES characters, cut between tokens.

    The memory for tokenizing is proportional to the length of a part.
    """
    begin = 0
    while len(text) - begin > BLOCK_BYTES:
        end = token_boundary(text, begin + BLOCK_BYTES, begin)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def token_boundary(text: str, end: int, begin: int = 0) -> int:
    """Returns the last position up to `end` between a visible character and a space or line feed.

    GPT-2's pattern always ends a token there, so cutting there does not change the tokens. Without
    such a position it returns `end`.
    """
    match = re.compile(r"[\s\S]*\S(?=[ \n])").match(text, begin, end)
    return match.end() if match else end
