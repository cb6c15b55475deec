"""The Write tab: a notebook with one text box, in which the model continues the text in place.

The notebook lives in the browser (ui/static/write.js): who wrote what, undo, branches, and the text
after a reload. The server continues texts and measures them; it stores nothing.
"""
import codecs
import json
import math
import secrets
import urllib.parse
from types import MethodType
from typing import NamedTuple

import gradio as gr

from ui.models import Models, show_user_errors
from ui.stream import (
    DTYPES,
    MAX_BYTES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    Writing,
    default_of,
    figures_box,
    follow,
    in_range,
    model_box,
    slider,
    stop_strings,
    validate_settings,
)

HEAD = """## Give it a beginning, and it writes on
Choose one of these or type your own. A small language model, trained from zero with this
repository, continues it word by word. What it writes is made up and can be false or offensive."""
HELP = ("**Write** continues the text (Shift+Enter; Escape stops). **Try again** replaces what was "
        "written last. The model's words are blue.")
SETTINGS = ["model", "dtype", "temperature", "top_k", "top_p", "length", "seed", "versions", "stop"]
FOLDED = ["dtype", "top_k", "top_p", "versions", "stop"]  # settings that a visitor does not see
OTHERS = 8  # tokens that a word could also have been


# --------------------------------------------------------------------------------------------------
# The page. An event's `js` names a function in ui/static/write.js.

class Tab(NamedTuple):
    text: gr.Textbox
    model: gr.Dropdown
    look_button: gr.Button  # app.py connects it to the Look inside tab


class Editor(NamedTuple):
    text: gr.Textbox
    write: gr.Button
    stop: gr.Button
    again: gr.Button
    tools: dict[str, gr.Button]  # by the names of their functions in write.js
    look: gr.Button
    colours: gr.Checkbox
    figures: gr.Textbox


def build(models: Models) -> Tab:
    """Lays out the tab and connects its events."""
    gr.Markdown(HEAD, elem_id="write-head")
    with gr.Row(elem_id="beginnings"):
        beginnings = [gr.Button(size="sm", **shown)
                      for shown in beginning_buttons(models, models.default)]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            editor = editor_column(models)
        with gr.Column(scale=3, min_width=300):
            settings, more, new_seed = settings_column(models)
            link = save_column()
    model, seed = settings["model"], settings["seed"]
    quiet = {"api_visibility": "private", "show_progress": "hidden"}

    # writing: the browser picks the prompt and the seed, then the server streams the text
    prompt, written, opened_link = [gr.Textbox(visible="hidden") for _ in range(3)]
    run = {"fn": MethodType(show, models), "inputs": [prompt, *settings.values()],
           "outputs": [written, editor.figures], "concurrency_limit": None, **quiet}
    starts = [gr.on(triggers, None, [seed, new_seed], [prompt, seed], js=js) for triggers, js in (
        ([editor.write.click, editor.text.submit], "page.write.start"),
        ([editor.again.click], "page.write.again"))]
    starts.append(opened_link.change(None, prompt, None, js="page.write.follow"))
    running = [start.then(**run) for start in starts]
    written.change(None, written, link, js="page.write.receive")
    editor.stop.click(None, cancels=running)
    for ended in (editor.stop.click, *(event.failure for event in running)):
        ended(None, None, link, js="page.write.end")

    # what the browser does without the server
    editor.text.change(None, None, None, js="page.write.typed")
    for name, button in editor.tools.items():
        button.click(None, None, None, js=f"page.write.{name}")
    for button in beginnings:
        button.click(None, button, None, js="page.write.begin")
    gr.on([editor.colours.change, model.change], None, None, None, js="page.write.measure")

    # opening the page, and choosing a model
    root = gr.context.Context.root_block
    root.load(MethodType(read_link, models), opened_link,
              [opened_link, prompt, more, *settings.values()], js="() => location.hash.slice(1)",
              **quiet)
    model.change(lambda name: [gr.update(**shown) for shown in beginning_buttons(models, name)],
                 model, beginnings, **quiet)
    gr.api(MethodType(write, models), api_name="generate", concurrency_limit=None)
    return Tab(editor.text, model, editor.look)


