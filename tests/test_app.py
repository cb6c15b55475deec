"""The page in a browser, and its API: Write, Compare."""
import asyncio
import concurrent.futures
import itertools
import json
import re
import threading
import time
import urllib.parse
from pathlib import Path

import gradio as gr
import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import free_port, go_to, running_page, tiny_gpt, wait_until
from gradio_client import Client
from playwright.sync_api import expect

import app
import checkpoint
from common.errors import UserError
from engine.scheduler import Scheduler
from generate import Engine
from tokenizer import CharTokenizer
from ui import stream
from ui.models import BEGINNINGS, Models
from ui.settings import MAX_BYTES
from ui.write import read_link, write

MARKUP = "<img src=x onerror=alert(1)>"
BEGINNING = BEGINNINGS["bundled:shakespeare"][0]
DEFAULTS = {"temperature": 0.7, "top_p": 0.9}  # of the page


@pytest.fixture(scope="module")
def steps():
    """Counts the steps of all engines, in `steps[0]`."""
    count, original = [0], Scheduler.step

    def counting_step(self):
        count[0] += 1
        return original(self)

    Scheduler.step = counting_step
    yield count
    Scheduler.step = original


@pytest.fixture(scope="module")
def url(steps, bundled_folder, tmp_path_factory):
    """A page with the bundled models, and with a run of two checkpoints that write a, b and c."""
    log = tmp_path_factory.mktemp("page") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", log)
        patch.setattr(checkpoint, "BUNDLED", bundled_folder)
        (log / "abc").mkdir(parents=True)
        for step in 5, 7:
            model = tiny_gpt(vocab_size=3, seed=step)
            checkpoint.save(log / "abc", step, model, {}, CharTokenizer("abc"), {}, step / 4)
        with running_page() as address:
            yield address


@pytest.fixture(scope="module")
def bundled():
    return Engine(*checkpoint.load_model("bundled:shakespeare")[:2])


