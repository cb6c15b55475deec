"""The tab Look inside, in a browser and through the page's API."""
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
from engine.likelihood import perplexity
from tokenizer import CharTokenizer
from ui import look
from ui.models import Models

MARKUP = "<img src=x onerror=window.hacked=1>"
TEXT = "the fox went out on a chilly night"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two runs: `bpe` with a byte-level BPE, `markup` with an alphabet for HTML."""
    folder = tmp_path_factory.mktemp("tabs")
    char = CharTokenizer("".join(sorted(set(PROSE + MARKUP))))
    for name, tokenizer, block_size in ("bpe", small_bpe(), 16), ("markup", char, 64):
        run = folder / "log" / name
        run.mkdir(parents=True)
        checkpoint.save(run, 6, tiny_gpt(tokenizer.vocab_size, block_size), {}, tokenizer, {}, 1.0)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", folder / "log")
        with gr.Blocks(analytics_enabled=False) as page, gr.Tab("Look inside"):
            look.build(Models("bundled:shakespeare"))
        page.queue()
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        page.launch(server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False,
                    run_history=False, max_threads=100)
        yield f"http://127.0.0.1:{port}/"
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


def test_markup_stays_text_and_the_page_fits_a_phone(open_tab):
    page = open_tab("Look inside", width=390, height=844)
    page.fill("#look-text textarea", MARKUP)
    expect(page.locator("#look-tokens .token")).to_have_count(len(MARKUP), timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert_markup_stays_text(page)
