import os
import re
import shutil
import socket
import time

import pytest
from conftest import tiny_gpt
from gradio_client import Client
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect, sync_playwright

import app
import checkpoint
from errors import UserError
from generate import Engine
from scheduler import Scheduler
from tokenizer import CharTokenizer
from ui.write import EXAMPLES, MAX_PROMPT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def steps():
    """Counts the steps that engines take, in `steps[0]`."""
    count, plain = [0], Scheduler.step

    def counted(self):
        count[0] += 1
        return plain(self)
    Scheduler.step = counted
    yield count
    Scheduler.step = plain


@pytest.fixture(scope="module")
def url(steps, tmp_path_factory):
    """A page with two models, the bundled one first; the other is a run that writes nothing but a, b and c."""
    port, log = free_port(), tmp_path_factory.mktemp("page") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", log)
        (log / "abc").mkdir(parents=True)
        checkpoint.save(log / "abc", 7, tiny_gpt(vocab_size=3), {}, CharTokenizer("abc"), {}, 1.0)
        page = app.main(app.AppConfig(model="bundled", port=port), prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}/"
    page.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-background-networking"])
        except PlaywrightError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no Chromium to open the page with: {error}")
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, url):
    """Opens the page as a person's browser does; every address it asks for is kept in page.asked."""
    contexts = []

    def open_it(width=1280, height=900):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(url)
        expect(page.locator("#generate")).to_be_visible(timeout=30_000)
        return page

    yield open_it
    for context in contexts:
        context.close()


def text_of(page) -> str:
    return page.input_value("#text textarea")


def set_number(page, name, value):
    page.fill(f"#{name} input[type=number]", str(value))
    page.keyboard.press("Tab")


def finish(page, characters: int) -> str:
    """The text once it has this many characters."""
    page.wait_for_function(f"document.querySelector('#text textarea').value.length == {characters}", timeout=60_000)
    return text_of(page)


def test_a_person_types_generates_and_watches_the_text_stream(open_page):
    page = open_page()
    page.fill("#prompt textarea", "JULIET:\nO ")
    set_number(page, "length", 300)
    page.click("#generate")
    seen, deadline = {text_of(page)}, time.monotonic() + 60
    while not page.input_value("#status textarea").startswith("300 tokens") and time.monotonic() < deadline:
        seen.add(text_of(page))
    assert len({len(text) for text in seen}) > 3, "it grew in several pieces"
    text = text_of(page)
    assert text.startswith("JULIET:\nO ") and len(text) == len("JULIET:\nO ") + 300
    assert re.fullmatch(r"300 tokens · first after [\d,]+ ms · [\d,]+ tokens/s · seed \d+", page.input_value("#status textarea"))


def test_stop_stops_the_computation(open_page, steps):
    page = open_page()
    set_number(page, "length", 2000)
    page.click("#generate")
    page.wait_for_function("document.querySelector('#text textarea').value.length > 50", timeout=60_000)
    page.click("#stop")
    time.sleep(1)
    stopped, text = steps[0], text_of(page)
    time.sleep(1)
    assert steps[0] == stopped and text_of(page) == text
    assert len(text) < 2000


def test_a_seed_gives_its_text_again_and_a_slider_changes_it(open_page):
    page = open_page()
    set_number(page, "length", 60)
    page.uncheck("#fresh input")
    set_number(page, "seed", 7)
    texts = []
    for temperature in (0.8, 0.8, 1.8):
        set_number(page, "temperature", temperature)
        page.fill("#text textarea", "")
        page.click("#generate")
        texts.append(finish(page, len(EXAMPLES[0]) + 60))
    assert texts[0] == texts[1] != texts[2]
    expect(page.locator("#status textarea")).to_have_value(re.compile("seed 7$"))


def test_a_new_seed_is_drawn_and_shown(open_page):
    page = open_page()
    set_number(page, "length", 30)
    page.click("#generate")
    finish(page, len(EXAMPLES[0]) + 30)
    seed = page.input_value("#seed input")
    assert seed != "42" and page.input_value("#status textarea").endswith(f"seed {seed}")