@pytest.fixture
def open_page(new_window, url):
    """Opens the page in a new browser window. `page.addresses` lists every address it requests."""
    def open_it(address="", **size):
        addresses, dialogs = [], []
        page = new_window(
            address or url, **size, request=lambda request: addresses.append(request.url),
            dialog=lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.addresses, page.dialogs = addresses, dialogs
        expect(page.locator("#generate")).to_be_visible()
        expect(page.locator("#text .mirror")).to_be_attached()  # the notebook is ready
        return page

    return open_it


def text_of(page) -> str:
    return page.input_value("#text textarea")


def set_number(page, name, value):
    """Fills in a number, again if a fold that has just opened takes it back."""
    def is_set() -> bool:
        boxes = page.locator(f"#{name} input").all()  # the number, and most often a slider
        if {box.input_value() for box in boxes} == {str(value)}:
            return True
        page.fill(f"#{name} input[type=number]", str(value))
        page.keyboard.press("Tab")
        return False

    wait_until(is_set, seconds=20)


def choose(page, name, option):
    page.click(f"#{name} input")
    page.locator(f"#{name}").get_by_role("option", name=option, exact=True).or_(
        page.get_by_role("option", name=option, exact=True)).last.click()
    expect(page.locator(f"#{name} input")).to_have_value(option)


def finish(page, characters: int) -> str:
    """Waits until the text is finished and has this many characters, and returns it."""
    page.wait_for_function(
        f"document.querySelector('#text textarea').value.length == {characters}", timeout=60_000)
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#status textarea")).to_have_value(re.compile(r"^[\d,]+ tokens"))
    return text_of(page)


def find_run(url: str) -> str:
    names = Client(url, verbose=False).predict(api_name="/models")
    return next(name for name in names if name.endswith("abc"))


# --------------------------------------------------------------------------------------------------
# Write

def test_a_person_types_generates_and_watches_the_text_stream(open_page, slow_model):
    page = open_page()
    page.fill("#text textarea", "JULIET:\nO ")
    set_number(page, "length", 1000)
    expect(page.locator("#stop")).to_be_hidden()
    page.click("#generate")
    expect(page.locator("#stop")).to_be_in_viewport()
    expect(page.locator("#generate")).to_be_hidden()
    lengths, deadline = set(), time.monotonic() + 60
    while len(lengths) < 4 and time.monotonic() < deadline:
        lengths.add(len(text_of(page)))
    assert len(lengths) == 4, "the text grows piece by piece"
    slow_model.set()
    text = finish(page, len("JULIET:\nO ") + 1000)
    assert text.startswith("JULIET:\nO ")
    figures = (r"1,000 tokens · first after [\d,]+ ms · [\d,]+ tokens/s"
               r" · context 236 of 256 · seed \d+")
    assert re.fullmatch(figures, page.input_value("#status textarea"))
    expect(page.locator("#stop")).to_be_hidden()
    below = "({scrollHeight, scrollTop, clientHeight}) => scrollHeight - scrollTop - clientHeight"
    assert page.locator("#text textarea").evaluate(below) < 40, "the box shows the newest line"


def test_stop_stops_the_computation_and_so_does_leaving(open_page, steps, slow_model):
    page = open_page()
    set_number(page, "length", 2000)
    page.click("#generate")
    page.wait_for_function(
        "document.querySelector('#text textarea').value.length > 50", timeout=60_000)
    page.keyboard.press("Escape")
    time.sleep(1)
    steps_at_stop, text = steps[0], text_of(page)
    time.sleep(0.5)
    assert steps[0] == steps_at_stop and text_of(page) == text and len(text) < 2000
    page.click("#generate")
    page.wait_for_function(
        f"document.querySelector('#text textarea').value.length > {len(text) + 20}", timeout=60_000)
    assert steps[0] > steps_at_stop
    page.close()
    time.sleep(1)
    steps_at_close = steps[0]
    time.sleep(0.5)
    assert steps[0] == steps_at_close < 1900 + steps_at_stop


def test_a_seed_and_a_link_write_the_same_text_again(open_page):
    page = open_page()
    page.click("#more button")
    page.uncheck("#new-seed input")
    page.fill("#stops textarea", "\\n\\n\\n\\n\nzzz")
    for name, value in {"length": 60, "temperature": 0.9, "top-k": 20, "seed": 7}.items():
        set_number(page, name, value)
    texts, prompt = [], "Никто & \"nobody\" # 100%\n"
    for button in "#generate", "#generate", "#again":
        if button == "#generate":
            page.fill("#text textarea", prompt)
        page.click(button)
        expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
        texts.append(finish(page, len(prompt) + 60))
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(prompt) for text in texts)

    page.click("#save button")
    expect(page.locator("#link textarea")).to_have_value(re.compile("seed"))
    link = page.input_value("#link textarea")
    assert link.partition("#")[0] == page.url
    other = open_page(link)
    other.wait_for_function(
        "text => document.querySelector('#text textarea').value == text", arg=texts[2],
        timeout=30_000)
    expect(other.locator("#stops textarea")).to_be_visible()  # the fold with its settings is open
    assert other.input_value("#top-k input[type=number]") == "20"
    sent = [urllib.parse.unquote(address.partition("#")[0]) for address in other.addresses]
    assert not any("nobody" in address for address in sent), "no address contains the prompt"


def test_a_link_gives_only_what_the_page_offers(open_page):
    markup = "<a href='javascript:alert(1)'><img src=x onerror=alert(1)></a>"
    settings = {"prompt": f"ROMEO:\n{markup}", "model": markup, "dtype": markup, "length": 5,
                "temperature": 1e9, "top_k": markup, "seed": 1.5, "versions": None,
                "stop": [markup]}
    page = open_page()
    page = open_page(page.url + "#" + urllib.parse.quote(json.dumps(settings)))
    finish(page, len(settings["prompt"]) + 5)
    expect(page.get_by_text("does not have the model that the link names")).to_be_visible()
    assert page.input_value("#model input") == "bundled:shakespeare"
    assert page.input_value("#temperature input[type=number]") == "0.7"
    assert page.locator("img[src=x]").count() == 0 and not page.dialogs


