"""Which models the page offers, and how many it loads and keeps."""
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_until

import checkpoint
from engine.scheduler import Busy
from ui import zero
from ui.models import DTYPES, MAX_AT_ONCE, Models


def test_a_run_that_starts_later_is_offered_but_does_not_become_the_default():
    models = Models(None)
    Path("log/later").mkdir(parents=True)
    Path("log/later/model_00001.pt").touch()
    assert models.list_names()[0] == "log/later"
    assert models.default == "bundled:stories"


def test_models_that_load_or_write_are_kept_and_others_wait(monkeypatch):
    released, writing = threading.Event(), set()  # precisions of models that write

    def load_model(*_):
        released.wait(30)
        return None, None, {"path": ""}

    def engine(path, model, tokenizer, dtype, **limits):
        scheduler = SimpleNamespace(load=lambda: (int(dtype in writing), 0))
        return SimpleNamespace(dtype=dtype, forward=None, scheduler=scheduler)

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    monkeypatch.setattr(zero, "engine", engine)
    models = Models("bundled:shakespeare")
    name, other, *_ = models.names

    # models that load
    dtypes = [dtype for dtype in DTYPES if dtype != "auto"]
    loading = [models.future(name, dtype) for dtype in dtypes]
    assert len(loading) == MAX_AT_ONCE
    for start in models.future, models.start_loading:
        with pytest.raises(Busy, match="try again later"):
            start(other, "int8")
    assert [models.future(name, dtype) for dtype in dtypes] == loading
    released.set()
    for future in loading:
        future.result(30)
    wait_until(lambda: not models.loading)

    # models that write
    writing.update(dtypes)
    with pytest.raises(Busy, match="no room"):
        models.future(other, "int8")
    assert [models.future(name, dtype) for dtype in dtypes] == loading
    writing -= {"float16", "int8"}
    models.future(other, "int8").result(30)
    assert list(models.loaded) == [(name, "float32"), (name, "bfloat16"), (other, "int8")]
