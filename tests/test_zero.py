"""ZeroGPU's way of calling, without ZeroGPU: a decorated generator whose calls run in a forked process."""
import multiprocessing

import pytest

import checkpoint
from generate import Engine
from ui import zero


def in_a_fork(function):
    """What `spaces.GPU` does with a generator: arguments go there, and what it yields comes back, through queues."""
    fork = multiprocessing.get_context("fork")

    def there(events, *arguments):
        for event in function(*arguments):
            events.put(event)
        events.put(None)

    def here(*arguments):
        events = fork.Queue()
        process = fork.Process(target=there, args=(events, *arguments))
        process.start()
        yield from iter(events.get, None)
        process.join()
    return here


@pytest.fixture
def engines(monkeypatch):
    model, tokenizer, info = checkpoint.load_model("bundled:shakespeare")
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setattr(zero, "events", in_a_fork(zero.events))
    assert type(zero.engine(info["path"], model, tokenizer, "auto")) is Engine, "a small model writes on the CPU"
    monkeypatch.setattr(zero, "LARGE_MODEL", 1)
    return zero.engine(info["path"], model, tokenizer, "auto"), Engine(model, tokenizer)


def test_a_large_model_writes_in_the_decorated_call_what_it_writes_here(engines):
    there, here = engines
    options = {"max_new_tokens": 30, "temperature": 0.9, "top_k": 20, "seed": 5}
    assert there.generate("ROMEO:", n=2, **options) == here.generate("ROMEO:", n=2, **options)
    assert there.scheduler.thread is None, "nothing was computed in this process"


def test_a_stop_string_ends_one_text_and_not_the_others(engines):
    there, here = engines
    options = {"max_new_tokens": 40, "seed": 3, "stop": ("\n",)}
    assert there.generate("ROMEO:\nWhat", n=3, **options) == here.generate("ROMEO:\nWhat", n=3, **options)
    assert list(there.stream("ROMEO:", max_new_tokens=4, seed=1)) == list(here.stream("ROMEO:", max_new_tokens=4, seed=1))
