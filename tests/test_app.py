import asyncio
import concurrent.futures
import json
import re
import socket
import time
import urllib.parse

import httpx
import pytest
from conftest import tiny_gpt
from gradio_client import Client
from playwright.sync_api import expect

import app
import checkpoint
from common.errors import UserError
from engine.scheduler import Scheduler
from generate import Engine
from tokenizer import CharTokenizer
from ui.models import BEGINNINGS, Models
from ui.stream import MAX_BYTES
from ui.write import write

MARKUP = "<img src=x onerror=alert(1)>"
TABS = ["Write", "Chat", "Compare"]
BEGINNING = BEGINNINGS["bundled:shakespeare"][0]
USUAL = {"temperature": 0.8, "top_p": 0.9}  # what the page begins with


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
    """A page with the bundled model and a run of two checkpoints, which write nothing but a, b and c."""
    port, log = free_port(), tmp_path_factory.mktemp("page") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", log)
        (log / "abc").mkdir(parents=True)
        for step in 5, 7:
            checkpoint.save(log / "abc", step, tiny_gpt(vocab_size=3, seed=step), {}, CharTokenizer("abc"), {}, step / 4)
        page = app.main(app.AppConfig(model="bundled:shakespeare", port=port), prevent_thread_lock=True, quiet=True)
        yield f"http://127.0.0.1:{port}/"
    page.close()


@pytest.fixture(scope="module")
def bundled():
    return Engine(*checkpoint.load_model("bundled:shakespeare")[:2])


@pytest.fixture
def open_page(chromium, url):
    """Opens the page as a person's browser does; every address it asks for is kept in page.asked."""
    contexts = []

    def open_it(address="", width=1280, height=900):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.asked, page.dialogs = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address or url)
        expect(page.locator("#generate")).to_be_visible(timeout=30_000)
        page.wait_for_function("() => Boolean(onhashchange)")  # the settings of a link are in place
        return page

    yield open_it
    for context in contexts:
        context.close()


def text_of(page) -> str:
    return page.input_value("#text textarea")


def set_number(page, name, value):
    page.fill(f"#{name} input[type=number]", str(value))
    page.keyboard.press("Tab")


def choose(page, name, option):
    page.click(f"#{name} input")
    page.locator(f"#{name}").get_by_role("option", name=option, exact=True).or_(
        page.get_by_role("option", name=option, exact=True)).last.click()
    expect(page.locator(f"#{name} input")).to_have_value(option)


def go_to(page, tab):
    seen = page.get_by_role("tab", name=tab, exact=True)
    if not seen.count():  # behind the dots, on a phone
        page.get_by_label("More tabs").click()
        seen = page.locator(".overflow-dropdown").get_by_text(tab, exact=True)
    seen.click()


def finish(page, characters: int) -> str:
    """The text once it has this many characters, and is whole."""
    page.wait_for_function(f"document.querySelector('#text textarea').value.length == {characters}", timeout=60_000)
    expect(page.locator("#status textarea")).to_have_value(re.compile(r"^[\d,]+ tokens"))
    return text_of(page)


# ----------------------------------------------------------------------------------------------------------------
# Write

def test_a_person_types_generates_and_watches_the_text_stream(open_page):
    page = open_page()
    page.fill("#text textarea", "JULIET:\nO ")
    set_number(page, "length", 1000)
    page.click("#generate")
    seen, deadline = {text_of(page)}, time.monotonic() + 60
    while not page.input_value("#status textarea").startswith("1,000 tokens") and time.monotonic() < deadline:
        seen.add(text_of(page))
    assert len({len(text) for text in seen}) > 3, "it grew in several pieces"
    text = text_of(page)
    assert text.startswith("JULIET:\nO ") and len(text) == len("JULIET:\nO ") + 1000
    assert re.fullmatch(r"1,000 tokens · first after [\d,]+ ms · [\d,]+ tokens/s( \([\d.]+% of what reading the weights allows "
                        r"here\))? · context 236 of 256 · seed \d+", page.input_value("#status textarea"))


def test_stop_stops_the_computation_and_so_does_leaving(open_page, steps):
    page = open_page()
    set_number(page, "length", 2000)
    page.click("#generate")
    page.wait_for_function("document.querySelector('#text textarea').value.length > 50", timeout=60_000)
    page.keyboard.press("Escape")
    time.sleep(1)
    stopped, text = steps[0], text_of(page)
    time.sleep(0.5)
    assert steps[0] == stopped and text_of(page) == text and len(text) < 2000
    page.click("#continue")
    page.wait_for_function(f"document.querySelector('#text textarea').value.length > {len(text) + 20}", timeout=60_000)
    assert steps[0] > stopped
    page.close()
    time.sleep(1)
    left = steps[0]
    time.sleep(0.5)
    assert steps[0] == left < 1900 + stopped


