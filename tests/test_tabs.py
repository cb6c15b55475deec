"""The tabs Look inside, Training and About, as a person's browser and a program's client see them."""
import json
import re
import socket

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
from ui.training import Started

MARKUP = "<img src=x onerror=window.hacked=1>"
TEXT = "the fox went out on a chilly night"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, and two runs that nobody trains: one of a byte-level BPE, one whose log holds markup."""
    place = tmp_path_factory.mktemp("tabs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "prose.txt").write_text(PROSE, encoding="utf-8")
        prepare.main(prepare.PrepareConfig(source="tiny_shakespeare", text=place / "prose.txt"))
        char = CharTokenizer("".join(sorted(set(PROSE + MARKUP))))
        for name, tokenizer, block_size in ("bpe", small_bpe(), 16), ("markup", char, 64):
            run = place / "log" / name
            run.mkdir(parents=True)
            checkpoint.save(run, 6, tiny_gpt(tokenizer.vocab_size, block_size), {}, tokenizer, {}, 1.0)
            lines = [{"step": s, "time": 1e9 + s, "val_loss": 5 - s / 2, "train_loss": 5 - s / 2} for s in range(7)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (run / "samples.jsonl").write_text(json.dumps({"step": 6, "time": 1e9, "prompt": "", "text": MARKUP}) + "\n")
            (run / "config.json").write_text(json.dumps({"batch_tokens": 128, "max_steps": 6, "data": MARKUP}))
    return place


@pytest.fixture(scope="module")
def url(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", place / "log")
        models, started = Models("bundled:shakespeare"), Started()
        patch.setattr(training, "Started", lambda: started)
        with gr.Blocks(analytics_enabled=False) as page:
            for title, build in {"Look inside": look.build, "About": about.build,
                                 "Training": lambda models: training.build(models, training=True)}.items():
                with gr.Tab(title):
                    build(models)
        page.queue()
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        page.launch(server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False, run_history=False, max_threads=100)
        yield f"http://127.0.0.1:{port}/"
        started.stop()
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


def has(page, name: str, pattern: str):
    """Waits until the box has a text like this, and returns it."""
    box = page.locator(f"#{name} textarea")
    expect(box).to_have_value(re.compile(pattern, re.DOTALL), timeout=60_000)
    return box.input_value()


# ----------------------------------------------------------------------------------------------------------------
# Look inside

def test_a_person_looks_into_a_text_and_forks_it(open_tab):
    page = open_tab("Look inside")
    page.fill("#look-text textarea", "ROMEO:\nO, speak again, bright angel")
    has(page, "look-summary", "^35 tokens of 35 bytes · [\\d.]+ nats a token · perplexity [\\d.]+ · [\\d.]+ bits a byte$")
    tokens = page.locator("#look-tokens .token")
    expect(tokens).to_have_count(35)
    tokens.nth(10).click()
    expect(page.locator("#look-place input")).to_have_value("11")
    page.fill("#look-top-p input[type=number]", "1")
    page.keyboard.press("Tab")
    has(page, "look-found", "^“s” has probability .* drawn with probability .*, of 65 tokens that can be")
    page.fill("#look-top-k input[type=number]", "3")
    page.keyboard.press("Tab")
    has(page, "look-found", "of 3 tokens that can be")
    other = page.locator("#look-expected button").nth(1)
    letter = other.locator("dt").inner_text()
    other.click()
    fork = has(page, "look-fork", ".{90}")
    assert fork.startswith("ROMEO:\nO, " + letter.replace("␣", " "))
    page.locator("#look-place input").press("ArrowUp")
    expect(page.locator("#look-place input")).to_have_value("12")
    has(page, "look-found", "^“p” has")
    page.wait_for_timeout(500)
    written = page.input_value("#look-fork textarea")
    page.click("#look-again")
    has(page, "look-text", re.escape(written))


@pytest.mark.parametrize("model, temperature, top_k, top_p", [
    ("log/bpe", 1.0, 0, 1.0), ("log/bpe", 0.5, 4, 1.0), ("log/bpe", 1.7, 0, 0.6), ("bundled:shakespeare", 0.8, 0, 0.9)])
def test_what_is_drawn_from_is_the_softmax_that_the_settings_cut(client, place, model, temperature, top_k, top_p):
    name = model.replace("log", str(place / "log"))
    gpt, tokenizer, _ = checkpoint.load_model(name)
    ids = ([tokenizer.eot] if tokenizer.eot is not None else []) + tokenizer.encode(TEXT[:14])[:5]
    logits = gpt(torch.tensor([ids]))[0][0, -1, :tokenizer.vocab_size].double()
    order = logits.argsort(descending=True)
    p = (logits / temperature).softmax(-1)[order]
    p[top_k or len(p):] = 0
    p /= p.sum()
    p[p.cumsum(0) - p >= top_p] = 0
    p /= p.sum()
    at = len(ids) + (tokenizer.eot is None)  # tokens are counted from 1
    found, expected, drawn = client.predict(TEXT[:14], name, at, temperature, top_k, top_p, api_name="/alternatives")
    for shown, wanted in (expected, logits.softmax(-1)[order]), (drawn, p):
        given = sorted((each["confidence"] for each in shown["confidences"]), reverse=True)
        np.testing.assert_allclose(given, wanted[:10].tolist(), atol=2e-4)
    assert f"{(p > 0).sum():,} tokens that can be" in found


@pytest.mark.parametrize("model", ["log/bpe", "log/markup", "bundled:shakespeare"])
def test_bits_a_byte_are_those_of_the_whole_text(client, place, model):
    name = model.replace("log", str(place / "log"))
    summary, tokens, surprisal = client.predict(TEXT[:16], name, api_name="/inspect")
    gpt, tokenizer, _ = checkpoint.load_model(name)
    wanted = perplexity(gpt, tokenizer, TEXT[:16])
    nats, ppl, bits = map(float, re.search(r"([\d.]+) nats a token · perplexity ([\d.,]+) · ([\d.]+) bits",
                                           summary.replace(",", "")).groups())
    assert (nats, bits) == pytest.approx((wanted["nats_per_token"], wanted["bits_per_byte"]), abs=2e-3)
    assert ppl == pytest.approx(wanted["perplexity"], rel=1e-2)
    assert len(surprisal["data"]) == wanted["tokens"] and len(tokens) == len(tokenizer.encode(TEXT[:16]))


def test_the_end_of_a_text_and_no_text_have_alternatives_too(client):
    for text in "ROMEO", "", "Я":
        found, expected, _ = client.predict(text, "bundled:shakespeare", 4_000, 1.0, 0, 1.0, api_name="/alternatives")
        assert "end of the text" in found and len(expected["confidences"]) == 10


@pytest.mark.parametrize("values", [("a" * 4_001, "bundled:shakespeare"), ("a", "/etc/passwd"), ("a", "gpt2"), ("a", "../log")])
def test_looking_inside_is_checked_on_the_server(client, values):
    with pytest.raises(Exception, match=r"looks into 4,000|list"):
        client.predict(*values, api_name="/inspect")


# ----------------------------------------------------------------------------------------------------------------
# Training

def test_a_person_trains_stops_and_writes_with_what_was_saved(open_tab, place):
    page = open_tab("Training")
    page.get_by_role("button", name="Train a model here").click()
    page.fill("#train-name textarea, #train-name input", "mine")
    page.fill("#train-steps input", "100000")
    page.keyboard.press("Tab")
    page.click("#train-start")
    cells = page.locator("#runs-where [role=gridcell]")
    expect(cells.filter(has_text=re.compile("goes on, .* left"))).to_have_count(1, timeout=120_000)
    expect(page.locator("#plot-train_loss img")).to_be_visible(timeout=60_000)
    before = page.locator("#plot-train_loss img").get_attribute("src")
    page.wait_for_function("was => document.querySelector('#plot-train_loss img').src != was", arg=before)
    page.click("#train-stop")
    has(page, "train-said", "mine was stopped, and its checkpoint saved")
    saved = checkpoint.model_steps(place / "log" / "mine")
    assert saved and not training.goes_on(place / "log" / "mine")
    expect(cells.filter(has_text="stopped")).to_have_count(1, timeout=60_000)
    page.fill("#runs-prompt textarea", "the fox ")
    page.click("#runs-write")
    text = has(page, "runs-text", "^the fox .{250}")
    assert set(text) <= set(PROSE)


def test_runs_are_drawn_over_each_other_with_what_they_wrote(open_tab, client):
    where, *_, samples = client.predict(["bpe", "markup"], api_name="/runs")
    assert [row[:2] for row in where["data"]] == [["bpe", "6 of 6"], ["markup", "6 of 6"]]
    assert [row[0] for row in samples["data"]] == ["bpe", "markup"]
    page = open_tab("Training")
    expect(page.locator("#runs-samples [role=gridcell]").filter(has_text=MARKUP)).to_have_count(1, timeout=60_000)
    assert page.locator("img[src=x]").count() == 0 and page.evaluate("window.hacked") is None


def test_a_request_names_runs_of_the_list_and_no_paths(client, place):
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "metrics.jsonl").write_text("{}\n")
    for name in "../elsewhere", str(place / "elsewhere"), "..", "", MARKUP:
        assert client.predict([name], api_name="/runs")[0]["data"] in ([], [[""] * 5])
        with pytest.raises(gr.Error, match="no checkpoint"):
            list(training.write_with(Models("bundled:shakespeare"), [name], "a"))


@pytest.mark.parametrize("preset, name, steps, said", [
    ("gpt2-124m", "mine", 5, "Choose a preset"), ("../train", "mine", 5, "Choose a preset"),
    (training.SMALL[0], "../out", 5, "--run"), (training.SMALL[0], "", 5, "--run"), 
    (training.SMALL[0], "a b", 5, "--run"), (training.SMALL[0], None, 5, "--run")])
def test_what_a_run_is_started_with_is_checked(preset, name, steps, said):
    started = Started()
    with pytest.raises(gr.Error, match=said):
        started.start(preset, name, steps, [])
    assert started.process is None


def test_a_run_that_cannot_begin_says_why_in_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LOG", tmp_path / "log")
    started = Started()
    started.start(training.SMALL[0], "-x", 5, [])
    started.process.wait()
    assert re.search("There is no data in .*: make it with", started.says())


def test_a_public_space_trains_nothing():
    with gr.Blocks() as page:
        training.build(Models("bundled:shakespeare"), training=False)
    buttons = {c["id"] for c in page.config["components"] if c["props"].get("elem_id") in ("train-start", "train-stop")}
    assert not any(target in buttons for each in page.config["dependencies"] for target, _ in each["targets"])


# ----------------------------------------------------------------------------------------------------------------
# About, and all of them

def test_the_card_says_what_a_model_learned_how_well_and_under_which_licence(open_tab, place):
    page = open_tab("About")
    card = page.locator("#about-card")
    for words in "1.494", "license: mit", "python train.py shakespeare-bundled", "what it writes is invented":
        expect(card).to_contain_text(re.compile(words, re.IGNORECASE), timeout=60_000)
    page.click("#about-model input")
    page.get_by_role("option", name=re.compile("markup$")).click()
    expect(card).to_contain_text("last validation loss", timeout=60_000)
    expect(card).to_contain_text("step 6")
    expect(card).to_contain_text(f"{MARKUP}, by character")
    assert page.locator("img[src=x]").count() == 0 and page.evaluate("window.hacked") is None


def test_markup_stays_text_and_the_page_fits_a_phone(open_tab):
    page = open_tab("Look inside", width=390, height=844)
    page.fill("#look-text textarea", MARKUP)
    expect(page.locator("#look-tokens .token")).to_have_count(len(MARKUP), timeout=60_000)
    for title in "Look inside", "Training", "About":
        page.get_by_role("tab", name=title).click()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("img[src=x]").count() == 0 and page.evaluate("window.hacked") is None