def test_a_link_of_a_hundred_thousand_brackets_is_not_one_of_ours():
    assert read_link(None, "[" * 10**5) == gr.skip()


def test_an_error_shows_what_it_quotes_as_text():
    def fail():
        raise UserError(f"The name {MARKUP} is not valid.")

    with app.Page() as page:
        page.load(fail)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # playwright's loop runs in this one
        answer = thread.submit(asyncio.run, page.process_api(0, []))
        with pytest.raises(gr.Error) as caught:
            answer.result()
    assert caught.value.message == "The name &lt;img src=x onerror=alert(1)&gt; is not valid."


@pytest.mark.parametrize("name, data", [
    ("chat", ["secret"]),  # too few values
    ("inspect", ["a", "secret"]),  # not one of the choices
])
def test_a_failed_event_leaves_nothing_that_a_visitor_sent_in_the_log(url, capfd, name, data):
    call = f"{url}gradio_api/call/{name}"
    event = httpx.post(call, json={"data": data}, timeout=20).json()["event_id"]
    assert '"title": "Error"' in httpx.get(f"{call}/{event}", timeout=20).text
    assert "secret" not in "".join(capfd.readouterr())


def test_a_new_seed_is_drawn_and_the_text_can_be_saved(open_page, bundled):
    page = open_page()
    set_number(page, "length", 30)
    page.click("#generate")
    text = finish(page, len(BEGINNING) + 30)
    page.click("#more button")
    seed = int(page.input_value("#seed input"))
    expected = bundled.generate(BEGINNING, max_new_tokens=30, **DEFAULTS, seed=seed)[0]
    assert seed != 42 and text == BEGINNING + expected
    page.click("#save button")
    files = {}
    for kind in "txt", "json":
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download {kind}").click()
        files[kind] = download.value.path().read_text(encoding="utf-8")
    record = json.loads(files["json"])
    assert files["txt"] == record["text"] == text
    assert record["seed"] == seed and record["prompt"] == BEGINNING
    assert record["dtype"] == "float32"


def test_a_beginning_is_one_click_and_try_again_replaces_what_was_written_last(open_page):
    page = open_page()
    set_number(page, "length", 30)
    page.locator("#beginnings button").nth(2).click()
    prompt = BEGINNINGS["bundled:shakespeare"][2]
    first = finish(page, len(prompt) + 30)
    set_number(page, "length", 20)
    page.click("#generate")
    second = finish(page, len(first) + 20)
    assert second.startswith(first) and first.startswith(prompt)
    page.click("#again")
    page.wait_for_function(
        "text => document.querySelector('#text textarea').value != text", arg=second)
    assert finish(page, len(second)).startswith(first)
    page.locator("#text textarea").press_sequentially("!")
    page.click("#generate")
    assert finish(page, len(second) + 21)[len(second)] == "!"


def test_text_branches_and_undo_stay_in_the_browser(open_page):
    page = open_page()
    set_number(page, "length", 20)
    page.click("#generate")
    first = finish(page, len(BEGINNING) + 20)
    page.click("#again")
    page.wait_for_function("first => document.querySelector('#text textarea').value != first",
                           arg=first)
    second = finish(page, len(first))
    box = page.locator("#text textarea")
    box.press("Control+z")
    assert text_of(page) == first
    box.press("Control+Shift+z")
    assert text_of(page) == second
    page.click("#undo")
    page.click("#undo")
    assert text_of(page) == BEGINNING
    page.reload()
    expect(page.locator("#text textarea")).to_have_value(BEGINNING, timeout=30_000)
    page.click(".branches summary")
    assert page.locator(".branches .card").count() == 2
    page.get_by_label("Name of branch 1").fill("mine")
    page.get_by_label("Open branch 1").click()
    assert text_of(page) == first
    made = page.locator("#text .mirror .made").all_inner_texts()
    assert "".join(made) == first.removeprefix(BEGINNING)
    page.get_by_label("Compare branch 2").click()
    marks = page.locator(".comparison mark").all_inner_texts()
    assert second.endswith(marks[0]) and first.endswith(marks[1]) and marks[0][0] != marks[1][0]


