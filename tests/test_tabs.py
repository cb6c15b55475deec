"""The tabs Look inside, Training and About, in a browser and through the page's API."""
import json
import re
import socket
from html import unescape
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
from app import STATIC
from engine.likelihood import perplexity
from tokenizer import CharTokenizer
from ui import about, layers, look, tour, training
from ui.models import Models
from ui.reading import MAX_TEXT, SAMPLE, place_in, visible
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
        scripts = ["page.js", "look.js"]
        head = "".join(f"<script>{(STATIC / name).read_text()}</script>" for name in scripts)
        page.launch(server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False,
                    run_history=False, max_threads=100, head=head,
                    css_paths=[STATIC / "page.css", STATIC / "look.css"])
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
    expect(page.locator("#look-tokens .token").nth(10)).to_have_css("outline-style", "solid")
    expect(page.locator("#look-tokens .token").nth(9)).to_have_css("outline-style", "none")
    wait_for_text(page, "look-token", "^“s” has probability .* tokens to choose from is 65")
    page.fill("#look-top-k input[type=number]", "3")
    page.keyboard.press("Tab")
    wait_for_text(page, "look-token", r"tokens to choose from is 3\.")

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
    expect(page.locator("#look-fork textarea")).to_have_value("")  # it belonged to the old text


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
    assert f"tokens to choose from is {(p > 0).sum():,}." in sentence


@pytest.mark.parametrize("model", ["log/bpe", "log/markup", "bundled:shakespeare"])
def test_bits_per_byte_are_those_of_the_whole_text(client, folder, model):
    name = model.replace("log", str(folder / "log"))
    summary, tokens = client.predict(TEXT[:16], name, api_name="/inspect")
    gpt, tokenizer, _ = checkpoint.load_model(name)
    expected = perplexity(gpt, tokenizer, TEXT[:16])
    pattern = r"([\d.]+) nats per token · perplexity ([\d.,]+) · ([\d.]+) bits"
    nats, ppl, bits = map(float, re.search(pattern, summary.replace(",", "")).groups())
    assert (nats, bits) == pytest.approx(
        (expected["nats_per_token"], expected["bits_per_byte"]), abs=2e-3)
    assert ppl == pytest.approx(expected["perplexity"], rel=1e-2)
    coloured = [token for token in tokens if token["class_or_confidence"]]
    assert len(coloured) == expected["tokens"]
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


def test_a_token_that_begins_with_a_space_looks_different(client, folder):
    _, expected, _ = client.predict(
        "the fox", str(folder / "log" / "bpe"), 2, 1.0, 0, 1.0, api_name="/alternatives")
    labels = [row["label"] for row in expected["confidences"]]
    assert len(set(labels)) == 10 and not any(" " in label for label in labels)


def test_a_text_that_cannot_be_read_leaves_no_tokens_of_the_last_one(open_tab):
    page = open_tab("Look inside")
    page.fill("#look-text textarea", "ROMEO")
    tokens = page.locator("#look-tokens .token")
    expect(tokens).to_have_count(5)
    page.evaluate("document.querySelector('#look-text textarea').removeAttribute('maxlength')")
    page.fill("#look-text textarea", "a" * (MAX_TEXT + 1))
    expect(page.get_by_text("at most 4,000 are allowed").first).to_be_visible()
    expect(tokens).to_have_count(0)
    expect(page.locator("#look-summary textarea")).to_have_value("")


# --------------------------------------------------------------------------------------------------
# The layers, and the tour through them

def cells(html: str) -> list[str]:
    """The texts of a table's cells."""
    return [unescape(re.sub("<.*?>", "", found)) for found in re.findall("<td.*?</td>", html)]


