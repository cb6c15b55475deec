"""The tabs Look inside, Training and About, in a browser and through the page's API."""
import json
import re
import socket
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import PROSE, small_bpe, tiny_gpt
from gradio_client import Client
from playwright.sync_api import expect

import checkpoint
import prepare
from engine.likelihood import perplexity
from tokenizer import CharTokenizer
from ui import about, look, training
from ui.models import Models
from ui.training import TrainingProcess

MARKUP = "<img src=x onerror=window.hacked=1>"
TEXT = "the fox went out on a chilly night"
PRESET = training.SMALL_PRESETS[0]
LOCAL = SimpleNamespace(headers={"host": "localhost:7860"},
                        client=SimpleNamespace(host="127.0.0.1"))  # a request


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data and two finished runs: `bpe` with a byte-level BPE, `markup` with HTML in
    its log."""
    folder = tmp_path_factory.mktemp("tabs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "prose.txt").write_text(PROSE, encoding="utf-8")
        prepare.main(prepare.PrepareConfig(source="tiny_shakespeare", text=folder / "prose.txt"))
        char = CharTokenizer("".join(sorted(set(PROSE + MARKUP))))
        for name, tokenizer, block_size in ("bpe", small_bpe(), 16), ("markup", char, 64):
            run = folder / "log" / name
            run.mkdir(parents=True)
            model = tiny_gpt(tokenizer.vocab_size, block_size)
            checkpoint.save(run, 6, model, {}, tokenizer, {}, 1.0)
            write_log(run)
    return folder


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
def url(folder):
    """A page with these tabs, on which visitors can train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", folder / "log")
        models, process = Models("bundled:shakespeare"), TrainingProcess()
        patch.setattr(training, "TrainingProcess", lambda: process)
        with gr.Blocks(analytics_enabled=False) as page:
            with gr.Tab("Look inside"):
                look.build(models)
            with gr.Tab("About"):
                about.build(models)
            with gr.Tab("Training"):
                training.build(models, training=True)
        page.queue()
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        page.launch(server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False,
                    run_history=False, max_threads=100)
        yield f"http://127.0.0.1:{port}/"
        process.stop(LOCAL)
        page.close()


@pytest.fixture
def open_tab(chromium, url):
    contexts = []

    def open_it(title, width=1280, height=900):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.goto(url)
        page.get_by_role("tab", name=title).click()
        return page

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False, httpx_kwargs={"timeout": 60})


def wait_for_text(page, name: str, pattern: str):
    """Waits until the box has a text that matches, and returns it."""
    box = page.locator(f"#{name} textarea")
    expect(box).to_have_value(re.compile(pattern, re.DOTALL), timeout=60_000)
    return box.input_value()


def assert_markup_stays_text(page):
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("window.hacked") is None


# --------------------------------------------------------------------------------------------------
# Look inside

def test_a_person_looks_into_a_text_and_forks_it(open_tab):
    page = open_tab("Look inside")
    page.fill("#look-text textarea", "ROMEO:\nO, speak again, bright angel")
    wait_for_text(
        page, "look-summary",
        r"^35 tokens, 35 bytes · [\d.]+ nats per token · perplexity [\d.]+ · [\d.]+ bits per byte$")
    tokens = page.locator("#look-tokens .token")
    expect(tokens).to_have_count(35)
    tokens.nth(10).click()
    expect(page.locator("#look-position input")).to_have_value("11")
    page.fill("#look-top-p input[type=number]", "1")
    page.keyboard.press("Tab")
    wait_for_text(
        page, "look-token",
        "^“s” has probability .* sampled with probability .*; candidates: 65")
    page.fill("#look-top-k input[type=number]", "3")
    page.keyboard.press("Tab")
    wait_for_text(page, "look-token", r"candidates: 3\.")

    other = page.locator("#look-expected button").nth(1)
    letter = other.locator("dt").inner_text()
    other.click()
    fork = wait_for_text(page, "look-fork", ".{90}")
    assert fork.startswith("ROMEO:\nO, " + letter.replace("␣", " "))
    page.locator("#look-position input").press("ArrowUp")
    expect(page.locator("#look-position input")).to_have_value("12")
    wait_for_text(page, "look-token", "^“p” has")
    page.wait_for_timeout(500)
    written = page.input_value("#look-fork textarea")
    page.click("#look-again")
    wait_for_text(page, "look-text", re.escape(written))