def test_what_is_typed_during_the_writing_is_kept(open_page, slow_model):
    page = open_page()
    set_number(page, "length", 400)
    page.click("#generate")
    page.wait_for_function("document.querySelector('#text textarea').value.length > 30")
    for key, text in ("Home", "Act I. "), ("End", " The end."):
        page.locator("#text textarea").press(f"Control+{key}")
        page.keyboard.insert_text(text)
        assert page.is_visible("#stop"), "it still writes"
    slow_model.set()
    text = finish(page, len(f"Act I. {BEGINNING} The end.") + 400)
    assert text.startswith(f"Act I. {BEGINNING}") and text.endswith(" The end.")
    own = page.locator("#text .mirror span:not(.made)").all_inner_texts()
    assert "".join(own) == f"Act I. {BEGINNING} The end."


def test_a_click_on_a_word_shows_what_else_it_could_have_been(open_page, bundled):
    page = open_page()
    text = "ROMEO:\nO Juliet"
    page.fill("#text textarea", text)
    set_number(page, "length", 10)
    page.check("#colours input")
    expect(page.locator("#text .mirror .p0").first).to_be_attached(timeout=10_000)
    expect(page.locator(".gauge")).to_have_text("15 tokens of 256 used, 241 left")
    at = text.index("J")
    page.locator("#text textarea").evaluate(f"box => box.setSelectionRange({at}, {at})")
    page.locator("#text textarea").press("Alt+ArrowDown")
    expected = [bundled.tokenizer.decode([i]) for i, _ in bundled.inspect(text)[at]["top"]][:8]
    choices = page.locator(".others button span").all_inner_texts()
    assert [choice for choice in choices if choice.isalpha()] == [
        other for other in expected if other.isalpha()]
    page.keyboard.press("Enter")  # the likeliest one
    result = finish(page, at + 1 + 10)
    assert result.startswith(text[:at] + expected[0])


def test_versions_stream_side_by_side_and_the_likeliest_comes_first(open_page):
    page = open_page()
    page.click("#more button")
    set_number(page, "versions", 3)
    set_number(page, "length", 40)
    page.click("#generate")
    text = finish(page, len(BEGINNING) + 40)
    notes = page.locator(".branches .card small").all_inner_texts()
    assert len(notes) == 3
    percents = [int(re.search(r"probability of (\d+)%", note)[1]) for note in notes]
    assert percents == sorted(percents, reverse=True)
    page.locator(".branches .card").nth(2).get_by_text("Open").click()
    other = text_of(page)
    assert other != text and other.startswith(BEGINNING) and len(other) == len(text)


def test_look_inside_gets_the_text_and_the_model_that_wrote_it(open_page, url):
    page = open_page()
    choose(page, "model", find_run(url))
    page.fill("#text textarea", "abcab")
    page.click("#look")
    expect(page.locator("#look-text textarea")).to_have_value("abcab")
    expect(page.locator("#look-model input")).to_have_value(find_run(url))


def test_the_selector_changes_the_model(open_page, url):
    page = open_page()
    choose(page, "model", find_run(url))
    expect(page.get_by_text(re.compile("step 5, .*context of 16 tokens"))).to_be_visible()
    page.fill("#text textarea", "cab")
    set_number(page, "length", 40)
    page.click("#generate")
    text = finish(page, 43)
    assert text.startswith("cab") and set(text) <= set("abc")


# --------------------------------------------------------------------------------------------------
# Compare