def test_a_seed_and_a_link_write_the_same_text_again(open_page):
    page = open_page()
    page.uncheck("#fresh input")
    page.click("#more button")
    page.fill("#stops textarea", "\\n\\n\\n\\n\nzzz")
    for name, value in {"length": 60, "temperature": 0.9, "top-k": 20, "seed": 7}.items():
        set_number(page, name, value)
    texts, prompt = [], "Никто & \"nobody\" # 100%\n"
    for button in "#generate", "#generate", "#regenerate":
        if button == "#generate":
            page.fill("#text textarea", "")
            page.fill("#text textarea", prompt)
        before = text_of(page)
        page.click(button)
        page.wait_for_function("text => document.querySelector('#text textarea').value != text", arg=before)
        expect(page.locator("#status textarea")).to_have_value(re.compile(r"^60 tokens.* seed \d"), timeout=30_000)
        page.wait_for_timeout(300)
        texts.append(text_of(page))
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(prompt) for text in texts)
    page.click("#keep button")
    link = page.input_value("#link textarea")
    assert link.partition("#")[0] == page.url
    other = open_page(link)
    other.wait_for_function("text => document.querySelector('#text textarea').value == text", arg=texts[2], timeout=30_000)
    assert not any("nobody" in urllib.parse.unquote(asked.partition("#")[0]) for asked in other.asked)


def test_a_new_seed_is_drawn_and_the_text_can_be_kept(open_page, bundled):
    page = open_page()
    set_number(page, "length", 30)
    page.click("#generate")
    text = finish(page, len(BEGINNING) + 30)
    seed = int(page.input_value("#seed input"))
    assert seed != 42 and text == BEGINNING + bundled.generate(BEGINNING, max_new_tokens=30, **USUAL, seed=seed)[0]
    page.click("#keep button")
    kept = {}
    for kind in "txt", "json":
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download {kind}").click()
        kept[kind] = download.value.path().read_text(encoding="utf-8")
    said = json.loads(kept["json"])
    assert kept["txt"] == said["text"] == text
    assert said["seed"] == seed and said["prompt"] == BEGINNING and said["dtype"] == "float32"


def test_continue_goes_on_from_the_text_and_generate_begins_again(open_page):
    page = open_page()
    set_number(page, "length", 30)
    prompt = "KING HENRY:\nWell, "
    page.fill("#text textarea", prompt)
    page.click("#continue")
    first = finish(page, len(prompt) + 30)
    set_number(page, "length", 20)
    page.click("#continue")
    second = finish(page, len(first) + 20)
    assert second.startswith(first) and first.startswith(prompt)
    page.click("#generate")
    page.wait_for_function("text => document.querySelector('#text textarea').value != text", arg=second)
    assert finish(page, len(second)).startswith(first)
    page.locator("#text textarea").press_sequentially("!")
    page.click("#generate")
    assert finish(page, len(second) + 21)[len(second)] == "!"


def test_versions_stream_side_by_side_and_the_likeliest_comes_first(open_page):
    page = open_page()
    page.click("#more button")
    set_number(page, "versions", 3)
    set_number(page, "length", 40)
    page.click("#generate")
    text = finish(page, len(BEGINNING) + 40)
    versions = [page.input_value(f"#version-{i} textarea") for i in range(3)]
    means = [float(re.search(r"\d: (-[\d.]+) a token", page.inner_text(f"#version-{i}"))[1]) for i in range(3)]
    assert text == BEGINNING + versions[0] and len(set(versions)) == 3 and means == sorted(means, reverse=True)
    page.locator("#version-2").get_by_role("button", name="Use").click()
    page.wait_for_function("text => document.querySelector('#text textarea').value == text", arg=BEGINNING + versions[2])


def test_the_selector_changes_the_model(open_page, url):
    page = open_page()
    run = next(name for name in Client(url, verbose=False).predict(api_name="/models") if name.endswith("abc"))
    choose(page, "model", run)
    expect(page.get_by_text(re.compile("step 5, .*reads 16 tokens"))).to_be_visible()
    page.fill("#text textarea", "cab")
    set_number(page, "length", 40)
    page.click("#generate")
    text = finish(page, 43)
    assert text.startswith("cab") and set(text) <= set("abc")


