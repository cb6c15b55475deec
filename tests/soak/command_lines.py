"""The command lines that the fuzzer tries: COMMAND_LINES, a table at the end.

See tokenizer_files.py for how such a table works. An attempt calls a program with random arguments
in this process, up to where its work would start.
"""
import dataclasses
import io
import random
import sys
from pathlib import Path

import tyro
from mutations import mutate
from small import TEXT, prepared_data
from tyro import _parsers, _unsafe_cache

import generate
import hellaswag
import prepare
import train
from corpus import sources
from training import setup
from training.config import TrainConfig

WORDS = (
    "0", "-1", "1", "3", "1e9", "1e999", "nan", "inf", "-0", "0x10", "1_000", "٣", "9" * 30,
    "", " ", "-", "--", "---", "auto", "none", "None", "nowhere", "true", "True", "[]", "1,2",
    "a" * 999, "\n", "\udc80", "🦊", "../x", "/dev/null", ".", "@text.txt", "=", "%s",
    "text.txt", "data", "char", "gpt2", "bpe:300", "bpe:", "bpe:-1", "0/2", "2/0", "x/y", "cpu",
    "cuda", "float32", "bundled", "bundled:x", "tiny_shakespeare", "openwebtext", "-h", "--help")


class Work(Exception):
    """The command line was accepted, and the work would start."""


def start_work(*_, **__):
    raise Work


def options_of(config: type) -> dict[str, str]:
    """A program's options, and their defaults."""
    return {f"--{field.name.replace('_', '-')}": str(field.default)
            for field in dataclasses.fields(config)}


def hostile_arguments(options: dict[str, str], source: random.Random) -> list[str]:
    """Up to eight arguments: options, most of them with a value, and words."""
    arguments = []
    for _ in range(source.randrange(1, 5)):
        option, default = source.choice(list(options.items()))
        word = source.choice((source.choice(WORDS), default))
        if source.random() < 0.1:
            option = mutate(option.encode(), source).decode("utf-8", "surrogateescape")
            option = option.replace("\0", "")  # which ends an argument
        kind = source.random()
        if kind < 0.6:
            arguments += [option, word]
        elif kind < 0.75:
            arguments.append(f"{option}={word}")
        elif kind < 0.85:
            arguments.append(option)
        else:
            arguments.append(word)
    return arguments


def outcome_of(start) -> str:
    """Calls a program up to its work."""
    try:
        start()
        return "ended without work"
    except Work:
        return "accepted"
    except SystemExit as error:
        assert error.code in (0, 2, None), error.code
        return "the parser's own error"


def cache_options(patch):
    """Reads each program's options and their help texts once.

    tyro does so for every command line, which takes longer than all the rest.
    """
    build, known = _parsers.ParserSpecification.from_callable_or_type, {}

    def from_callable_or_type(f, **arguments):
        key = f, arguments["default_instance"]
        if key not in known:
            known[key] = build(f, **arguments)
        return known[key]

    patch.setattr(_parsers.ParserSpecification, "from_callable_or_type", from_callable_or_type)
    patch.setattr(_unsafe_cache, "clear_cache", lambda: None)


def train_line(patch):
    build = setup.model_sizes

    def model_sizes(config, vocab_size):
        """Does not build the plan of a huge model."""
        return build(config, vocab_size) if config.n_layer < 50 else start_work()

    def plan_or_train(config, world):
        return setup.plan_without_data(config, world) if config.dry_run else start_work()

    patch.setattr(setup, "model_sizes", model_sizes)
    patch.setattr(train, "train", plan_or_train)
    options = options_of(TrainConfig)
    Path("text.txt").write_text(TEXT)
    cache_options(patch)

    def attempt(source):
        arguments = hostile_arguments(options, source)
        if source.random() < 0.5:
            names = WORDS if source.random() < 0.1 else list(train.PRESETS)
            arguments.insert(0, source.choice(names))
        return outcome_of(lambda: train.main(arguments))
    return attempt


def prepare_line(patch):
    patch.setattr(prepare, "prepare", start_work)
    patch.setattr(sources, "download", start_work)
    patch.setattr(sources, "hub_source", start_work)
    options = options_of(prepare.PrepareConfig)
    Path("text.txt").write_text(TEXT)
    prepared_data("data")
    cache_options(patch)

    def attempt(source):
        arguments = hostile_arguments(options, source)
        arguments.insert(source.randrange(len(arguments) + 1), source.choice(WORDS))
        return outcome_of(lambda: prepare.main(tyro.cli(prepare.PrepareConfig, args=arguments)))
    return attempt


def generate_line(patch):
    patch.setattr(generate.ModelConfig, "load", start_work)
    options = options_of(generate.GenerateConfig)
    options |= {"-m": "bundled", "-p": "a", "-n": "1", "-d": "cpu"}
    Path("text.txt").write_text(TEXT)
    cache_options(patch)

    def attempt(source):
        arguments = hostile_arguments(options, source)
        patch.setattr(sys, "stdin", io.StringIO("a prompt"))
        return outcome_of(lambda: generate.main(tyro.cli(generate.GenerateConfig, args=arguments)))
    return attempt


def hellaswag_line(patch):
    patch.setattr(hellaswag, "download", start_work)
    patch.setattr(hellaswag, "read_examples", start_work)
    patch.setattr(generate.ModelConfig, "load", start_work)
    options = options_of(hellaswag.HellaSwagConfig) | {"-m": "bundled", "-d": "cpu"}
    Path("text.txt").write_text(TEXT)
    cache_options(patch)

    def attempt(source):
        arguments = hostile_arguments(options, source)
        return outcome_of(lambda: hellaswag.main(tyro.cli(hellaswag.HellaSwagConfig,
                                                          args=arguments)))
    return attempt


COMMAND_LINES = {
    "a command line of train.py": train_line,
    "a command line of prepare.py": prepare_line,
    "a command line of generate.py": generate_line,
    "a command line of hellaswag.py": hellaswag_line,
}
