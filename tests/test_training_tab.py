"""The tabs Training and About, in a browser and through the page's API."""
import hashlib
import json
import os
import re
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from conftest import (
    MARKUP,
    PROSE,
    assert_markup_stays_text,
    free_port,
    go_to,
    running_page,
    wait_until,
)
from gradio_client import handle_file
from playwright.sync_api import expect

import app
import checkpoint
from api import guard
from api.guard import Access
from common.errors import UserError
from corpus import sources
from ui import about, own_text, training
from ui.models import Models
from ui.own_text import SIZES, OwnTextTraining

TEN_SECONDS = 1 / 6  # minutes
LOCAL = SimpleNamespace(headers={"host": "localhost:7860"},
                        client=SimpleNamespace(host="127.0.0.1"))  # a request
REMOTE = SimpleNamespace(headers={"host": "example.org"}, client=SimpleNamespace(host="10.0.0.9"))


@pytest.fixture(scope="module")
def log(two_runs):
    """A log with two finished runs, with HTML in their files."""
    write_log(two_runs / "bpe")
    write_log(two_runs / "markup")
    return two_runs


def write_log(run):
    """Writes the log of a finished run of 6 steps."""
    metrics = []
    for step in range(7):
        loss = 5 - step / 2
        line = {"step": step, "time": 1e9 + step, "val_loss": loss, "train_loss": loss}
        metrics.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(metrics))
    sample = {"step": 6, "time": 1e9, "prompt": "", "text": MARKUP}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (run / "config.json").write_text(json.dumps(
        {"batch_tokens": 128, "max_steps": 6, "data": MARKUP}))


@pytest.fixture(scope="module")
def url(log):
    """The page, on which "1 minute" is ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", log)
        patch.setitem(training.MINUTES, "1 minute", TEN_SECONDS)
        with running_page() as address:
            yield address


@pytest.fixture
def open_tab(new_window, url):
    def open_it(title, **size):
        page = new_window(url, **size)
        go_to(page, title)
        return page

    return open_it


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A training whose runs are in a folder of the test."""
    monkeypatch.setattr(checkpoint, "LOG", tmp_path / "log")
    own = OwnTextTraining()
    yield own
    own.stop()
    wait_for_end(own)


def wait_for_end(own):
    wait_until(lambda: not own.stage)


# --------------------------------------------------------------------------------------------------
# Training on one's own text

@pytest.mark.slow
def test_a_person_trains_on_a_file_and_writes_with_the_model(open_tab, log, tmp_path):
    (tmp_path / "My fox.txt").write_text(PROSE)
    page = open_tab("Training")
    expect(page.locator("#train-stop")).to_be_hidden()
    page.set_input_files("#train-file input[type=file]", tmp_path / "My fox.txt")
    expect(page.locator("#train-file")).to_contain_text("My fox")
    page.click("#train-start")
    status = page.locator("#train-status")
    expect(status).to_contain_text("Learning")

    # a page that is opened meanwhile shows the training too
    other = open_tab("Training")
    expect(other.locator("#train-stop")).to_be_visible()
    expect(status).to_contain_text("Your model is called my-fox", timeout=60_000)
    expect(page.locator("#train-now textarea")).to_have_value(re.compile("^The fox"))
    expect(page.locator("#train-loss .vega-embed")).to_be_visible()

    # the model is in every list at once
    go_to(page, "Chat")
    page.click("#chat-model input")
    expect(page.get_by_role("option", name=re.compile("my-fox"))).to_be_visible()
    page.keyboard.press("Escape")
    go_to(page, "Training")
    page.click("#train-write")
    expect(page.locator("#model input")).to_have_value(re.compile("my-fox$"))
    expect(page.locator("#text textarea").first).to_have_value(re.compile("^The fox"))
    config = json.loads((log / "my-fox" / "config.json").read_text())
    assert checkpoint.saved_steps(log / "my-fox")[-1] == config["max_steps"]


def test_a_stopped_training_keeps_what_it_has_learned(own):
    own.start("fox", PROSE, 1200)
    metrics = own.run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and "train_loss" in metrics.read_text())
    own.stop()
    wait_for_end(own)
    assert own.error == "" and checkpoint.model_steps(own.run)
    assert "Stopped" in training.describe(own)


