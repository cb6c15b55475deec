"""Tests ui/zero.py without ZeroGPU: the decorated generator runs in a forked process, as there."""
import multiprocessing

import pytest

import checkpoint
from generate import Engine
from ui import zero


def in_a_fork(function):
    """Does what `spaces.GPU` does: runs a generator in a process and sends back its items."""
    fork = multiprocessing.get_context("fork")

    def run_in_child(results, *arguments):
        for result in function(*arguments):
            results.put(result)
        results.put(None)

    def call(*arguments):
        results = fork.Queue()
        process = fork.Process(target=run_in_child, args=(results, *arguments))
        process.start()
        yield from iter(results.get, None)
        process.join()
    return call


@pytest.fixture
def engines(monkeypatch):
    """(an engine that generates in the forked process, an engine that generates in this one)."""
    model, tokenizer, info = checkpoint.load_model("bundled:shakespeare")
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setattr(zero, "events", in_a_fork(zero.events))
    small_model_engine = zero.engine(info["path"], model, tokenizer, "auto")
    assert type(small_model_engine) is Engine, "a small model runs on the CPU"
    monkeypatch.setattr(zero, "LARGE_MODEL", 1)
    return zero.engine(info["path"], model, tokenizer, "auto"), Engine(model, tokenizer)


def test_a_large_model_generates_the_same_texts_in_the_other_process(engines):
    remote, local = engines
    options = {"max_new_tokens": 30, "temperature": 0.9, "top_k": 20, "seed": 5}
    expected = local.generate("ROMEO:", n=2, **options)
    assert remote.generate("ROMEO:", n=2, **options) == expected
    assert remote.scheduler.thread is None, "nothing was computed in this process"


def test_a_stop_string_ends_one_sample_and_not_the_others(engines):
    remote, local = engines
    options = {"max_new_tokens": 40, "seed": 3, "stop": ("\n",)}
    expected = local.generate("ROMEO:\nWhat", n=3, **options)
    assert remote.generate("ROMEO:\nWhat", n=3, **options) == expected
    expected = list(local.stream("ROMEO:", max_new_tokens=4, seed=1))
    assert list(remote.stream("ROMEO:", max_new_tokens=4, seed=1)) == expected
