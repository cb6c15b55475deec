"""The Chat tab in a browser, and its API."""
import asyncio
import concurrent.futures
import json
import re

import pytest
from conftest import go_to, running_page
from playwright.sync_api import expect

import checkpoint
from api.conversation import chat_ids
from common.errors import UserError
from generate import Engine
from ui import chat
from ui.models import Models

MARKUP = "<img src=x onerror=alert(1)> & *you*"
DEFAULTS = {"temperature": 0.7, "top_p": 0.9}  # of the page
BLOCK_SIZE = 128  # of the chat model in bundled_folder
HISTORY = [
    {"role": "user", "content": "Good morrow."},
    {"role": "assistant", "content": "And to thee."},
]


@pytest.fixture(scope="module")
def url(bundled_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG", tmp_path_factory.mktemp("page") / "log")
        patch.setattr(checkpoint, "BUNDLED", bundled_folder)
        with running_page() as address:
            yield address


@pytest.fixture(scope="module")
def chat_engine(bundled_folder):
    return Engine(*checkpoint.load_model(bundled_folder / "chat")[:2])


@pytest.fixture
def page(new_window, url):
    """The Chat tab in a new browser window, with short replies."""
    page = new_window(url, dialog=lambda dialog: dialog.accept("My chat"))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_chat(page)
    page.click("#chat-more button")
    page.fill("#chat-length input[type=number]", "12")
    page.keyboard.press("Tab")
    return page


def open_chat(page):
    go_to(page, "Chat")
    expect(page.locator("#chat-note")).to_contain_text("small talk")


def say(page, text: str):
    page.fill("#say textarea", text)
    page.keyboard.press("Enter")


def turns(page, count: int) -> list[str]:
    """Waits until a reply has ended and there are this many turns, and returns their texts."""
    expect(page.locator("#turns .text")).to_have_count(count)
    expect(page.locator("#turns")).to_have_attribute("aria-busy", "false")
    return page.locator("#turns .text").all_inner_texts()


# --------------------------------------------------------------------------------------------------
# In a browser

def test_a_conversation_is_retried_continued_and_edited(page):
    expect(page.locator("#chat-stop")).to_be_hidden()
    say(page, "Good morrow!")
    said, reply = turns(page, 2)
    assert said == "Good morrow!" and reply
    expect(page.locator("#chat-status")).to_have_text(
        re.compile(rf"\d+ of {BLOCK_SIZE} tokens of the model's context used"))

    page.get_by_role("button", name="Write another reply").click()
    page.wait_for_function(
        "reply => document.querySelectorAll('#turns .text')[1].innerText != reply", arg=reply)
    another = turns(page, 2)[1]
    page.get_by_role("button", name="Continue this reply").click()
    page.wait_for_function(
        "n => document.querySelectorAll('#turns .text')[1].innerText.length > n", arg=len(another))
    assert turns(page, 2)[1].startswith(another)

    say(page, "And thou?")
    turns(page, 4)
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_role("textbox", name="Edit your message").fill("What news?")
    page.keyboard.press("Enter")
    assert turns(page, 2)[0] == "What news?"


def test_markup_is_shown_edited_and_copied_as_it_was_written(page):
    say(page, MARKUP)
    assert turns(page, 2)[0] == MARKUP
    page.get_by_role("button", name="Copy").first.click()
    page.wait_for_function(
        "async text => await navigator.clipboard.readText() == text", arg=MARKUP)
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_role("textbox", name="Edit your message")).to_have_value(MARKUP)
    assert page.locator("img[src=x]").count() == 0


def test_conversations_are_listed_renamed_exported_and_deleted_and_survive_a_reload(page):
    say(page, "first")
    first = turns(page, 2)
    page.get_by_role("button", name="New chat").click()
    turns(page, 0)
    say(page, "second")
    turns(page, 2)
    page.get_by_role("button", name="Rename").click()  # the dialog is answered "My chat"
    listed = page.locator("#chats li")
    expect(listed).to_have_text(["My chat", "first"])

    page.reload()
    open_chat(page)
    expect(listed).to_have_text(["My chat", "first"])
    listed.nth(1).get_by_role("button").click()
    expect(page.locator("#turns")).to_contain_text("first")
    assert turns(page, 2) == first
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    saved = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert [turn["content"] for turn in saved["messages"]] == first
    page.get_by_role("button", name="Delete").click()
    expect(listed).to_have_text(["My chat"])


def test_an_error_leaves_the_conversation_and_an_empty_message_does_nothing(page):
    page.press("#say textarea", "Enter")
    say(page, "Good morrow!")
    before = turns(page, 2)
    say(page, "I did but jest, and thou art angry. " * 20)
    expect(page.locator("#turns .error")).to_have_text(re.compile("Write a shorter message"))
    assert turns(page, 3)[:2] == before


def test_text_typed_during_a_reply_stays_in_its_box(page, slow_model):
    page.fill("#chat-length input[type=number]", "60")
    page.keyboard.press("Tab")
    say(page, "Good morrow!")
    expect(page.locator("#turns .text").first).to_have_text("Good morrow!")
    page.keyboard.type("And thou?")
    page.keyboard.press("Enter")  # too early: the reply has not ended
    slow_model.set()
    turns(page, 2)
    expect(page.locator("#say textarea")).to_have_value("And thou?")