@pytest.mark.parametrize("model", ["log/bpe", "bundled:shakespeare"])
@pytest.mark.parametrize("position", [1, 7, 1_000])
def test_the_layers_show_what_the_model_computes(folder, model, position):
    models = Models(model.replace("log", str(folder / "log")))
    place = place_in(models, TEXT, models.names[0], position)
    gpt, tokenizer, _ = checkpoint.load_model(models.names[0])
    ids = tokenizer.encode(TEXT)
    assert place.token == (ids[position - 1] if position <= len(ids) else None)
    assert place.trace.ids[place.row:place.row + 1] == ids[position - 1:position]
    assert len(place.trace.ids) <= gpt.config.block_size
    n_layer, n_head = gpt.config.n_layer, gpt.config.n_head

    # each head's cell has the token that it looks at most
    heads = cells(layers.heads_html(place))
    row = min(place.row, len(place.trace.ids) - 1)
    best, target = place.trace.attention[1, 1, row].max(0)
    assert len(heads) == n_layer * n_head
    assert heads[n_head + 1] == f"{best:.0%} {visible(place.engine, place.trace.ids[target])}"
    assert layers.attention_html(place, 2, 2).count("<span") == len(place.trace.ids)

    # the last layer of the lens predicts what the model predicts
    before = place.trace.ids[:place.row]
    with torch.no_grad():
        logits = gpt(torch.tensor([before]))[0][0, -1, :tokenizer.vocab_size]
    columns = min(place.row, layers.LENS_COLUMNS)
    lens = cells(layers.lens_html(place))
    assert lens[n_layer * columns + columns - 1] == visible(place.engine, int(logits.argmax()))
    np.testing.assert_allclose(place.logits(), logits, atol=1e-3)

    # the contributions add up to the logit above the mean
    _, token = layers.predictions(place)[0]
    html = layers.contributions_html(place, token)
    shown = re.search(r"is ([+-][\d.]+): ([+-][\d.]+) .*? ([+-][\d.]+) .*? ([+-][\d.]+)", html)
    total, *parts = map(float, shown.groups())
    assert total == pytest.approx((logits[token] - logits.mean()).item(), abs=0.01)
    assert sum(parts) == pytest.approx(total, abs=0.02)


def test_a_person_chooses_a_head_and_a_prediction(open_tab):
    page = open_tab("Look inside")
    page.fill("#look-text textarea", "ROMEO:\nO, speak again")
    page.fill("#look-position input", "9")
    page.keyboard.press("Tab")
    attention = page.locator("#layers-attention")
    expect(attention).to_contain_text("“,” looks back at:", timeout=60_000)
    button = page.locator("#layers-heads button[data-layer='2'][data-head='2']")
    before = attention.inner_html()
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#layers-layer input[type=number]")).to_have_value("2")
    expect(page.locator("#layers-head input[type=number]")).to_have_value("2")
    page.wait_for_function(
        "before => document.querySelector('#layers-attention').innerHTML != before", arg=before)
    page.get_by_role("tab", name="Contributions").click()
    expect(page.locator("#layers-contributions")).to_contain_text("the logit of “,” is")
    page.click("#layers-prediction input")
    page.get_by_role("option").nth(2).click()
    other = page.input_value("#layers-prediction input")
    expect(page.locator("#layers-contributions")).to_contain_text(f"the logit of “{other}” is")


@pytest.mark.parametrize("model", ["log/bpe", "log/markup", "bundled:shakespeare"])
def test_every_step_of_the_tour_has_a_view_of_every_model(folder, model):
    models = Models(model.replace("log", str(folder / "log")))
    views = []
    for number in range(len(tour.STEPS)):
        _, paragraph, view, back, forward = tour.show(models, number, models.names[0])
        assert paragraph.startswith(f"### {number + 1} of 8: ")
        assert back["interactive"] == (number > 0) and forward["interactive"] == (number < 7)
        views.append(view)
    assert len(set(views)) == 8
    # the loss is the model's
    gpt, tokenizer, _ = checkpoint.load_model(models.names[0])
    text, _ = tokenizer.replace_unknown(SAMPLE)
    if len(tokenizer.encode(text)) < gpt.config.block_size:
        nats = perplexity(gpt, tokenizer, text)["nats_per_token"]
        assert f"the loss of this text: {nats:.2f} nats" in views[-1]


def test_a_person_takes_the_tour(open_tab):
    page = open_tab("Look inside")
    page.click("#tour-start")
    text = page.locator("#tour-text")
    expect(text).to_contain_text("1 of 8: Tokens", timeout=60_000)
    expect(page.locator("#tour-back")).to_be_disabled()
    for title in "2 of 8: Embedding", "3 of 8: Attention":
        page.click("#tour-next")
        expect(text).to_contain_text(title)
    expect(page.locator("#tour-view")).to_contain_text("looks back at")
    page.click("#tour-back")
    expect(text).to_contain_text("2 of 8: Embedding")
    page.click("#tour-close")
    expect(text).to_be_hidden()
    expect(page.locator("#tour-start")).to_be_visible()


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