def test_continue_goes_on_from_the_text_as_it_stands(open_page):
    page = open_page()
    set_number(page, "length", 30)
    page.fill("#text textarea", "KING HENRY:\nWell, ")
    page.click("#continue")
    first = finish(page, len("KING HENRY:\nWell, ") + 30)
    assert first.startswith("KING HENRY:\nWell, ")
    set_number(page, "length", 20)
    page.click("#continue")
    assert finish(page, len(first) + 20).startswith(first)


def test_the_selector_changes_the_model(open_page):
    page = open_page()
    page.click("#model input")
    page.get_by_role("option", name="abc").click()
    expect(page.get_by_text(re.compile("step 7, .*reads 16 tokens"))).to_be_visible()
    page.fill("#prompt textarea", "cab")
    set_number(page, "length", 40)
    page.click("#generate")
    text = finish(page, 43)
    assert text.startswith("cab") and set(text) <= set("abc")


def test_what_the_alphabet_lacks_is_said_and_markup_stays_text(open_page):
    page = open_page()
    page.fill("#prompt textarea", "<img src=x onerror=alert(1)> Я")
    set_number(page, "length", 5)
    page.click("#generate")
    assert finish(page, 35).startswith("<img src=x onerror=alert(1)> Я")
    assert "alphabet lacks" in page.input_value("#status textarea") and "Я" in page.input_value("#status textarea")
    assert page.locator("img[src=x]").count() == 0


def test_the_page_asks_nobody_but_its_server(open_page, url):
    page = open_page()
    page.click("#generate")
    page.wait_for_timeout(1000)
    assert page.asked and all(asked.startswith((url, "data:", "blob:")) for asked in page.asked)


def test_the_page_fits_a_phone_and_warns(open_page):
    page = open_page(width=390, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.get_by_text("false or offensive")).to_be_visible()


def test_a_bad_request_reaches_the_person_as_a_sentence(open_page):
    page = open_page()
    page.evaluate("document.querySelector('#text textarea').removeAttribute('maxlength')")
    page.fill("#text textarea", "a" * (MAX_PROMPT + 1))
    page.click("#continue")
    expect(page.get_by_text("the page takes 20,000")).to_be_visible(timeout=10_000)


# ----------------------------------------------------------------------------------------------------------------
# The API

@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def test_the_endpoint_streams_what_the_engine_writes(client):
    job = client.submit("ROMEO:\n", temperature=0.9, top_k=20, length=200, seed=5, api_name="/generate")
    text, status = job.result(timeout=60)
    engine = Engine(*checkpoint.load_model("bundled")[:2])
    assert text == "ROMEO:\n" + engine.generate("ROMEO:\n", temperature=0.9, top_k=20, max_new_tokens=200, seed=5)[0]
    assert status.endswith("seed 5")
    pieces = [piece for piece, _ in job.outputs()]
    assert len(pieces) > 2 and all(text.startswith(piece) for piece in pieces)


def test_nothing_to_continue_is_an_empty_prompt(client):
    assert len(client.predict(None, length=5, api_name="/generate")[0]) == 5


@pytest.mark.parametrize("values", [
    {"temperature": 0.0}, {"temperature": 2.1}, {"temperature": -1}, {"length": 0}, {"length": 1e9}, {"top_k": -1},
    {"seed": -5}, {"model": "/etc/passwd"}, {"model": "gpt2"}, {"model": None}, {"prompt": "a" * (MAX_PROMPT + 1)}])
def test_values_are_checked_on_the_server_too(client, values):
    with pytest.raises(Exception, match=r"(?i)minimum|maximum|less|greater|choices|takes 20,000|Choose a model"):
        client.predict(**{"prompt": "ROMEO:", "length": 5, **values}, api_name="/generate")


def test_a_port_in_use_or_impossible_gets_one_sentence(url):
    for port in int(url.rsplit(":", 1)[1].strip("/")), 0, 99_999, -1:
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            app.main(app.AppConfig(model="bundled", port=port))