def test_a_base_model_says_what_it_is_and_limits_the_length_to_half_of_its_context(page):
    page.click("#chat-model input")
    page.get_by_role("option", name="bundled:shakespeare", exact=True).click()
    expect(page.locator("#chat-note")).to_contain_text("base model")
    expect(page.locator("#chat-you")).to_be_visible()
    expect(page.locator("#chat-length input[type=range]")).to_have_attribute("max", "128")
    say(page, "Good morrow!")
    assert turns(page, 2)[0] == "Good morrow!"


# --------------------------------------------------------------------------------------------------
# The API

def test_a_base_model_continues_a_transcript(client):
    result = client.predict(
        "What news?", HISTORY, model="bundled:shakespeare", you="A", it="B", top_p=1.0, length=30,
        seed=3, api_name="/chat")
    transcript = "A:\nGood morrow.\n\nB:\nAnd to thee.\n\nA:\nWhat news?\n\nB:\n"
    text = Engine(*checkpoint.load_model("bundled:shakespeare")[:2]).generate(
        transcript, max_new_tokens=30, temperature=DEFAULTS["temperature"], seed=3,
        stop=("\nA:", "\nB:"))[0]
    assert result["text"] == text.strip()


def test_a_model_with_a_chat_template_gets_the_conversation_in_that_form(client, chat_engine):
    options = {"top_p": 1.0, "length": 30, "seed": 3, "api_name": "/chat"}
    ids = chat_ids(chat_engine.tokenizer, [*HISTORY, {"role": "user", "content": "What news?"}])
    text = chat_engine.generate(ids, max_new_tokens=30, temperature=DEFAULTS["temperature"],
                                repetition_penalty=chat.REPETITION_PENALTY, seed=3)[0]
    # it is the default model; the speakers' names make no difference
    for names in {}, {"you": "A", "it": "B"}, {"you": "", "it": ""}:
        result = client.predict("What news?", HISTORY, **names, **options)
        assert result["text"] == text.strip() != "" and result["left_out"] == 0
        assert result["context"] == BLOCK_SIZE and result["used"] > len(ids)


def test_a_reply_continues_from_its_beginning(client, chat_engine):
    messages = [{"role": "user", "content": "What news?"}]
    ids = chat_ids(chat_engine.tokenizer, messages) + chat_engine.tokenizer.encode("the night")
    text = chat_engine.generate(ids, max_new_tokens=20, **DEFAULTS,
                                repetition_penalty=chat.REPETITION_PENALTY, seed=3)[0]
    result = client.predict("What news?", beginning="the night", length=20, seed=3,
                            api_name="/chat")
    assert result["text"] == ("the night" + text).strip()


def test_the_oldest_messages_leave_only_when_the_context_is_full(client, chat_engine):
    def tokens(messages):
        return len(chat_ids(chat_engine.tokenizer, messages))

    room = BLOCK_SIZE // 8
    left_out_before = 0
    for pairs in range(1, 12):
        messages = [*HISTORY * pairs, {"role": "user", "content": "What news?"}]
        result = client.predict("What news?", HISTORY * pairs, length=64, seed=3, api_name="/chat")
        left_out = result["left_out"]
        assert (left_out > 0) == (tokens(messages) + room > BLOCK_SIZE)
        assert tokens(messages[left_out:]) + room <= BLOCK_SIZE >= result["used"]
        assert left_out >= left_out_before and messages[left_out]["role"] == "user"
        left_out_before = left_out
    assert left_out_before
    with pytest.raises(Exception, match="Write a shorter message"):
        client.predict("What news? " * 60, api_name="/chat")


def collect(stream) -> list:
    """The results of a stream. (Playwright's loop runs in this thread.)"""
    async def results():
        return [result async for result in stream]

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, results()).result()


def test_an_empty_reply_is_generated_again_and_then_reported(monkeypatch):
    seeds = []

    async def say_nothing(writing):
        seeds.append(writing.sampling.seed)
        writing.figures = lambda: ""
        yield

    monkeypatch.setattr(chat, "follow", say_nothing)
    models = Models("bundled:shakespeare")
    replies = collect(chat.chat(models, "Hello", seed=5))
    assert seeds == [5, 6, 7] and replies[-1]["text"] == ""
    talk = {"turns": [{"role": "user", "content": "Hello"}], "ask": "reply"}
    settings = ["bundled:shakespeare", "A", "B", 0.7, 0, 0.9, 20]
    shown = collect(chat.answer(models, talk, *settings))[-1]
    assert shown["turns"] == talk["turns"] and shown["error"] == chat.NOTHING_SAID


@pytest.mark.parametrize("values", [
    {"message": ""},
    {"message": "a", "history": [{"role": "system", "content": "a"}]},
    {"message": "a", "history": [{"role": "user", "content": 5}]},
    {"message": "a", "beginning": 5},
    {"message": "a", "you": "a\nb", "model": "bundled:shakespeare"}])
def test_a_request_is_checked_on_the_server(client, values):
    with pytest.raises(Exception, match=r"message must have|name must be one line"):
        client.predict(**values, api_name="/chat")


def test_an_error_of_the_page_is_a_sentence_of_the_conversation():
    talk = {"turns": [{"role": "user", "content": "Hello"}], "ask": "reply"}
    settings = ["/etc/passwd", "A", "B", 0.7, 0, 0.9, 20]
    [shown] = collect(chat.answer(Models("bundled:shakespeare"), talk, *settings))
    assert shown["error"] == "Choose a model from the list." and shown["turns"] == talk["turns"]
    with pytest.raises(UserError, match="from the list"):
        collect(chat.chat(Models("bundled:shakespeare"), "Hello", model="/etc/passwd"))
