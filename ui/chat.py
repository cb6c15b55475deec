"""The Chat tab: a conversation with a model.

A model with a chat template gets the conversation in the form it was trained on. A base model has
no template; it continues a transcript, in which each turn stands under the speaker's name.
"""
import asyncio
import dataclasses
import html
import secrets
from types import MethodType

import gradio as gr

from api.conversation import fit_prompt, turn_ends
from common.errors import UserError
from ui.models import Models, show_user_errors
from ui.stream import (
    MAX_BYTES,
    Writing,
    default_of,
    figures_box,
    follow,
    model_box,
    slider,
    validate_settings,
)

LENGTH = 120  # tokens of a reply, by default
MAX_NAME = 40  # characters
SPEAKERS = [["Student", "Teacher"], ["ROMEO", "JULIET"]]

CHAT_NOTE = (
    "This very small model was trained to make small talk. It has no knowledge and is not an "
    "assistant: what it says is made up."
)
TRANSCRIPT_NOTE = (
    "This model was not trained to chat. It continues a transcript in which each turn stands under "
    "the speaker's name, and its turn ends where the next speaker's name would follow. What it "
    "says is made up."
)

# --------------------------------------------------------------------------------------------------
# The page

def build(models: Models):
    """Lays out the tab and connects its events."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            note = gr.Markdown("Loading the model …", elem_id="chat-note")
            talk = gr.Chatbot(
                label="Conversation",
                placeholder="Say something below. You can edit what you said and retry a reply.",
                height=480, editable="user", render_markdown=False, sanitize_html=True,
                allow_tags=False, feedback_options=None, buttons=["copy", "copy_all"],
                elem_id="talk")
            message = gr.Textbox(label="Your message", placeholder="Hello! How was your day?",
                                 lines=1, max_lines=6, max_length=MAX_BYTES, submit_btn="Send",
                                 elem_id="say")
            with gr.Row():
                stop_button = gr.Button("Stop", variant="stop", min_width=90, elem_id="chat-stop")
                clear_button = gr.Button("New chat", min_width=90, elem_id="chat-clear")
            figures = figures_box("chat-status", "Speed and length appear here after a reply.")
        with gr.Column(scale=3, min_width=300):
            model = model_box(models, "chat-", value=models.chat_model())
            # the names in a transcript; hidden for a model with a chat template
            with gr.Column(visible=False) as speakers:
                with gr.Row():
                    you, it = [
                        gr.Textbox(name, label=label, max_length=MAX_NAME, min_width=120,
                                   elem_id=elem_id)
                        for name, label, elem_id in zip(
                            SPEAKERS[0], ("You are", "The model is"), ("chat-you", "chat-it"))
                    ]
                gr.Examples(SPEAKERS, [you, it], label="Try other names")
            sliders = [slider("temperature", "chat-"), slider("top_k", "chat-"),
                       slider("top_p", "chat-"), slider("length", "chat-", value=LENGTH)]

    # say what kind of model it is as soon as it is loaded
    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    opened = gr.context.Context.root_block.load
    gr.on([opened, model.change], MethodType(describe, models), model, [note, speakers],
          trigger_mode="always_last", **quiet)

    run = {"outputs": [talk, message, figures], "concurrency_limit": None, **quiet}
    settings = [model, you, it, *sliders]
    running = [message.submit(MethodType(say, models), [talk, message, *settings], **run),
               talk.edit(MethodType(say_again, models), [talk, *settings], **run),
               talk.retry(MethodType(say_again, models), [talk, *settings], **run)]
    stop_button.click(None, cancels=running)
    clear_button.click(lambda: ([], "", ""), None, [talk, message, figures], cancels=running,
                       api_visibility="private")
    talk.undo(undo, talk, [talk, message], **quiet)
    gr.api(MethodType(chat, models), api_name="chat", concurrency_limit=None)


def describe(models: Models, name: str):
    """The note above the conversation, and whether the speakers' names are shown."""
    with show_user_errors():
        has_template = models.engine(name).tokenizer.chat_template is not None
    return CHAT_NOTE if has_template else TRANSCRIPT_NOTE, gr.Column(visible=not has_template)