def editor_column(models: Models) -> Editor:
    """The text, its buttons, and what the browser shows below them."""
    text = gr.Textbox(models.first_prompt(), label="Text", lines=12, max_lines=12,
                      max_length=MAX_BYTES, show_label=False, container=False, autoscroll=False,
                      elem_id="text", placeholder="Write the beginning of a text …")
    with gr.Row(elem_id="actions"):
        write_button = gr.Button("Write", variant="primary", elem_id="generate")
        stop_button = gr.Button("Stop", variant="stop", elem_id="stop")
        again_button = gr.Button("Try again", elem_id="again")
    gr.Markdown(HELP, elem_id="write-help")
    with gr.Row(elem_id="tools"):
        tools = {label.lower(): gr.Button(label, size="sm", elem_id=label.lower())
                 for label in ("Undo", "Redo", "Clear")}
        look_button = gr.Button("Look inside this text", size="sm", elem_id="look")
        colours = gr.Checkbox(label="Colour by probability", elem_id="colours")
    figures = figures_box("status", "")

    def measure(request: dict) -> dict:
        return measure_text(models, request)

    gr.HTML(js_on_load="page.write.open(element, server)", server_functions=[measure],
            elem_id="notebook")
    return Editor(text, write_button, stop_button, again_button, tools, look_button, colours,
                  figures)


def settings_column(models: Models) -> tuple[dict[str, gr.Component], gr.Accordion, gr.Checkbox]:
    """The settings by their names in SETTINGS, the fold that holds most of them, and the box for a
    new seed."""
    boxes = {"model": model_box(models), "temperature": slider("temperature"),
             "length": slider("length")}
    with gr.Accordion("More settings", open=False, elem_id="more") as more:
        boxes |= {name: slider(name) for name in ("top_k", "top_p", "versions", "seed")}
        new_seed = gr.Checkbox(value=True, label="New seed each time", elem_id="new-seed")
        boxes["stop"] = gr.Textbox(
            label="Stop strings", lines=2, elem_id="stops",
            info="One per line, \\n for a line break. The text ends before the first one.")
        boxes["dtype"] = gr.Dropdown(DTYPES, value=models.dtype, label="Precision", elem_id="dtype")
    return {name: boxes[name] for name in SETTINGS}, more, new_seed


def save_column() -> gr.Textbox:
    """The fold with the link and the downloads; returns the box of the link."""
    with gr.Accordion("Save or share", open=False, elem_id="save"):
        link = gr.Textbox(
            label="Link", buttons=["copy"], interactive=False, max_lines=2, elem_id="link",
            info="Contains prompt, settings and seed, and writes the same text again.")
        with gr.Row():
            for kind in "txt", "json":
                button = gr.Button(f"Download {kind}", size="sm")
                button.click(None, None, None, js=f"() => page.write.download('{kind}')")
    return link


def beginning_buttons(models: Models, name: str) -> list[dict]:
    """The text and the visibility of the three buttons, for a model."""
    texts = [*models.beginnings(name), "", "", ""]
    return [{"value": text, "visible": text != ""} for text in texts[:3]]


def read_link(models: Models, fragment: str | None) -> list:
    """Values for the opened link, the prompt, the fold and the settings, from a link's fragment:
    JSON that write.js has made.

    Anybody can make a link, so only what the page itself offers is taken: its models and
    precisions, and numbers in their range.
    """
    try:
        request = json.loads(urllib.parse.unquote(fragment or ""))
        prompt = request["prompt"]
    except (ValueError, KeyError, TypeError):  # no link, or not one of ours
        return [gr.skip()] * (3 + len(SETTINGS))
    stop_limit = MAX_STOPS * (MAX_STOP_CHARS + 1)
    valid = {
        "model": lambda value: value in models.names,
        "dtype": lambda value: value in DTYPES,
        "stop": lambda value: isinstance(value, str) and len(value) <= stop_limit,
    }
    taken = {}
    for name in SETTINGS:
        value = request.get(name)
        if valid.get(name, lambda value, name=name: in_range(name, value))(value):
            taken[name] = value
    if "model" in request and "model" not in taken:
        gr.Warning("This page does not have the model that the link names.")
    # show the settings that a fold would hide
    usual = {"dtype": models.dtype, "stop": ""} | {name: default_of(name) for name in FOLDED[1:4]}
    hidden = any(taken.get(name, usual[name]) != usual[name] for name in FOLDED)
    return [fragment, str(prompt)[:MAX_BYTES], gr.Accordion(open=hidden),
            *(taken.get(name, gr.skip()) for name in SETTINGS)]


