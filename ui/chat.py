"""The Chat tab: a conversation with a model.

A model with a chat template gets the conversation in the form it was trained on. A base model has
no template; it continues a transcript, in which each turn stands under the speaker's name.

The conversations stay in the browser: ui/static/chat.js draws, edits and keeps them. It hands the
open one to `answer`, which streams it back with the reply. (Gradio's Chatbot reads every message
as HTML or Markdown, so it cannot show or copy a text as it was written.)
"""
import asyncio
import dataclasses
from types import MethodType

import gradio as gr

from api.conversation import SPEAKERS, fit_prompt, turn_ends
from common.errors import UserError
from generate import Engine
from ui import settings
from ui.models import Models
from ui.stream import Writing, follow

LENGTH = 120  # tokens of a reply, by default
REPETITION_PENALTY = 1.05  # against repetition; a higher one also leaves the subject; 1 is off
ATTEMPTS = 3  # to get a reply that is not empty
MAX_NAME = 40  # characters
YOU, IT = SPEAKERS  # names in a transcript
NOTHING_SAID = "The model had nothing to say. Try again, or say something else."

# --------------------------------------------------------------------------------------------------
# The page

def build(models: Models):
    """Lays out the tab and connects its events."""
    with gr.Row():
        with gr.Column(scale=5):
            note = gr.Markdown("Loading the model …", elem_id="chat-note")
            gr.HTML(settings.HTML.conversation(), apply_default_css=False)
            message = gr.Textbox(label="Your message", placeholder="Hello! How was your day?",
                                 max_lines=6, max_length=settings.MAX_BYTES,
                                 submit_btn="Send", elem_id="say")
            stop_button = gr.Button("Stop", variant="stop", elem_id="chat-stop")
        with gr.Column(scale=3, min_width=300):
            model = settings.model_box(models, "chat-", value=models.chat_model())
            # the names in a transcript; hidden for a model with a chat template
            with gr.Column(visible=False) as speakers:
                with gr.Row():
                    box = {"max_length": MAX_NAME, "min_width": 120}
                    names = [gr.Textbox(YOU, label="You are", elem_id="chat-you", **box),
                             gr.Textbox(IT, label="The model is", elem_id="chat-it", **box)]
                gr.Examples([[YOU, IT], ["ROMEO", "JULIET"]], names, label="Try other names")
            with gr.Accordion("Settings", open=False, elem_id="chat-more"):
                sliders = [settings.slider(name, "chat-") for name in settings.SAMPLING]
                length = settings.slider("length", "chat-", value=LENGTH)
            gr.HTML(settings.HTML.conversations(), apply_default_css=False)
    # the open conversation while it is answered, and a button that chat.js clicks to hand it over
    talk = gr.JSON(visible="hidden")
    hand_over = gr.Button(visible="hidden", elem_id="chat-hand-over")

    # say what kind of model it is as soon as it is loaded
    opened = gr.context.Context.root_block.load
    gr.on([opened, model.change], MethodType(describe, models), [model, length],
          [note, speakers, length], trigger_mode="always_last", **settings.QUIET)
    opened(js="page.chat.start")
    message.submit(None, message, None, js="page.chat.send")
    asked = hand_over.click(None, None, talk, js="page.chat.handOver")
    reply = asked.then(MethodType(answer, models), [talk, model, *names, *sliders, length], talk,
                       concurrency_limit=None, **settings.QUIET)
    reply.then(None, talk, None, js="page.chat.end")  # also after an error
    stop_button.click(None, talk, None, js="page.chat.end", cancels=reply)
    talk.change(None, talk, None, js="page.chat.draw")


def describe(models: Models, name: str, length: int):
    """The note above the conversation, whether the speakers' names are shown, and the slider for
    the length, which ends at half of the model's context."""
    engine = models.engine(name)
    has_template = engine.tokenizer.chat_template is not None
    longest = engine.block_size // 2
    return (settings.TEXTS["chat model" if has_template else "base model"],
            gr.Column(visible=not has_template),
            gr.Slider(maximum=longest, value=min(length, longest)))


# --------------------------------------------------------------------------------------------------
# Checks

def validate_messages(messages: list[dict[str, str]], beginning: str):
    """Raises UserError for anything but texts of the user and the assistant."""
    valid = isinstance(beginning, str) and all(
        isinstance(message, dict) and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str) for message in messages)
    if not valid or not messages[-1]["content"].strip():
        raise UserError("Each message must have a role (user or assistant) and a text as content, "
                        "and the last one must not be empty.")


