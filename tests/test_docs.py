"""What README and docs say can be typed, parses, and runs unless it says what it needs; what they point to is there."""
import dataclasses
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro
from conftest import PROSE
from test_hellaswag import EXAMPLES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/**/*.md")),
         *sorted(ROOT.glob("assets/bundled/*/README.md"))]
BY_HAND = {"publish.py": {"export", "upload"}, "shards.py": {"verify", "info"}}  # their first argument
SERVERS = {"app.py", "serve.py"}  # which tests of their own start
SMALLER = {"train.py": ["--max-steps", "2", "--eval-tokens", "512", "--batch-tokens", "512", "--micro-batch", "1"],
           "generate.py": ["--max-new-tokens", "5"], "prepare.py": ["--out"]}


class Parsed(BaseException):
    """A command line was taken."""


def commands() -> list[tuple[str, list[str], str]]:
    """(page, words, comment) of each call of a program of ours in a block of shell."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                typed, _, comment = line.partition(" #")
                for command in re.split(r"&&|\|", typed):
                    words = shlex.split(command)
                    program = next((i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)), None)
                    if program == 1 or (program and words[0] == "torchrun"):
                        found.append((page.name, words, comment))
    return found


def program_of(words: list[str]) -> list[str]:
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")):]


def named(value) -> str:
    return " ".join(value)[:80] if isinstance(value, list) else ""


@pytest.mark.parametrize("page, words, comment", commands(), ids=named)
def test_a_command_of_the_docs_parses(page, words, comment, monkeypatch):
    real, words = tyro.cli, program_of(words)

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


def test_the_commands_of_the_docs_run_one_after_the_other(tmp_path, monkeypatch, command):
    """Those that say nothing of what they need, in a folder with the files that they name, on less text and for fewer steps."""
    write_files(tmp_path)
    command("prepare.py", "tiny_shakespeare", "--text", "my_text.txt")
    for number, (page, words, comment) in enumerate(commands()):
        program, *options = program_of(words)
        if "needs " in comment or program in SERVERS | {"benchmarks/run.py"}:
            continue
        smaller = [] if "--dry-run" in options or "--out" in options else SMALLER.get(program, [])
        arguments = [*options, *smaller, *([f"out{number}"] if smaller[-1:] == ["--out"] else [])]
        if words[0] == "torchrun":
            command(program, *arguments, launcher=["-m", "torch.distributed.run", *words[1:words.index(program)]])
            continue
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n"))
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as end:
            assert not end.code, (page, words)


def write_files(folder: Path):
    for name in "my_text.txt", "beginning.txt", "novel.txt":
        (folder / name).write_text(PROSE * 3, encoding="utf-8")
    for name in "my_corpus", "fineweb-edu":
        (folder / name).mkdir()
        (folder / name / "0.jsonl").write_text("\n".join(json.dumps({"text": PROSE}) for _ in range(16)))
    (folder / "hellaswag_val.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))


def test_the_readmes_python_runs(monkeypatch):
    (code, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
