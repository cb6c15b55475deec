"""Damaged and hostile files, requests and command lines: one sentence or a correct result.

An input is a valid file with random bytes or parts of its structure changed, or a pickle that calls
a function. The project writes GGUF and reads none, so there is no parser of it to try.
"""
import os
import tempfile

import pytest
from api_bodies import BODIES
from checkpoint_files import CHECKPOINTS
from command_lines import COMMAND_LINES
from data_files import DATA
from fuzzing import fuzz
from tokenizer_files import TOKENIZERS

pytestmark = pytest.mark.soak

PARSERS = TOKENIZERS | CHECKPOINTS | DATA | BODIES | COMMAND_LINES


@pytest.fixture(autouse=True)
def folder_in_memory(monkeypatch):
    """Runs each test in an empty folder in memory, if this machine has such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="soak-") as folder:
        monkeypatch.chdir(folder)
        yield
        monkeypatch.undo()  # leave the folder before it is removed


@pytest.mark.parametrize("name", PARSERS)
def test_hostile_inputs_get_one_sentence_or_are_read_correctly(name, monkeypatch):
    fuzz(name, PARSERS[name](monkeypatch))