# ----------------------------------------------------------------------------------------------------------------
# Chat and Compare

def settled(page):
    """Waits until an answer has ended: nothing changes any more."""
    before, deadline = None, time.monotonic() + 30
    while (now := page.input_value("#chat-status textarea")) != before and time.monotonic() < deadline:
        before = now
        page.wait_for_timeout(600)


def answered(page, turns: int) -> list[str]:
    page.wait_for_function("""n => document.querySelectorAll('#talk .message-content').length == n
        && / tokens · first/.test(document.querySelector('#chat-status textarea').value)""", arg=turns, timeout=30_000)
    settled(page)
    return page.locator("#talk .message-content").all_inner_texts()


def test_a_conversation_is_edited_tried_again_and_never_overflows(open_page):
    page = open_page()
    go_to(page, "Chat")
    expect(page.get_by_text("This is no assistant")).to_be_visible()
    set_number(page, "chat-length", 40)
    page.fill("#say textarea", f"Good morrow! {MARKUP}")
    page.keyboard.press("Enter")
    first = answered(page, 2)
    assert first[0] == f"Good morrow! {MARKUP}" and len(first[1]) > 1
    page.get_by_role("button", name="Retry").click()
    page.wait_for_function("text => !document.querySelector('#talk').innerText.includes(text)", arg=first[1], timeout=30_000)
    assert answered(page, 2)[0] == first[0]
    page.get_by_role("button", name="Edit").first.click()
    page.locator("#talk textarea").fill("What news from Mantua?")
    page.get_by_role("button", name="Submit").first.click()
    page.wait_for_function("document.querySelector('#talk').innerText.includes('Mantua')", timeout=30_000)
    assert answered(page, 2)[0] == "What news from Mantua?"
    page.fill("#say textarea", "I did but jest, and thou art angry. " * 4)
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#talk').innerText.includes('No longer read by the model')", timeout=30_000)
    expect(page.locator("#chat-status textarea")).to_have_value(re.compile("oldest turns are past the model's context"))
    settled(page)
    page.fill("#say textarea", "I did but jest, and thou art angry. " * 8)
    page.keyboard.press("Enter")
    expect(page.get_by_text("say less")).to_be_visible(timeout=10_000)


def test_two_precisions_write_side_by_side_and_a_run_through_time(open_page, url):
    page = open_page()
    go_to(page, "Compare")
    run = next(name for name in Client(url, verbose=False).predict(api_name="/models") if name.endswith("abc"))
    choose(page, "compare-model-0", f"{run}/model_00005.pt")
    choose(page, "compare-model-1", f"{run}/model_00007.pt")
    choose(page, "compare-dtype-1", "float32")
    page.fill("#compare-prompt textarea", f"abc{MARKUP}")
    set_number(page, "compare-length", 50)
    page.click("#compare")
    expect(page.locator("#compare-status textarea")).to_have_value(re.compile(r"The other: 50 tokens.* seed 42"), timeout=30_000)
    one, other = (page.input_value(f"#side-{i} textarea") for i in range(2))
    expected = [Engine(*checkpoint.load_model(f"{run}/model_0000{step}.pt")[:2]).generate(
        f"abc{MARKUP}", max_new_tokens=50, **USUAL, seed=42)[0] for step in (5, 7)]
    assert [one, other] == [f"abc{MARKUP}" + text for text in expected]
    alike = next(i for i, (a, b) in enumerate(zip(*expected)) if a != b)
    assert page.input_value("#compare-status textarea").startswith(f"Alike for the first {alike} characters;")
    choose(page, "timeline-run", run)
    page.click("#timeline")
    cells = page.locator("#timeline-table [role=gridcell]")
    expect(cells.filter(has_text=expected[1])).to_be_visible(timeout=30_000)
    assert [cells.nth(i).inner_text().strip() for i in range(6)] == ["5", "1.250", expected[0], "7", "1.750", expected[1]]


# ----------------------------------------------------------------------------------------------------------------
# The whole page

def test_what_the_alphabet_lacks_is_said_and_markup_stays_text(open_page):
    page = open_page()
    page.fill("#text textarea", f"{MARKUP} Я")
    page.click("#more button")
    set_number(page, "versions", 2)
    set_number(page, "length", 5)
    page.click("#generate")
    assert finish(page, 35).startswith(f"{MARKUP} Я")
    assert "alphabet lacks" in page.input_value("#status textarea") and "Я" in page.input_value("#status textarea")
    go_to(page, "Chat")
    for name in "you", "it":
        page.fill(f"#chat-{name} textarea, #chat-{name} input", MARKUP)
    page.fill("#say textarea", MARKUP)
    page.keyboard.press("Enter")
    assert answered(page, 2)[0] == MARKUP
    assert page.locator("img[src=x]").count() == 0 and not page.dialogs and not any(url.endswith("/x") for url in page.asked)


