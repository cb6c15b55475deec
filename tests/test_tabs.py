"""The tab Look inside, in a browser and through the page's API."""
import re
from html import unescape

import numpy as np
import pytest
import torch
from conftest import MARKUP, assert_markup_stays_text, go_to, running_page
from playwright.sync_api import expect

import checkpoint
from engine.likelihood import perplexity
from ui import layers, tour
from ui.models import Models
from ui.reading import MAX_TEXT, SAMPLE, place_in, visible

TEXT = "the fox went out on a chilly night"


@pytest.fixture(scope="module")
def url(two_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", two_runs)
        with running_page() as address:
            yield address


@pytest.fixture
def open_look_inside(new_window, url):
    def open_it(**size):
        page = new_window(url, **size)
        go_to(page, "Look inside")
        return page

    return open_it


def wait_for_text(page, name: str, pattern: str):
    """Waits until the box has a text that matches, and returns it."""
    box = page.locator(f"#{name} textarea")
    expect(box).to_have_value(re.compile(pattern, re.DOTALL), timeout=60_000)
    return box.input_value()


# --------------------------------------------------------------------------------------------------
# Look inside

def test_a_person_looks_into_a_text_and_forks_it(open_look_inside):
    page = open_look_inside()
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
        client, two_runs, model, temperature, top_k, top_p):
    name = model.replace("log", str(two_runs))
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
def test_bits_per_byte_are_those_of_the_whole_text(client, two_runs, model):
    name = model.replace("log", str(two_runs))
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


def test_a_token_that_begins_with_a_space_looks_different(client, two_runs):
    _, expected, _ = client.predict(
        "the fox", str(two_runs / "bpe"), 2, 1.0, 0, 1.0, api_name="/alternatives")
    labels = [row["label"] for row in expected["confidences"]]
    assert len(set(labels)) == 10 and not any(" " in label for label in labels)


def test_a_text_that_cannot_be_read_leaves_no_tokens_of_the_last_one(open_look_inside):
    page = open_look_inside()
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
def test_the_layers_show_what_the_model_computes(two_runs, model, position):
    models = Models(model.replace("log", str(two_runs)))
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


def test_a_person_chooses_a_head_and_a_prediction(open_look_inside):
    page = open_look_inside()
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
def test_every_step_of_the_tour_has_a_view_of_every_model(two_runs, model):
    models = Models(model.replace("log", str(two_runs)))
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


def test_a_person_takes_the_tour(open_look_inside):
    page = open_look_inside()
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


def test_markup_stays_text_and_the_page_fits_a_phone(open_look_inside):
    page = open_look_inside(width=390, height=844)
    page.fill("#look-text textarea", MARKUP)
    expect(page.locator("#look-tokens .token")).to_have_count(len(MARKUP), timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert_markup_stays_text(page)
