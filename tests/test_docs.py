"""The commands, examples and links of the README and the docs work."""
import dataclasses
import importlib.util
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro
from conftest import PROSE, ROOT
from test_hellaswag import EXAMPLES

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("benchmarks/**/*.md")),
    *sorted(ROOT.glob("assets/bundled/*/README.md")),
]
SUBCOMMANDS = {"publish.py": {"export", "upload"}, "shards.py": {"verify", "info"}}
SERVERS = {"app.py", "serve.py"}  # other tests start these

# options that make a command of the docs quick enough for a test
QUICK_OPTIONS = {
    "train.py": ["--max-steps", "2", "--eval-tokens", "512", "--batch-tokens", "512",
                 "--micro-batch", "1"],
    "generate.py": ["--max-new-tokens", "5"],
    "prepare.py": ["--out"],
}


class Parsed(BaseException):
    """Raised in place of running a program once its command line has been parsed."""


def shell_commands(page: Path) -> list[tuple[str, str]]:
    """(command, comment) for each command in the page's blocks of shell."""
    commands = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            code, _, comment = line.partition(" #")
            commands += [(command, comment) for command in re.split(r"&&|\|", code)]
    return commands


def program_calls() -> list[tuple[str, list[str], str]]:
    """(page, words, comment) for each call of one of our programs in the docs."""
    calls = []
    for page in PAGES:
        for command, comment in shell_commands(page):
            words = shlex.split(command)
            programs = [i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)]
            if programs[:1] == [1] or (programs and words[0] == "torchrun"):
                calls.append((page.name, words, comment))
    return calls


def benchmark_calls() -> list[tuple[str, str]]:
    """(page, module) for each `python -m benchmarks.NAME` in the docs."""
    return sorted({
        (page.name, module) for page in PAGES
        for module in re.findall(r"python -m (benchmarks\.\w+)", page.read_text(encoding="utf-8"))
    })


def program_words(words: list[str]) -> list[str]:
    """The program and its options, without the launcher."""
    first = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[first:]


def command_id(value) -> str:
    return " ".join(value)[:80] if isinstance(value, list) else ""


@pytest.mark.parametrize("page, words, comment", program_calls(), ids=command_id)
def test_a_command_of_the_docs_parses(page, words, comment, monkeypatch):
    real_cli = tyro.cli
    program, *options = program_words(words)
    path = ROOT / program

    def parse_only(config, *args, **kwargs):
        if dataclasses.is_dataclass(config):
            real_cli(config, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_only)
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    assert path.exists()
    if program in SUBCOMMANDS:
        assert options[0] in SUBCOMMANDS[program]
    elif "tyro.cli" in path.read_text():
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("page, module", benchmark_calls())
def test_a_benchmark_of_the_docs_exists(page, module):
    assert importlib.util.find_spec(module)


def test_the_commands_of_the_docs_run_one_after_the_other(tmp_path, command, command_here):
    """Runs each command without a "needs …" comment once, on less text and for fewer steps."""
    write_example_files(tmp_path)
    command_here("prepare.py", "tiny_shakespeare", "--text", "my_text.txt")
    commands = {shlex.join(words): words for _, words, comment in program_calls()
                if "needs " not in comment}
    for number, words in enumerate(commands.values()):
        program, *options = program_words(words)
        if program in SERVERS | {"benchmarks/run.py"}:
            continue

        # shorten the run, and give each command its own output folder
        if not {"--dry-run", "--out"} & set(options):
            options += QUICK_OPTIONS.get(program, [])
        if options[-1:] == ["--out"]:
            options.append(f"out{number}")

        if words[0] == "torchrun":
            launcher_options = words[1:words.index(program)]
            command(program, *options,
                    launcher=["-m", "torch.distributed.run", *launcher_options])
        else:
            command_here(program, *options, typed="the fox\n")


def write_example_files(folder: Path):
    """Writes the files and folders that the commands of the docs name."""
    texts = {"my_text.txt": PROSE * 3, "novel.txt": PROSE, "beginning.txt": PROSE[:100]}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    documents = "\n".join(json.dumps({"text": PROSE}) for _ in range(16))
    for name in "my_corpus", "fineweb-edu":
        (folder / name).mkdir()
        (folder / name / "0.jsonl").write_text(documents)
    (folder / "hellaswag_val.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))


def test_the_readmes_python_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    exec(code, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_existing_files(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    for link in links:
        assert (page.parent / link).exists(), link


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    body = readme.split("\n---\n", 1)[1]
    assert len(body.split()) <= 1500