def test_the_page_asks_nobody_but_its_server(open_page, url):
    page = open_page()
    page.click("#generate")
    page.wait_for_timeout(1000)
    assert page.asked and all(asked.startswith((url, "data:", "blob:")) for asked in page.asked)


@pytest.mark.parametrize("tab", TABS)
def test_the_page_fits_a_phone_and_warns(open_page, tab):
    page = open_page(width=390, height=844)
    expect(page.get_by_text("false or offensive")).to_be_visible()
    go_to(page, tab)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_bad_request_reaches_the_person_as_a_sentence(open_page):
    page = open_page()
    page.evaluate("document.querySelector('#text textarea').removeAttribute('maxlength')")
    page.fill("#text textarea", "a" * (MAX_BYTES + 1))
    page.click("#continue")
    expect(page.get_by_text("at most 40,000 bytes")).to_be_visible(timeout=10_000)


def test_the_page_is_there_before_its_model(monkeypatch, tmp_path):
    slow, loads = checkpoint.load_model, []

    def load(*arguments):
        loads.append(time.monotonic())
        time.sleep(1.5)
        return slow(*arguments)
    monkeypatch.setattr(checkpoint, "load_model", load)
    page = app.main(app.AppConfig(model="bundled:shakespeare", port=free_port()), prevent_thread_lock=True, quiet=True)
    try:
        assert httpx.get(page.local_url).status_code == 200 and time.monotonic() < loads[0] + 1.5
        job = Client(page.local_url, verbose=False).submit("ROMEO:", length=5, api_name="/generate")
        job.result(timeout=60)
        assert "Loading" in job.outputs()[0]["figures"] and len(loads) == 1
    finally:
        page.close()


# ----------------------------------------------------------------------------------------------------------------
# The API

@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False, max_workers=40)


def test_every_action_has_its_name_and_the_rest_is_private(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) >= {"/generate", "/chat", "/compare", "/timeline", "/models"}
    assert not [name for name in named if re.search(r"lambda|_\d+$|load|change|say|show|undo|rows|side", name)]


def test_the_examples_of_the_documentation_run(url):
    code = re.search(r"```python\n(.*?)```", (checkpoint.BUNDLED.parents[1] / "docs" / "api.md").read_text(), re.DOTALL)[1]
    exec(code.replace("http://127.0.0.1:7860", url), {})


def test_the_endpoint_streams_what_the_engine_writes(client, bundled):
    job = client.submit("ROMEO:\n", temperature=0.9, top_k=20, length=200, seed=5, api_name="/generate")
    said = job.result(timeout=60)
    expected = bundled.generate("ROMEO:\n", temperature=0.9, top_k=20, top_p=0.9, max_new_tokens=200, seed=5)[0]
    assert said["text"] == "ROMEO:\n" + expected
    assert said["figures"].endswith("seed 5") and said["versions"][0]["reason"] == "length"
    pieces = [output["text"] for output in job.outputs()]
    assert len(pieces) > 2 and all(said["text"].startswith(piece) for piece in pieces)
    assert client.predict(**said["settings"], api_name="/generate")["text"] == said["text"]


def test_versions_have_the_log_probabilities_that_the_engine_scores(client, bundled):
    said = client.predict("ROMEO:\n", length=50, seed=5, versions=3, api_name="/generate")
    scores = [sum(bundled.score("ROMEO:\n" + version["text"])[7:]) / 50 for version in said["versions"]]
    assert [version["mean_logprob"] for version in said["versions"]] == pytest.approx(scores, abs=1e-3)
    assert scores == sorted(scores, reverse=True)


def test_stop_strings_end_a_text_and_an_empty_prompt_is_one(client, bundled):
    said = client.predict("ROMEO:\n", length=200, seed=5, stop=["e", "zz"], api_name="/generate")["versions"][0]
    whole = bundled.generate("ROMEO:\n", max_new_tokens=200, **USUAL, seed=5)[0]
    assert said["text"] == whole.partition("e")[0] and said["reason"] == "stop"
    assert len(client.predict(length=5, api_name="/generate")["text"]) == 5


