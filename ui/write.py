"""The Write tab: a notebook with one text box, in which the model continues the text in place.

The notebook lives in the browser (ui/static/write.js): who wrote what, undo, branches, and the text
after a reload. The server continues texts and measures them; it stores nothing.
"""
import urllib.parse
from types import MethodType

import gradio as gr

from common.files import parse_json
from ui import settings
from ui.models import DTYPES, Models
from ui.reading import CLASSES, class_of
from ui.stream import Writing, follow

# the arguments of `write` that follow the prompt
SETTINGS = ["model", "dtype", "temperature", "top_k", "top_p", "length", "seed", "versions", "stop"]
OTHERS = 8  # tokens that a word could also have been


# --------------------------------------------------------------------------------------------------
# The page. An event's `js` names a function in ui/static/write.js.

def build(models: Models) -> tuple[gr.Textbox, gr.Dropdown, gr.Button]:
    """Lays out the tab and connects its events.

    Returns the text, its model and the button that app.py connects to the Look inside tab.
    """
    gr.Markdown(settings.TEXTS["write"], elem_id="write-head")
    with gr.Row(elem_id="beginnings"):
        beginnings = beginning_buttons(models, models.default)
    with gr.Row():
        with gr.Column(scale=5):
            text, buttons, look_button, figures = text_column(models)
        with gr.Column(scale=3, min_width=300):
            boxes, more, new_seed, link = settings_column(models)
    write_button, stop_button, again_button = buttons
    model, seed = boxes["model"], boxes["seed"]

    # writing: the browser picks the prompt and the seed, then the server streams the text
    prompt, opened_link = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
    written = gr.JSON(visible="hidden")
    starts = [
        gr.on([write_button.click, text.submit], None, [seed, new_seed], [prompt, seed],
              js="page.write.start"),
        again_button.click(None, [seed, new_seed], [prompt, seed], js="page.write.again"),
        opened_link.change(None, prompt, None, js="page.write.follow")]
    running = [start.then(MethodType(show, models), [prompt, *boxes.values()], [written, figures],
                          concurrency_limit=None, **settings.QUIET) for start in starts]
    written.change(None, written, link, js="page.write.receive")
    stop_button.click(None, cancels=running)
    for ended in stop_button.click, *(event.failure for event in running):
        ended(None, None, link, js="page.write.end")

    # what the browser does without the server
    text.change(js="page.write.typed")
    for button in beginnings:
        button.click(None, button, None, js="page.write.begin")
    model.change(js="page.write.measure")

    # opening the page, and choosing a model
    gr.context.Context.root_block.load(
        MethodType(read_link, models), opened_link, [opened_link, prompt, more, *boxes.values()],
        js="() => location.hash.slice(1)", **settings.QUIET)
    model.change(MethodType(beginning_buttons, models), model, beginnings, **settings.QUIET)
    return text, model, look_button


def text_column(models: Models) -> tuple:
    """The text, its buttons, and what the browser shows below them."""
    text = gr.Textbox(
        models.beginnings(models.default)[0], label="Text", lines=12, max_lines=12,
        max_length=settings.MAX_BYTES, show_label=False, container=False, autoscroll=False,
        placeholder="Write the beginning of a text …", elem_id="text")
    with gr.Row(elem_id="actions"):
        write_button = gr.Button("Write", variant="primary", elem_id="generate")
        stop_button = gr.Button("Stop", variant="stop", elem_id="stop")
        again_button = gr.Button("Try again", elem_id="again")
    gr.Markdown(settings.TEXTS["write help"], elem_id="write-help")
    with gr.Row(elem_id="tools"):
        for name in "undo", "redo", "clear":
            gr.Button(name.capitalize(), size="sm", elem_id=name).click(js=f"page.write.{name}")
        look_button = gr.Button("Look inside this text", size="sm", elem_id="look")
        colours = gr.Checkbox(label="Colour by probability", elem_id="colours")
        colours.change(js="page.write.measure")
    figures = settings.plain_box("Figures", "status")

    # write.js calls it by this name; Gradio marks the function, which a bound method does not allow
    def measure(request: dict) -> dict:
        return measure_text(models, request)

    gr.HTML(settings.HTML.notebook(CLASSES), js_on_load="page.write.open(element, server)",
            server_functions=[measure])
    return text, (write_button, stop_button, again_button), look_button, figures


def settings_column(models: Models) -> tuple:
    """The settings and the link.

    Returns the settings by their names in SETTINGS, the fold that holds most of them, the box for a
    new seed, and that of the link.
    """
    boxes = {"model": settings.model_box(models), "temperature": settings.slider("temperature"),
             "length": settings.slider("length")}
    with gr.Accordion("More settings", open=False, elem_id="more") as more:
        boxes |= {name: settings.slider(name) for name in ("top_k", "top_p", "versions", "seed")}
        new_seed = gr.Checkbox(value=True, label="New seed each time", elem_id="new-seed")
        boxes["stop"] = gr.Textbox("", label="Stop strings", lines=2, elem_id="stops",
                                   info=settings.TEXTS["stop"])
        boxes["dtype"] = gr.Dropdown(DTYPES, value=models.dtype, label="Precision", elem_id="dtype")
    with gr.Accordion("Save or share", open=False, elem_id="save"):
        link = gr.Textbox(label="Link", info=settings.TEXTS["link"], buttons=["copy"],
                          interactive=False, max_lines=2, elem_id="link")
        with gr.Row():
            for kind in "txt", "json":
                button = gr.Button(f"Download {kind}", size="sm")
                button.click(js=f"() => page.write.download('{kind}')")
    return {name: boxes[name] for name in SETTINGS}, more, new_seed, link