# --------------------------------------------------------------------------------------------------
# Conversations

def validate_messages(messages: list[dict[str, str]]):
    """Raises UserError for anything but texts of the user and the assistant."""
    valid = all(
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
        for message in messages
    )
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
               model: str | None = None, you: str = SPEAKERS[0][0], it: str = SPEAKERS[0][1],
               temperature: float = default_of("temperature"), top_k: int = default_of("top_k"),
               top_p: float = default_of("top_p"), length: int = LENGTH,
               seed: int | None = None) -> dict:
    """Replies to a message and streams the reply.

    Args:
        message: What the user says.
        history: The earlier messages, {"role": "user" or "assistant", "content": text} each.
        model: A name from /models. Default: the bundled chat model, or else the first one.
        you: The user's name in the transcript; for a model without a chat template only.
        it: The model's name in the transcript; for a model without a chat template only.
        temperature: Lower is more predictable, higher is more surprising.
        top_k: Sample from the k most likely tokens; 0 is all of them.
        top_p: Sample from the smallest set of tokens with this total probability.
        length: Most tokens of the reply; at most half of the model's context is used.
        seed: The same seed and settings give the same reply. Default: a random one.

    Returns:
        A stream of dicts with these keys:
        "text": The reply so far.
        "left_out": How many of the oldest messages no longer fit into the model's context.
        "figures": Length and speed, as a sentence for people.
    """
    with show_user_errors():
        messages = [*(history or []), {"role": "user", "content": message}]
        validate_messages(messages)
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        all_text = "".join(turn["content"] for turn in messages)
        sampling = validate_settings(
            all_text, temperature=temperature, top_k=top_k, top_p=top_p, length=length,
            seed=secrets.randbits(32) if seed is None else seed)

        model = model or models.chat_model()
        if not models.future(model).done():
            yield {"text": "", "left_out": 0, "figures": "Loading the model …"}
        loaded = await models.wait_for(model)
        engine = loaded.engine

        if engine.tokenizer.chat_template is None:
            validate_names(you, it)
        stop = turn_ends(engine.tokenizer, you, it)
        length = min(length, engine.block_size // 2)
        sampling = dataclasses.replace(sampling, max_new_tokens=length, stop=stop)

        prompt, left_out = await asyncio.to_thread(fit_prompt, engine, messages, you, it, length)
        writing = Writing(loaded, prompt, sampling)
        if left_out:
            writing.notices.append(
                f"The model no longer reads the oldest messages ({left_out}): its context is full.")
        async for _ in follow(writing):
            yield {"text": writing.texts[0].strip(), "left_out": left_out,
                   "figures": writing.figures()}


async def say(models: Models, talk: list[dict], message: str, *settings):
    """Runs `chat` for the page, and marks the messages that the model no longer reads."""
    history = [{"role": turn["role"], "content": content(turn)} for turn in talk]
    async for reply in chat(models, message or "", history, *settings):
        turns = [*history, {"role": "user", "content": message},
                 {"role": "assistant", "content": reply["text"] or "…"}]
        # Gradio reads the content as HTML
        shown = [{**turn, "content": html.escape(turn["content"], quote=False)} for turn in turns]
        for turn in shown[:reply["left_out"]]:
            turn["metadata"] = {"title": "No longer read by the model", "status": "done"}
        yield shown, "", reply["figures"]


async def say_again(models: Models, data: gr.EventData, talk: list[dict], *settings):
    """Replies again to a message, which may have been edited. Later messages are removed."""
    index = max(i for i in range(data.index + 1) if talk[i]["role"] == "user")
    edited = hasattr(data, "previous_value")
    message = html.unescape(data.value) if edited else content(talk[index])
    async for outputs in say(models, talk[:index], message, *settings):
        yield outputs


def undo(data: gr.UndoData, talk: list[dict]):
    """Removes a message with all after it, and puts it back into the message box."""
    return talk[:data.index], content(talk[data.index])


def content(turn: dict) -> str:
    """The text of a message of Gradio's chatbot."""
    return html.unescape("".join(part.get("text", "") for part in turn["content"]))
