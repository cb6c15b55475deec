"""What README and docs say can be typed, parses; what they point to is there."""
import dataclasses
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/**/*.md")),
         *sorted(ROOT.glob("assets/bundled/*/README.md"))]
BY_HAND = {"publish.py": {"export", "upload"}, "shards.py": {"verify", "info"}}  # their first argument


class Parsed(BaseException):
    """A command line was taken."""


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each call of a program of ours in a block of shell, without its comment."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for command in re.split(r"&&|\|", line):
                    words = shlex.split(command, comments=True)
                    program = next((i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)), None)
                    if program == 1 or (program and words[0] == "torchrun"):
                        found.append((page.name, words[program:]))
    return found


@pytest.mark.parametrize("page, words", commands(), ids=lambda value: " ".join(value)[:80] if isinstance(value, list) else value)
def test_a_command_of_the_docs_parses(page, words, monkeypatch):
    real = tyro.cli

    def parse_only(config, *args, **options):
        if dataclasses.is_dataclass(config):
            real(config, *args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_only)
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
    monkeypatch.setattr(sys, "path", [str((ROOT / words[0]).parent), *sys.path])
    assert (ROOT / words[0]).exists()
    if words[0] in BY_HAND:
        assert words[1] in BY_HAND[words[0]]
    elif "tyro.cli" in (ROOT / words[0]).read_text():
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