def validate_names(*names: str):
    for name in names:
        valid = isinstance(name, str) and 0 < len(name.strip()) <= MAX_NAME and "\n" not in name
        if not valid:
            raise UserError(f"A speaker's name must be one line of 1 to {MAX_NAME} characters.")


# --------------------------------------------------------------------------------------------------
# Replies

async def chat(models: Models, message: str, history: list[dict[str, str]] | None = None,
               model: str | None = None, you: str = YOU, it: str = IT,
               temperature: float = settings.TEMPERATURE, top_k: int = settings.TOP_K,
               top_p: float = settings.TOP_P, length: int = LENGTH, seed: int | None = None,
               beginning: str = "") -> dict:
    """Replies to a message and streams the reply.

    Args:
        message: What the user says.
        history: The earlier messages, {"role": "user" or "assistant", "content": text} each.
        model: A name from /models. Default: the bundled chat model, or else the first one.
        you: The user's name in the transcript; for a model without a chat template only.
        it: The model's name there.
        temperature: Lower is more predictable, higher is more surprising.
        top_k: Sample from the k most likely tokens; 0 is all of them.
        top_p: Sample from the smallest set of tokens with this total probability.
        length: Most tokens of the reply, which also ends where the model's context is full.
        seed: The same seed and settings give the same reply. Default: a random one.
        beginning: The beginning of the reply, which the model continues.

    Returns:
        A stream of dicts with these keys:
        "text": The reply so far, with its beginning.
        "left_out": How many of the oldest messages no longer fit into the model's context.
        "used", "context": Tokens of the conversation, and tokens that the model can read.
        "figures": Length and speed, as a sentence for people.
    """
    messages = [*(history or []), {"role": "user", "content": message}]
    validate_messages(messages, beginning)
    all_text = "".join(turn["content"] for turn in messages) + beginning
    sampling = settings.validate(all_text, temperature, top_k, top_p, length, seed)

    model = model or models.chat_model()
    if not models.future(model).done():
        yield {"text": beginning, "left_out": 0, "used": 0, "context": 0,
               "figures": "Loading the model …"}
    engine, _ = await models.wait_for(model)

    has_template = engine.tokenizer.chat_template is not None
    if not has_template:
        validate_names(you, it)
    prompt, left_out = await asyncio.to_thread(fit, engine, messages, you, it, beginning, length)
    used = len(prompt[0])
    sampling = dataclasses.replace(
        sampling, max_new_tokens=min(length, engine.block_size - used),
        stop=turn_ends(engine.tokenizer, you, it),
        repetition_penalty=REPETITION_PENALTY if has_template else 1.0)

    # ask again with the next seed if the model says nothing
    for attempt in range(ATTEMPTS):
        seeded = dataclasses.replace(sampling, seed=sampling.seed + attempt)
        writing = Writing(engine, prompt, seeded)
        async for _ in follow(writing):
            yield {"text": (beginning + writing.texts[0]).strip(), "left_out": left_out,
                   "used": used + writing.tokens[0], "context": engine.block_size,
                   "figures": writing.figures()}
        if writing.texts[0].strip() or beginning:
            break


def fit(engine: Engine, messages: list[dict[str, str]], you: str, it: str, beginning: str,
        length: int) -> tuple[tuple[list[int], list[str]], int]:
    """(the prompt with the reply's beginning: ids and notices, how many messages it leaves out).

    It leaves out messages only if the context has no room for a short reply after them.
    """
    begun = engine.tokenizer.encode(engine.tokenizer.replace_unknown(beginning)[0])
    room = len(begun) + min(length, engine.block_size // 8)
    prompt, left_out = fit_prompt(engine, messages, you, it, room)
    if isinstance(prompt, str):
        return engine.encode(prompt + beginning), left_out
    return (prompt + begun, []), left_out


async def answer(models: Models, talk: dict, *values):
    """Answers the open conversation of the page, as its "ask" says, and streams it.

    The last turn is the user's ("ask": "reply") or a reply to continue ("ask": "continue"). An
    error becomes a sentence of the conversation, which stays as it is.
    """
    turns = talk["turns"]
    beginning = ""
    if talk["ask"] == "continue":
        *turns, begun = turns
        beginning = begun["content"]
    *history, last = turns
    reply = {"text": beginning}
    try:
        async for reply in chat(models, last["content"], history, *values, None, beginning):
            shown = {"role": "assistant", "content": reply["text"]}
            yield {**talk, **reply, "turns": [*turns, shown]}
    except UserError as error:
        yield {**talk, "error": str(error)}
        return
    if not reply["text"]:
        yield {**talk, **reply, "turns": turns, "error": NOTHING_SAID}