def test_two_checkpoints_write_side_by_side_and_all_of_a_run_in_a_table(open_page, url):
    page = open_page()
    go_to(page, "Compare")
    run = find_run(url)
    choose(page, "compare-model-0", f"{run}/model_00005.pt")
    choose(page, "compare-model-1", f"{run}/model_00007.pt")
    choose(page, "compare-dtype-1", "float32")
    page.fill("#compare-prompt textarea", f"abc{MARKUP}")
    page.click("#compare-settings button")
    set_number(page, "compare-length", 50)
    page.click("#compare")
    expect(page.locator("#compare-status textarea")).to_have_value(
        re.compile(r"B: 50 tokens.* seed 42"), timeout=30_000)
    texts = [page.locator(f"#side-{i} .side").text_content() for i in range(2)]
    expected = []
    for step in 5, 7:
        engine = Engine(*checkpoint.load_model(f"{run}/model_0000{step}.pt")[:2])
        expected += engine.generate(f"abc{MARKUP}", max_new_tokens=50, **DEFAULTS, seed=42)
    assert texts == [f"abc{MARKUP}" + text for text in expected]
    agree = next(i for i, (a, b) in enumerate(zip(*expected)) if a != b)
    assert page.input_value("#compare-status textarea").startswith(
        f"Identical for the first {agree} characters, then they part.")
    for i in range(2):
        assert page.locator(f"#side-{i} mark").text_content() == expected[i][agree:]
    expect(page.locator("#compare-stop")).to_be_hidden()
    assert page.locator("#side-1 h4").text_content() == f"B · {run}/model_00007.pt · float32"

    choose(page, "timeline-run", run)
    page.click("#timeline")
    cells = page.locator("#timeline-table [role=gridcell]")
    expect(cells.filter(has_text=expected[1])).to_be_visible(timeout=30_000)
    assert [cells.nth(i).inner_text().strip() for i in range(6)] == [
        "5", "1.250", expected[0], "7", "1.750", expected[1]]


# --------------------------------------------------------------------------------------------------
# The whole page

def test_look_inside_reads_the_end_of_a_text_with_the_model_that_wrote_it(open_page):
    page = open_page()
    choose(page, "model", "bundled:chat")
    page.fill("#text textarea", "a" * 4_000 + "The end")
    page.click("#look")
    expect(page.locator("#look-model input")).to_have_value("bundled:chat")
    expect(page.locator("#look-text textarea")).to_have_value(re.compile("^a{3993}The end$"))
    tokenizer = checkpoint.load_model("bundled:chat")[1]
    last = tokenizer.decode(tokenizer.encode("The end")[-1:])
    expect(page.locator("#look-tokens .token").last).to_have_text(last)


def test_unknown_characters_are_reported_and_markup_stays_text(open_page):
    page = open_page()
    page.fill("#text textarea", f"{MARKUP} Я")
    page.click("#more button")
    set_number(page, "versions", 2)
    set_number(page, "length", 5)
    page.click("#generate")
    assert finish(page, 35).startswith(f"{MARKUP} Я")
    figures = page.input_value("#status textarea")
    assert "alphabet lacks" in figures and "Я" in figures

    assert page.locator("img[src=x]").count() == 0 and not page.dialogs
    assert not any(address.endswith("/x") for address in page.addresses)


def test_the_page_loads_nothing_from_other_servers(open_page, url):
    page = open_page()
    page.click("#generate")
    page.wait_for_timeout(1000)
    assert page.addresses
    assert all(address.startswith((url, "data:", "blob:")) for address in page.addresses)


def test_every_tab_is_accessible_in_light_and_dark_colours(open_page):
    """axe-core finds nothing serious on any tab, in light and in dark colours."""
    page = open_page()
    problems = []
    for tab in app.TABS:
        go_to(page, tab)
        for scheme in "light", "dark":
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(1000)
            for found in Axe().run(page).response["violations"]:
                if found["impact"] in ("serious", "critical"):
                    targets = [node["target"] for node in found["nodes"]]
                    problems.append((tab, scheme, found["id"], found["help"], targets))
    assert not problems