def beginning_buttons(models: Models, model: str) -> list[gr.Button]:
    """The three buttons with prompts that suit a model; those without one are hidden."""
    texts = [*models.beginnings(model), "", ""]
    return [gr.Button(text, visible=text != "", size="sm") for text in texts[:3]]


def read_link(models: Models, fragment: str) -> list:
    """Values for the opened link, the prompt, the fold and the settings, from a link's fragment:
    JSON that write.js has made.

    Anybody can make a link, so only what the page itself offers is taken: its models and
    precisions, and numbers in their range.
    """
    try:
        request = parse_json(urllib.parse.unquote(fragment))
        prompt = request["prompt"]
    except (ValueError, KeyError, TypeError):  # no link, or not one of ours
        return gr.skip()

    def is_valid(name: str, value) -> bool:
        if name == "model":
            return value in models.names
        if name == "dtype":
            return value in DTYPES
        if name == "stop":
            return isinstance(value, str)
        return settings.in_range(name, value)

    taken = {name: request[name] for name in SETTINGS if is_valid(name, request.get(name))}
    if "model" in request and "model" not in taken:
        gr.Warning("This page does not have the model that the link names.")
    # open the fold if it has an unusual setting
    usual = {"dtype": models.dtype, "top_k": settings.TOP_K, "top_p": settings.TOP_P,
             "versions": 1, "stop": ""}
    unusual = any(taken.get(name, value) != value for name, value in usual.items())
    return [fragment, str(prompt)[:settings.MAX_BYTES], gr.Accordion(open=unusual),
            *(taken.get(name, gr.skip()) for name in SETTINGS)]


# --------------------------------------------------------------------------------------------------
# Measuring

def measure_text(models: Models, request: dict) -> dict:
    """How much of the context a text uses, and how likely each of its tokens was.

    `request` has "text", "model", "dtype" and "colours". The result has "used" and "size" (tokens
    of the context) and "tokens", empty without colours: for each token at the end of the text that
    the model reads, its "text", "logprob" (None for the first one), "colour" (a class of
    probability) and the likeliest ones ("top").
    """
    text = str(request["text"])[:settings.MAX_BYTES]
    engine = models.engine(str(request["model"]), request["dtype"])
    text, _ = engine.tokenizer.replace_unknown(text)
    ids = engine.tokenizer.encode(text)
    used = min(len(ids), engine.block_size)
    tokens = []
    if request["colours"] and ids:
        tokens = engine.inspect(text if used == len(ids) else ids[-used:], OTHERS)
        # a character can span tokens: it counts with the one that completes it
        decode = engine.tokenizer.stream_decoder()
        for token in tokens:
            token["text"] = decode([token["id"]])
            if token["logprob"] is not None:
                token["colour"] = class_of(token["logprob"])
            token["top"] = [(engine.tokenizer.decode([i]), logprob) for i, logprob in token["top"]]
    return {"used": used, "size": engine.block_size, "tokens": tokens}


# --------------------------------------------------------------------------------------------------
# Writing

async def write(models: Models, prompt: str = "", model: str | None = None,
                dtype: str | None = None, temperature: float = settings.TEMPERATURE,
                top_k: int = settings.TOP_K, top_p: float = settings.TOP_P,
                length: int = settings.LENGTH, seed: int | None = None, versions: int = 1,
                stop: list[str] | None = None) -> dict:
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
    model = model or models.default
    stop = stop or []
    sampling = settings.validate(prompt, temperature, top_k, top_p, length, seed, versions, stop)
    if not models.future(model, dtype).done():
        yield {"text": prompt, "versions": [], "context": {}, "figures": "Loading the model …",
               "settings": {}}
    engine, _ = await models.wait_for(model, dtype)
    writing = Writing(engine, engine.encode(prompt), sampling, versions)
    used = {"prompt": prompt, "model": model, "dtype": engine.dtype, "temperature": temperature,
            "top_k": top_k, "top_p": top_p, "length": length, "seed": sampling.seed,
            "versions": versions, "stop": stop}
    async for _ in follow(writing):
        results = [
            {"text": text, "tokens": tokens, "reason": reason,
             "mean_logprob": logprob / max(1, tokens) if versions > 1 else None}
            for text, tokens, reason, logprob in zip(
                writing.texts, writing.tokens, writing.reasons, writing.logprobs)]
        if versions > 1 and writing.done:
            results.sort(key=lambda version: version["mean_logprob"], reverse=True)
        # several versions have a winner only once all have ended
        best = results[0]["text"] if versions == 1 or writing.done else ""
        yield {"text": prompt + best, "versions": results, "context": writing.context(),
               "figures": writing.figures(), "settings": used}


async def show(models: Models, prompt: str, *values):
    """Runs `write` for the page: yields what `page.write.receive` takes, and the figures."""
    *values, stop = values
    # one stop string per line, in which \n is a line break
    stops = [line.replace("\\n", "\n") for line in stop.splitlines() if line]
    async for result in write(models, prompt, *values, stops):
        del result["text"]  # the versions have it
        yield result, result["figures"]
