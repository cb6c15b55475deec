"""Writes results into a Markdown page, between `<!-- NAME -->` and `<!-- end of NAME -->`."""
import re
from pathlib import Path


def write_lines(page: Path, name: str, lines: list[str]):
    """Replaces what stands between the marks called `name`."""
    block = "\n".join(lines) + "\n"
    text = page.read_text(encoding="utf-8")
    marks = rf"(?s)(?<=<!-- {name} -->\n).*(?=<!-- end of {name} -->)"
    page.write_text(re.sub(marks, lambda _: block, text), encoding="utf-8")
