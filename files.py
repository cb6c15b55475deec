"""Files that are whole or not there, and their checksums."""
import hashlib
import json
import os
from pathlib import Path


def write_atomically(path: Path, write):
    """Calls `write(temporary path)` and renames what it wrote to `path`, once it is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict):
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """The file's contents; {} where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