def test_a_failed_training_says_why_and_leaves_nothing(own, monkeypatch):
    def fail(text, folder):
        own.run.mkdir(parents=True)
        own.call("prepare.py", folder / "nosuch.txt")

    monkeypatch.setattr(own, "train", fail)
    own.start("fox", PROSE, 60)
    wait_for_end(own)
    assert "There is no file" in training.describe(own)
    assert not own.run.exists() and not list(checkpoint.LOG.glob("**/*"))


def test_one_training_at_a_time_and_each_gets_a_name_of_its_own(own, monkeypatch):
    names = []

    def remember(text, folder):
        names.append(own.name)
        own.run.mkdir(parents=True)
        with pytest.raises(UserError, match="under way"):
            own.start("fox", PROSE, 60)

    monkeypatch.setattr(own, "train", remember)
    monkeypatch.setattr(own_text.shutil, "rmtree", lambda *_, **__: None)
    for title in "My fox!", "../My fox", "Фокс", "...":
        own.start(title, PROSE, 60)
        wait_for_end(own)
    assert names == ["my-fox", "my-fox-2", "фокс", "my-text"]


def test_a_faster_machine_or_more_time_gets_a_larger_model(own):
    def choose(tokens_per_s, seconds):
        own.seconds, own.started_at, own.stage = seconds, time.time(), "Learning"
        lines = [{"step": 0, "time": 0.0}, {"step": 5, "time": 4.0, "tokens_per_s": tokens_per_s}]
        (own.run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return SIZES.index(own.choose_size())

    own.name = "fox"
    own.run.mkdir(parents=True)
    assert own.choose_size() is None  # nothing is measured yet
    chosen = [choose(15_000, seconds) for seconds in (60, 300, 1200)]
    assert chosen == [0, 1, 2] and choose(10, 60) == 0
    assert choose(1e8, 60) == len(SIZES) - 1
    own.stage = ""


def test_the_decay_starts_when_restart_and_decay_take_the_rest_of_the_time(own):
    own.name, own.stage, own.seconds = "fox", "Learning", 100
    own.run.mkdir(parents=True)
    now = time.time()
    for training_s, must_start in (60, False), (74, True):
        # 5 seconds to start, then the training, which would decay for a quarter of its time
        first_step_at = now - training_s
        own.started_at = first_step_at - 5
        line = json.dumps({"step": 0, "time": first_step_at, "train_loss": 4.0})
        (own.run / "metrics.jsonl").write_text(line + "\n")
        assert own.decay_must_start(first_step_at - 5) == must_start
    own.stage = ""


@pytest.mark.parametrize(("content", "text"), [
    ("Zoë\r\n".encode(), "Zoë\n"), ("Zoë".encode("utf-8-sig"), "Zoë"),
    ("Zoë".encode("utf-16"), "Zoë"), ("Zoë".encode("cp1252"), "Zoë")])
def test_a_text_is_read_in_common_encodings(tmp_path, content, text):
    (tmp_path / "text.txt").write_bytes(content)
    assert own_text.read_text(tmp_path / "text.txt") == text


@pytest.mark.parametrize(("content", "sentence"), [
    (b"too short", "too few to learn from"), (b"PK\0\0" * 9999, "not plain text")])
def test_an_upload_is_checked_and_deleted(own, tmp_path, content, sentence):
    path = tmp_path / "upload.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        training.start(own, str(path), "1 minute", LOCAL)
    assert not path.exists() and own.name == ""


def test_tiny_shakespeare_is_downloaded_or_a_sentence_says_what_to_do(own, web, monkeypatch):
    started = []
    monkeypatch.setattr(own, "start", lambda *arguments: started.append(arguments))
    address = web({"/input.txt": PROSE.encode()})
    checksum = hashlib.sha256(PROSE.encode()).hexdigest()

    def download_from(path):
        monkeypatch.setitem(sources.NAMED_TEXTS, "tiny_shakespeare", (address + path, checksum))
        training.start_shakespeare(own, "5 minutes", LOCAL)

    with pytest.raises(UserError, match="could not be downloaded: drop a text file of your own"):
        download_from("/lost.txt")
    assert not started
    download_from("/input.txt")
    assert started == [("shakespeare", PROSE, 300)]


def test_only_this_machine_trains_unless_it_is_switched_on_for_all(client, tmp_path, monkeypatch):
    (tmp_path / "fox.txt").write_text(PROSE)
    file = handle_file(tmp_path / "fox.txt")
    with monkeypatch.context() as patch:
        patch.setenv("SPACE_ID", "me/space")
        with pytest.raises(Exception, match="403"):  # the upload is refused
            client.predict(file, "1 minute", api_name="/train")
        with pytest.raises(Exception, match="switched off"):
            client.predict(None, "1 minute", api_name="/train")
    with pytest.raises(UserError, match="own browser"):
        guard.require_may_train(REMOTE)
    guard.require_may_train(LOCAL)
    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.setenv("ALLOW_TRAINING", "1")
    guard.require_may_train(REMOTE)


@pytest.mark.parametrize("option", ["allow_host", "allow_origin"])
def test_nobody_trains_on_a_page_for_others_unless_it_is_switched_on(option, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(app, "build", MagicMock())
    monkeypatch.setattr(Models, "load_in_background", lambda _: None)
    access = Access(**{option: ("https://example.org",)})
    app.main(app.AppConfig(model="bundled:shakespeare", port=free_port(), access=access))
    with pytest.raises(UserError, match="switched off"):
        guard.require_may_train(LOCAL)
    monkeypatch.setitem(os.environ, "ALLOW_TRAINING", "1")
    guard.require_may_train(LOCAL)


# --------------------------------------------------------------------------------------------------
# The runs

def test_several_runs_are_shown_with_their_curves(open_tab, client):
    progress, *_ = client.predict(["bpe", "markup"], api_name="/runs")
    assert [row[:2] for row in table(progress)] == [["bpe", "6 of 6"], ["markup", "6 of 6"]]
    page = open_tab("Training")
    page.click("#all-runs button")
    expect(page.locator("#plot-val_loss .vega-embed")).to_be_visible()
    cells = page.locator("#runs-progress [role=gridcell]")
    page.click("#runs input")
    page.get_by_role("option", name="bpe").click()
    expect(cells.filter(has_text="bpe")).to_be_visible()


def table(answer):
    """The rows of a table in an answer of the API."""
    return answer.get("value", answer)["data"]


def test_a_request_names_runs_from_the_list_and_no_paths(client, log):
    elsewhere = log.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "metrics.jsonl").write_text("{}\n")
    for name in "../elsewhere", str(elsewhere), "..", "", MARKUP:
        assert table(client.predict([name], api_name="/runs")[0]) in ([], [[""] * 5])


# --------------------------------------------------------------------------------------------------
# About

def test_the_card_says_what_a_model_learned_how_well_and_under_which_licence(open_tab):
    page = open_tab("About")
    card = page.locator("#about-card")
    for words in ("license: mit", "1,841,472 parameters",
                  "python train.py shakespeare-bundled", "what it writes is (invented|made up)"):
        expect(card).to_contain_text(re.compile(words, re.IGNORECASE))
    page.click("#about-model input")
    page.get_by_role("option", name=re.compile("markup$")).click()
    expect(card).to_contain_text("markup")
    expect(page.locator("#about-details")).to_be_hidden()
    page.click("#about-more button")
    expect(page.locator("#about-details")).to_contain_text("last validation loss")
    expect(page.locator("#about-details")).to_contain_text(f"{MARKUP}, by character")
    assert_markup_stays_text(page)


def test_links_within_the_repository_and_tags_become_text():
    card = ("[sizes](../../docs/scaling.md) [paper](https://arxiv.org/abs/2305.07759)\n"
            "![loss](loss.png)\n<details><summary>Books</summary>\n<b>\n```json\n{}\n```")
    assert about.clean(card) == (
        "sizes [paper](https://arxiv.org/abs/2305.07759)\n\nBooks\n&lt;b>")