@pytest.mark.parametrize("model, temperature, top_k, top_p", [
    ("log/bpe", 1.0, 0, 1.0), ("log/bpe", 0.5, 4, 1.0), ("log/bpe", 1.7, 0, 0.6),
    ("bundled:shakespeare", 0.8, 0, 0.9)])
def test_tokens_are_sampled_from_the_softmax_that_the_settings_cut(
        client, folder, model, temperature, top_k, top_p):
    name = model.replace("log", str(folder / "log"))
    gpt, tokenizer, _ = checkpoint.load_model(name)
    start = [tokenizer.eot] if tokenizer.eot is not None else []
    ids = start + tokenizer.encode(TEXT[:14])[:5]
    logits = gpt(torch.tensor([ids]))[0][0, -1, :tokenizer.vocab_size].double()
    order = logits.argsort(descending=True)
    p = (logits / temperature).softmax(-1)[order]
    p[top_k or len(p):] = 0
    p /= p.sum()
    p[p.cumsum(0) - p >= top_p] = 0
    p /= p.sum()

    position = len(ids) + (tokenizer.eot is None)  # counted from 1
    sentence, expected, sampled = client.predict(
        TEXT[:14], name, position, temperature, top_k, top_p, api_name="/alternatives")
    for shown, probabilities in (expected, logits.softmax(-1)[order]), (sampled, p):
        values = sorted((row["confidence"] for row in shown["confidences"]), reverse=True)
        np.testing.assert_allclose(values, probabilities[:10].tolist(), atol=2e-4)
    assert f"candidates: {(p > 0).sum():,}." in sentence


@pytest.mark.parametrize("model", ["log/bpe", "log/markup", "bundled:shakespeare"])
def test_bits_per_byte_are_those_of_the_whole_text(client, folder, model):
    name = model.replace("log", str(folder / "log"))
    summary, tokens, surprisal = client.predict(TEXT[:16], name, api_name="/inspect")
    gpt, tokenizer, _ = checkpoint.load_model(name)
    expected = perplexity(gpt, tokenizer, TEXT[:16])
    pattern = r"([\d.]+) nats per token · perplexity ([\d.,]+) · ([\d.]+) bits"
    nats, ppl, bits = map(float, re.search(pattern, summary.replace(",", "")).groups())
    assert (nats, bits) == pytest.approx(
        (expected["nats_per_token"], expected["bits_per_byte"]), abs=2e-3)
    assert ppl == pytest.approx(expected["perplexity"], rel=1e-2)
    assert len(surprisal["data"]) == expected["tokens"]
    assert len(tokens) == len(tokenizer.encode(TEXT[:16]))


def test_the_end_of_a_text_and_no_text_have_alternatives_too(client):
    for text in "ROMEO", "", "Я":
        sentence, expected, _ = client.predict(
            text, "bundled:shakespeare", 4_000, 1.0, 0, 1.0, api_name="/alternatives")
        assert "end of the text" in sentence and len(expected["confidences"]) == 10


@pytest.mark.parametrize("values", [
    ("a" * 4_001, "bundled:shakespeare"), ("a", "/etc/passwd"), ("a", "gpt2"), ("a", "../log")])
def test_looking_inside_is_checked_on_the_server(client, values):
    with pytest.raises(Exception, match=r"at most 4,000|in the list"):
        client.predict(*values, api_name="/inspect")


# --------------------------------------------------------------------------------------------------
# Training

