"""Writes results into a Markdown page, between `<!-- NAME -->` and `<!-- end of NAME -->`."""
import re
from pathlib import Path

from common.errors import UserError


def write_lines(page: Path, name: str, lines: list[str]):
    """Replaces the lines between the marks called `name`."""
    block = "\n".join(lines) + "\n"
    marks = rf"(?s)(?<=<!-- {name} -->\n).*(?=<!-- end of {name} -->)"
    text, found = re.subn(marks, lambda _: block, page.read_text(encoding="utf-8"))
    if not found:
        raise UserError(f"{page} lacks the lines `<!-- {name} -->` and `<!-- end of {name} -->`: "
                        "add them where the results belong.")
    page.write_text(text, encoding="utf-8")