def test_the_page_fits_a_phone_and_warns(open_page):
    page = open_page(width=390, height=844)
    expect(page.get_by_text("false or offensive")).to_be_visible()
    for tab in app.TABS:
        go_to(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab


def test_a_bad_request_reaches_the_person_as_a_sentence(open_page):
    page = open_page()
    page.evaluate("document.querySelector('#text textarea').removeAttribute('maxlength')")
    page.fill("#text textarea", "a" * (MAX_BYTES + 1))
    page.click("#generate")
    expect(page.get_by_text("at most 40,000 bytes")).to_be_visible(timeout=10_000)


def test_the_page_opens_before_its_model_is_loaded(monkeypatch):
    load_model, loads, may_load = checkpoint.load_model, [], threading.Event()

    def load_when_told(*arguments):
        loads.append(arguments)
        may_load.wait(60)
        return load_model(*arguments)

    monkeypatch.setattr(checkpoint, "load_model", load_when_told)
    with running_page() as address:
        assert httpx.get(address).status_code == 200
        job = Client(address, verbose=False).submit("ROMEO:", length=5, api_name="/generate")
        wait_until(job.outputs)
        assert "Loading" in job.outputs()[0]["figures"]
        may_load.set()
        assert len(job.result(timeout=60)["text"]) == len("ROMEO:") + 5 and len(loads) == 1


# --------------------------------------------------------------------------------------------------
# The API

def test_every_action_has_its_name_and_the_rest_is_private(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) >= {"/generate", "/chat", "/compare", "/timeline", "/models"}
    private = r"lambda|_\d+$|load|change|update|describe|say|show|undo|rows|side"
    assert not [name for name in named if re.search(private, name)]
    values = [value["label"] for endpoint in named.values()
              for value in (*endpoint["parameters"], *endpoint["returns"])]
    assert not [label for label in values if re.search(r"^\d|\d$", label)], "named for people"


def test_the_examples_of_the_documentation_run(url):
    docs = (Path(app.__file__).parent / "docs" / "api.md").read_text()
    code = re.search(r"```python\n(.*?)```", docs, re.DOTALL)[1]
    exec(code.replace("http://127.0.0.1:7860", url), {})


def test_the_endpoint_streams_what_the_engine_writes(client, bundled):
    job = client.submit(
        "ROMEO:\n", temperature=0.9, top_k=20, length=200, seed=5, api_name="/generate")
    result = job.result(timeout=60)
    expected = bundled.generate(
        "ROMEO:\n", temperature=0.9, top_k=20, top_p=0.9, max_new_tokens=200, seed=5)[0]
    assert result["text"] == "ROMEO:\n" + expected
    assert result["figures"].endswith("seed 5") and result["versions"][0]["reason"] == "length"
    pieces = [output["text"] for output in job.outputs()]
    assert len(pieces) > 2 and all(result["text"].startswith(piece) for piece in pieces)
    again = client.predict(**result["settings"], api_name="/generate")
    assert again["text"] == result["text"]


def test_versions_have_the_log_probabilities_that_the_engine_scores(client, bundled):
    result = client.predict("ROMEO:\n", length=50, seed=5, versions=3, api_name="/generate")
    scores = []
    for version in result["versions"]:
        scores.append(sum(bundled.score("ROMEO:\n" + version["text"])[7:]) / 50)
    means = [version["mean_logprob"] for version in result["versions"]]
    assert means == pytest.approx(scores, abs=1e-3)
    assert scores == sorted(scores, reverse=True)


def test_stop_strings_end_a_text_and_an_empty_prompt_is_allowed(client, bundled):
    result = client.predict(
        "ROMEO:\n", length=200, seed=5, stop=["e", "zz"], api_name="/generate")["versions"][0]
    whole = bundled.generate("ROMEO:\n", max_new_tokens=200, **DEFAULTS, seed=5)[0]
    assert result["text"] == whole.partition("e")[0] and result["reason"] == "stop"
    assert len(client.predict(length=5, api_name="/generate")["text"]) == 5


@pytest.mark.parametrize("values", [
    {"temperature": 0.0}, {"temperature": 2.1}, {"temperature": "1"},
    {"length": 0}, {"length": 1e9}, {"length": 1.5},
    {"top_k": -1}, {"top_p": 0}, {"seed": -5}, {"seed": True},
    {"model": "/etc/passwd"}, {"model": "gpt2"}, {"dtype": "int4"},
    {"versions": 5}, {"stop": [""]}, {"stop": ["a"] * 5}, {"stop": "abc"}, {"stop": ["a" * 101]},
    {"prompt": 5}, {"prompt": "a" * (MAX_BYTES + 1)}])
def test_values_are_checked_on_the_server_too(client, values):
    sentences = r"number from|Choose a model|precision must be|stop string|text of at most"
    with pytest.raises(Exception, match=sentences):
        client.predict(**{"prompt": "ROMEO:", "length": 5, **values}, api_name="/generate")


@pytest.mark.parametrize(("name", "values"), [
    ("/compare", {"prompt": "a", "model": "bundled:shakespeare",
                  "other_model": "../../etc/passwd"}),
    ("/timeline", {"prompt": "a", "run": "/etc"}),
    ("/timeline", {"prompt": "a", "run": "bundled:shakespeare"})])
def test_values_of_other_actions_are_checked_on_the_server_too(client, name, values):
    sentences = r"message must have|name must be one line|from the list"
    with pytest.raises(Exception, match=sentences):
        client.predict(**values, api_name=name)


# --------------------------------------------------------------------------------------------------
# Many visitors at once

def test_32_visitors_get_the_texts_of_one_and_the_33rd_sees_its_position(
        client, bundled, slow_model, monkeypatch):
    addresses = map(str, itertools.count())
    monkeypatch.setattr(stream, "visitor", lambda: next(addresses))
    jobs = [client.submit("ROMEO:\n", length=200, seed=seed, api_name="/generate")
            for seed in range(33)]
    position = "Number 1 in the queue: 32 texts are being written."
    wait_until(lambda: any(output["figures"] == position
                           for job in jobs for output in job.outputs()))
    slow_model.set()
    texts = [job.result(timeout=120)["text"] for job in jobs]
    for seed in 0, 13, 31, 32:
        expected = bundled.generate("ROMEO:\n", max_new_tokens=200, **DEFAULTS, seed=seed)[0]
        assert texts[seed] == "ROMEO:\n" + expected
    assert len(set(texts)) == 33


def test_a_visitor_with_many_texts_leaves_places_for_others(client, url, slow_model):
    jobs = [client.submit("ROMEO:\n", length=200, api_name="/generate") for _ in range(33)]
    wait_until(lambda: any("in the queue" in output["figures"]
                           for job in jobs for output in job.outputs()))
    other = Client(url, verbose=False, headers={"X-Forwarded-For": "203.0.113.9"})
    result = other.predict("ROMEO:\n", length=3, api_name="/generate")
    assert result["figures"].startswith("3 tokens")
    assert not any(job.done() for job in jobs), "the first visitor still had all its texts"
    for job in jobs:
        job.cancel()


def test_a_visitor_who_leaves_leaves_nothing_behind():
    async def leave_all(models):
        for n in range(60):
            stream = write(models, f"{n}" * 40, length=200)
            async for result in stream:
                if result["text"] and n % 3:
                    break
            await stream.aclose()

    models = Models("bundled:shakespeare")
    scheduler = models.engine("bundled:shakespeare").scheduler
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # playwright's loop runs in this one
        thread.submit(asyncio.run, leave_all(models)).result()
    wait_until(lambda: scheduler.load() == (0, 0))
    assert sum(cache.kv.nbytes for _, cache in scheduler.prefixes.entries) <= 2**26


@pytest.mark.parametrize("wrong", [
    {"model": "bundled:nosuch"}, {"model": __file__}, {"device": "cuda:9"}])
def test_a_page_without_a_model_does_not_open(wrong):
    with pytest.raises(UserError, match=r"no bundled model|is not a model|no device"):
        app.main(app.AppConfig(**wrong, port=free_port()), prevent_thread_lock=True, quiet=True)


def test_a_port_in_use_or_impossible_gets_one_sentence(url):
    for port in int(url.rsplit(":", 1)[1].strip("/")), 0, 99_999, -1:
        with pytest.raises(UserError, match=f"Cannot listen on 127.0.0.1:{port}"):
            app.main(app.AppConfig(model="bundled:shakespeare", port=port))
