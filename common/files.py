"""Writes files atomically, reads texts, reads and writes JSON, and computes checksums."""
import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

# errors that mean a full disk, an exceeded quota or a file-size limit
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]):
    """Calls `write(file)` on a temporary file, then renames it to `path` once it is on disk.

    Raises OSError with `path` as its filename if the disk is full, for example.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # an error while writing does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_text(path: Path) -> str:
    """The file's text, with its line breaks as they are. Raises UserError if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start:,}): "
                        "convert it first.") from None


def write_json(path: Path, content: dict):
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    # UTF-8 has no lone surrogates; Python's escapes of them are also those of JSON
    encoded = text.encode(errors="backslashreplace")
    write_atomically(path, lambda file: file.write(encoded))


def parse_json(text: str):
    """json.loads, which raises ValueError also if the text is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(error) from None


def read_json(path: Path) -> dict:
    """The contents of the file, or {} if it does not exist."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def sha256(path: Path) -> str:
    """The file's SHA-256 checksum, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