def test_the_conversation_is_the_template_that_it_is_said_to_be(client, bundled):
    history = [{"role": "user", "content": "Good morrow."}, {"role": "assistant", "content": "And to thee."}]
    said = client.predict("What news?", history, you="A", it="B", top_p=1.0, length=30, seed=3, api_name="/chat")
    template = "A:\nGood morrow.\n\nB:\nAnd to thee.\n\nA:\nWhat news?\n\nB:\n"
    text = bundled.generate(template, max_new_tokens=30, temperature=0.8, seed=3, stop=("\nA:", "\nB:"))[0]
    assert said["text"] == text.strip()
    long = client.predict("What news?", history * 20, length=30, api_name="/chat")
    assert long["left_out"] > 20 and len(long["text"]) <= 30


@pytest.mark.parametrize("values", [
    {"temperature": 0.0}, {"temperature": 2.1}, {"temperature": "1"}, {"length": 0}, {"length": 1e9}, {"length": 1.5},
    {"top_k": -1}, {"top_p": 0}, {"seed": -5}, {"seed": True}, {"model": "/etc/passwd"}, {"model": "gpt2"}, {"dtype": "int4"},
    {"versions": 5}, {"stop": [""]}, {"stop": ["a"] * 5}, {"stop": "abc"}, {"stop": ["a" * 101]}, {"prompt": 5},
    {"prompt": "a" * (MAX_BYTES + 1)}])
def test_values_are_checked_on_the_server_too(client, values):
    with pytest.raises(Exception, match=r"number from|Choose a model|precision is one|stop string|text of at most"):
        client.predict(**{"prompt": "ROMEO:", "length": 5, **values}, api_name="/generate")


@pytest.mark.parametrize(("name", "values"), [
    ("/chat", {"message": ""}), ("/chat", {"message": "a", "history": [{"role": "system", "content": "a"}]}),
    ("/chat", {"message": "a", "you": "a\nb"}), ("/chat", {"message": "a", "history": [{"role": "user", "content": 5}]}),
    ("/compare", {"prompt": "a", "model": "bundled:shakespeare", "other_model": "../../etc/passwd"}),
    ("/timeline", {"prompt": "a", "run": "/etc"}), ("/timeline", {"prompt": "a", "run": "bundled:shakespeare"})])
def test_so_are_those_of_the_other_actions(client, name, values):
    with pytest.raises(Exception, match=r"conversation is made|speakers have names|of the list"):
        client.predict(**values, api_name=name)


# ----------------------------------------------------------------------------------------------------------------
# Many at once

def test_32_write_at_once_each_its_own_text_and_the_33rd_is_told_its_place(client, bundled):
    jobs = [client.submit("ROMEO:\n", length=400, seed=seed, api_name="/generate") for seed in range(33)]
    texts = [job.result(timeout=120)["text"] for job in jobs]
    for seed in 0, 13, 31, 32:
        assert texts[seed] == "ROMEO:\n" + bundled.generate("ROMEO:\n", max_new_tokens=400, **USUAL, seed=seed)[0]
    assert len(set(texts)) == 33
    said = [output["figures"] for job in jobs for output in job.outputs()]
    assert "Number 1 in the queue: 32 texts are being written." in said


def test_who_leaves_leaves_nothing_behind():
    async def leave_all(models):
        for n in range(60):
            stream = write(models, f"{n}" * 40, length=200)
            async for said in stream:
                if said["text"] and n % 3:
                    break
            await stream.aclose()
    models = Models("bundled:shakespeare")
    scheduler = models.engine("bundled:shakespeare").scheduler
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # playwright has a loop of its own in this one
        thread.submit(asyncio.run, leave_all(models)).result()
    time.sleep(0.5)
    assert not scheduler.running and not scheduler.waiting
    assert sum(cache.kv.nbytes for _, cache in scheduler.prefixes.entries) <= 2**26


@pytest.mark.parametrize("wrong", [{"model": "bundled:nosuch"}, {"model": __file__}, {"device": "cuda:9"}])
def test_a_page_without_a_model_does_not_open(wrong):
    with pytest.raises(UserError, match=r"no bundled model|is no model|no device"):
        app.main(app.AppConfig(**wrong, port=free_port()), prevent_thread_lock=True, quiet=True)


def test_a_port_in_use_or_impossible_gets_one_sentence(url):
    for port in int(url.rsplit(":", 1)[1].strip("/")), 0, 99_999, -1:
        with pytest.raises(UserError, match=f"Nothing can listen on 127.0.0.1:{port}"):
            app.main(app.AppConfig(model="bundled:shakespeare", port=port))
