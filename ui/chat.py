"""The Chat tab: a base model plays the other side of a written conversation."""
import asyncio
import dataclasses
import html
import secrets
from types import MethodType

import gradio as gr

from common.errors import UserError
from generate import Engine
from ui.models import Models, sentences
from ui.stream import MAX_BYTES, Writing, default_of, figures_box, follow, model_box, slider, validate_settings

MAX_NAME = 40  # characters
SPEAKERS = [["Student", "Teacher"], ["ROMEO", "JULIET"]]
NOTE = ("This is no assistant: a base model goes on with what looks like a conversation, and knows nothing of being asked. The "
        "text that it reads is each turn below the speaker's name, and its turn ends where it would name the next speaker.")


def build(models: Models):
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            talk = gr.Chatbot(label="Conversation", height=480, editable="user", render_markdown=False, sanitize_html=True,
                              feedback_options=None, allow_tags=False, buttons=["copy", "copy_all"], elem_id="talk",
                              placeholder="Say something below. Your turns can be edited, and an answer tried again.")
            said = gr.Textbox(label="Your turn", lines=1, max_lines=6, max_length=MAX_BYTES, submit_btn="Say", elem_id="say",
                              placeholder="What have you learned today?")
            with gr.Row():
                stop = gr.Button("Stop", variant="stop", min_width=90, elem_id="chat-stop")
                clear = gr.Button("New conversation", min_width=90, elem_id="chat-clear")
            figures = figures_box("chat-status", "What an answer took appears here.")
            gr.Markdown(NOTE)
        with gr.Column(scale=3, min_width=300):
            model = model_box(models, "chat-")
            with gr.Row():
                you = gr.Textbox(SPEAKERS[0][0], label="You are", max_length=MAX_NAME, min_width=120, elem_id="chat-you")
                it = gr.Textbox(SPEAKERS[0][1], label="The model is", max_length=MAX_NAME, min_width=120, elem_id="chat-it")
            gr.Examples(SPEAKERS, [you, it], label="Speakers")
            sliders = [slider(name, "chat-", **changes) for name, changes in (
                ("temperature", {}), ("top_k", {}), ("top_p", {}), ("length", {"value": 120}))]

    run = {"outputs": [talk, said, figures], "api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    settings = [model, you, it, *sliders]
    events = [said.submit(MethodType(say, models), [talk, said, *settings], **run),
              talk.edit(MethodType(say_again, models), [talk, *settings], **run),
              talk.retry(MethodType(say_again, models), [talk, *settings], **run)]
    stop.click(None, cancels=events)
    clear.click(lambda: ([], "", ""), None, [talk, said, figures], cancels=events, api_visibility="private")
    talk.undo(undo, talk, [talk, said], api_visibility="private", show_progress="hidden")
    gr.api(MethodType(chat, models), api_name="chat", concurrency_limit=None)


def template(turns: list[tuple[str, str]], speaker: str) -> str:
    """The text that the model goes on with: turns of (name, what was said), and whose turn it is."""
    return "".join(f"{name}:\n{text}\n\n" for name, text in turns) + f"{speaker}:\n"


def fit(engine: Engine, turns: list[tuple[str, str]], speaker: str, length: int) -> tuple[str, int]:
    """(the text with as many of the last turns as the model reads at once, with room for `length` tokens; how many were left
    out, the oldest). Raises UserError where not even the last fits."""
    for left_out in range(len(turns)):
        text = template(turns[left_out:], speaker)
        tokens = len(engine.tokenizer.encode(engine.tokenizer.replace_unknown(text)[0]))
        if tokens + length <= engine.block_size:
            return text, left_out
    raise UserError(f"The model reads {engine.block_size:,} tokens at a time, and this turn has {tokens:,}, with {length:,} kept "
                    "for the answer: say less, or choose a shorter answer or another model.")


async def chat(models: Models, message: str, history: list[dict[str, str]] | None = None, model: str | None = None,
               you: str = SPEAKERS[0][0], it: str = SPEAKERS[0][1], temperature: float = default_of("temperature"),
               top_k: int = default_of("top_k"), top_p: float = default_of("top_p"), length: int = 120, seed: int | None = None) -> dict:
    """Answers a message. `history` holds the turns before it, {"role": "user" or "assistant", "content": text} each. Streams
    "text", the answer so far; "left_out", how many of the oldest turns the model no longer reads; "figures", in words. An answer
    has at most half of the model's context, and ends where the model would name a speaker."""
    with sentences():
        history, seed = history or [], secrets.randbits(32) if seed is None else seed
        names = {"user": you, "assistant": it}
        turns = [*((names.get(turn.get("role")), turn.get("content")) for turn in history), (you, message)]
        if not all(isinstance(part, str) for turn in turns for part in turn) or not message.strip():
            raise UserError("A conversation is made of turns of the user and the assistant, the last of which says something.")
        if not all(isinstance(name, str) and 0 < len(name.strip()) <= MAX_NAME and "\n" not in name for name in (you, it)):
            raise UserError(f"The speakers have names, of at most {MAX_NAME} characters.")
        sampling = validate_settings(template(turns, it), [f"\n{you}:", f"\n{it}:"], temperature=temperature, top_k=top_k, top_p=top_p,
                           length=length, seed=seed)
        if not models.future(model or models.names[0]).done():
            yield {"text": "", "left_out": 0, "figures": "Loading the model …"}
        loaded = await models.wait_for(model or models.names[0])
        length = min(length, loaded.engine.block_size // 2)
        text, left_out = await asyncio.to_thread(fit, loaded.engine, turns, it, length)
        writing = Writing(loaded, text, dataclasses.replace(sampling, max_new_tokens=length))
        if left_out:
            writing.notices.append(f"The {left_out} oldest turns are past the model's context: it no longer reads them.")
        async for _ in follow(writing):
            yield {"text": writing.texts[0].strip(), "left_out": left_out, "figures": writing.figures()}


async def say(models: Models, talk: list[dict], message: str, *settings):
    """`chat` for the page's components. Turns that the model no longer reads stand under a line that says so."""
    history = [{"role": turn["role"], "content": content(turn)} for turn in talk]
    async for said in chat(models, message or "", history, *settings):
        shown = [*history, {"role": "user", "content": message}, {"role": "assistant", "content": said["text"] or "…"}]
        shown = [{**turn, "content": html.escape(turn["content"], quote=False)} for turn in shown]  # Gradio takes it for HTML
        for turn in shown[:said["left_out"]]:
            turn["metadata"] = {"title": "No longer read by the model", "status": "done"}
        yield shown, "", said["figures"]


async def say_again(models: Models, data: gr.EventData, talk: list[dict], *settings):
    """Another answer to a turn, which may have been edited; what came after it is gone."""
    index = max(i for i in range(data.index + 1) if talk[i]["role"] == "user")
    edited = hasattr(data, "previous_value")
    async for outputs in say(models, talk[:index], html.unescape(data.value) if edited else content(talk[index]), *settings):
        yield outputs


def undo(data: gr.UndoData, talk: list[dict]):
    return talk[:data.index], content(talk[data.index])


def content(turn: dict) -> str:
    return html.unescape("".join(part.get("text", "") for part in turn["content"]))