def test_a_person_trains_stops_and_writes_with_what_was_saved(open_tab, folder):
    page = open_tab("Training")
    page.get_by_role("button", name="Train a model here").click()
    page.fill("#train-name textarea, #train-name input", "mine")
    page.fill("#train-steps input", "100000")
    page.keyboard.press("Tab")
    page.click("#train-start")
    cells = page.locator("#runs-progress [role=gridcell]")
    expect(cells.filter(has_text=re.compile("training, .* left"))).to_have_count(1, timeout=120_000)
    plot = page.locator("#plot-train_loss img")
    expect(plot).to_be_visible(timeout=60_000)
    before = plot.get_attribute("src")
    page.wait_for_function(
        "before => document.querySelector('#plot-train_loss img').src != before", arg=before)
    page.click("#train-stop")
    wait_for_text(page, "train-status", "mine was stopped and its checkpoint saved")
    saved = checkpoint.model_steps(folder / "log" / "mine")
    assert saved and not training.is_training(folder / "log" / "mine")
    expect(cells.filter(has_text="stopped")).to_have_count(1, timeout=60_000)
    page.fill("#runs-prompt textarea", "the fox ")
    page.click("#runs-write")
    text = wait_for_text(page, "runs-text", "^the fox .{250}")
    assert set(text) <= set(PROSE)


def test_several_runs_are_shown_with_their_samples(open_tab, client):
    progress, *_, samples = client.predict(["bpe", "markup"], api_name="/runs")
    assert [row[:2] for row in progress["data"]] == [["bpe", "6 of 6"], ["markup", "6 of 6"]]
    assert [row[0] for row in samples["data"]] == ["bpe", "markup"]
    page = open_tab("Training")
    cells = page.locator("#runs-samples [role=gridcell]")
    expect(cells.filter(has_text=MARKUP)).to_have_count(1, timeout=60_000)
    assert_markup_stays_text(page)


def test_a_request_names_runs_from_the_list_and_no_paths(client, folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "metrics.jsonl").write_text("{}\n")
    models = Models("bundled:shakespeare")
    for name in "../elsewhere", str(folder / "elsewhere"), "..", "", MARKUP:
        assert client.predict([name], api_name="/runs")[0]["data"] in ([], [[""] * 5])
        with pytest.raises(gr.Error, match="no checkpoint"):
            list(training.write_sample(models, [name], "a"))


@pytest.mark.parametrize("preset, name, sentence", [
    ("gpt2-124m", "mine", "Choose a preset"), ("../train", "mine", "Choose a preset"),
    (PRESET, "../out", "--name"), (PRESET, "", "--name"), (PRESET, "a b", "--name"),
    (PRESET, None, "--name")])
def test_the_settings_of_a_new_run_are_checked(preset, name, sentence):
    process = TrainingProcess()
    with pytest.raises(gr.Error, match=sentence):
        process.start(preset, name, 5, [], LOCAL)
    assert process.process is None


def test_a_run_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LOG", tmp_path / "log")
    process = TrainingProcess()
    process.start(PRESET, "-x", 5, [], LOCAL)
    process.process.wait()
    assert re.search("No data found in .* Create it with:", process.status())


def test_a_public_space_trains_nothing():
    with gr.Blocks() as page:
        training.build(Models("bundled:shakespeare"), training=False)
    buttons = {
        component["id"] for component in page.config["components"]
        if component["props"].get("elem_id") in ("train-start", "train-stop")}
    assert len(buttons) == 2
    targets = [target for event in page.config["dependencies"] for target, _ in event["targets"]]
    assert not buttons & set(targets)


# --------------------------------------------------------------------------------------------------
# About, and all three tabs

def test_the_card_says_what_a_model_learned_how_well_and_under_which_licence(open_tab):
    page = open_tab("About")
    card = page.locator("#about-card")
    for words in ("1.494", "license: mit", "python train.py shakespeare-bundled",
                  "what it writes is (invented|made up)"):
        expect(card).to_contain_text(re.compile(words, re.IGNORECASE), timeout=60_000)
    page.click("#about-model input")
    page.get_by_role("option", name=re.compile("markup$")).click()
    expect(card).to_contain_text("last validation loss", timeout=60_000)
    expect(card).to_contain_text("step 6")
    expect(card).to_contain_text(f"{MARKUP}, by character")
    assert_markup_stays_text(page)


def test_markup_stays_text_and_the_page_fits_a_phone(open_tab):
    page = open_tab("Look inside", width=390, height=844)
    page.fill("#look-text textarea", MARKUP)
    expect(page.locator("#look-tokens .token")).to_have_count(len(MARKUP), timeout=60_000)
    for title in "Look inside", "Training", "About":
        page.get_by_role("tab", name=title).click()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert_markup_stays_text(page)