# --------------------------------------------------------------------------------------------------
# Measuring

def measure_text(models: Models, request: dict) -> dict:
    """How much of the context a text uses, and how likely each of its tokens was.

    `request` has "text", "model", "dtype" and "colours". The result has "used" and "size" (tokens
    of the context) and "tokens", empty without colours: for each token at the end of the text that
    the model reads, its "text", its probability "p" (None for the first one) and the "others".
    """
    text = str(request["text"])[:MAX_BYTES]
    with show_user_errors():
        engine = models.engine(str(request["model"]), request["dtype"])
    text, _ = engine.tokenizer.replace_unknown(text.encode(errors="replace").decode())
    ids = engine.tokenizer.encode(text)
    used = min(len(ids), engine.block_size)
    tokens = []
    if request["colours"] and ids:
        read = engine.inspect(text if used == len(ids) else ids[-used:], OTHERS)
        # a character can span tokens: it counts with the one that completes it
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in read:
            p = None if token["logprob"] is None else math.exp(token["logprob"])
            others = [(other, math.exp(logprob)) for other, logprob in token["top"]]
            own = decoder.decode(engine.tokenizer.decode_bytes([token["id"]]))
            tokens.append({"text": own, "p": p, "others": others})
    return {"used": used, "size": engine.block_size, "tokens": tokens}


# --------------------------------------------------------------------------------------------------
# Writing

async def write(models: Models, prompt: str = "", model: str | None = None,
                dtype: str | None = None, temperature: float = default_of("temperature"),
                top_k: int = default_of("top_k"), top_p: float = default_of("top_p"),
                length: int = default_of("length"), seed: int | None = None,
                versions: int = default_of("versions"), stop: list[str] | None = None) -> dict:
    """Continues a text and streams the result.

    Args:
        prompt: The text to continue.
        model: A name from /models. Default: the first one.
        dtype: The precision. Default: the page's.
        temperature: Lower is more predictable, higher is more surprising.
        top_k: Sample from the k most likely tokens; 0 is all of them.
        top_p: Sample from the smallest set of tokens with this total probability.
        length: Number of tokens to write.
        seed: The same seed and settings give the same text. Default: a random one.
        versions: Number of continuations.
        stop: At most four strings; a version ends before the first one that appears.

    Returns:
        A stream of dicts with these keys:
        "text": The prompt with its continuation. Of several versions, the most likely one, once
            all have ended.
        "versions": For each version its "text", its number of "tokens", the "reason" why it
            ended, and with several versions "mean_logprob" (nats per token).
        "context": How many tokens of the model's context are used ("used", of "size").
        "figures": Length and speed, as a sentence for people.
        "settings": The arguments that give the same result again.
    """
    with show_user_errors():
        model = model or models.default
        seed = secrets.randbits(32) if seed is None else seed
        stop = stop or []
        sampling = validate_settings(prompt, stop, temperature=temperature, top_k=top_k,
                                     top_p=top_p, length=length, seed=seed, versions=versions)
        if not models.future(model, dtype).done():
            yield {"text": prompt, "versions": [], "context": {}, "figures": "Loading the model …",
                   "settings": {}}
        loaded = await models.wait_for(model, dtype)
        writing = Writing(loaded, prompt, sampling, versions)
        settings = {"prompt": prompt, "model": model, "dtype": loaded.engine.dtype,
                    "temperature": temperature, "top_k": top_k, "top_p": top_p, "length": length,
                    "seed": seed, "versions": versions, "stop": stop}
        async for _ in follow(writing):
            results = [
                {"text": writing.texts[i], "tokens": writing.tokens[i],
                 "reason": writing.reasons[i],
                 "mean_logprob": writing.mean_logprob(i) if versions > 1 else None}
                for i in writing.ranked()
            ]
            # several versions have a winner only once all have ended
            best = results[0]["text"] if versions == 1 or writing.done else ""
            yield {"text": prompt + best, "versions": results, "context": writing.context(),
                   "figures": writing.figures(), "settings": settings}


async def show(models: Models, prompt: str, *values):
    """Runs `write` for the page: yields JSON for `page.write.receive`, and the figures."""
    *values, stop = values
    async for result in write(models, prompt or "", *values, stop_strings(stop)):
        del result["text"]  # the versions have it
        yield json.dumps(result), result["figures"]
