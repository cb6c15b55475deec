"""The Write tab: one text box, in which the model continues the text in place.

The browser keeps the last request (prompt, settings and seed) in a hidden box. Regenerate, the link
and the downloads are made from it; the server stores nothing.
"""
import json
import secrets
from types import MethodType
from typing import NamedTuple

import gradio as gr

from ui.models import Models, show_user_errors
from ui.stream import (
    DTYPES,
    MAX_BYTES,
    RANGES,
    Writing,
    default_of,
    figures_box,
    follow,
    model_box,
    slider,
    stop_strings,
    validate_settings,
)

WARNING = (
    "The model continues your text; it does not answer questions. What it writes is made up and "
    "can be false or offensive."
)
SETTINGS = ["model", "dtype", "temperature", "top_k", "top_p", "length", "seed", "versions", "stop"]
MAX_VERSIONS = RANGES["versions"].maximum

# --------------------------------------------------------------------------------------------------
# JavaScript that runs in the browser. A function gets the values of an event's inputs and returns
# the values of its outputs. `request` is the last request as JSON, or "" before the first one.

RANDOM_SEED = "Math.floor(Math.random() * 2 ** 32)"
CHOSEN_SEED = f"newSeed ? {RANDOM_SEED} : seed"


def start_js(restart: bool, seed: str) -> str:
    """Picks the prompt and the seed of the next text: with `restart` the last prompt again, else
    all of the text."""
    return f"""(text, request, seed, newSeed) => {{
        // use the whole text if it has been edited since the last request
        const restart = {str(restart).lower()} && request && !window.edited;
        const prompt = restart ? JSON.parse(request).prompt : text;
        window.edited = false;
        // the box may have been filled with something else, an example for instance
        return [text.startsWith(prompt) ? prompt : text, {seed}];
    }}"""


# Clicks the Stop button of every tab.
STOP_JS = """document.querySelectorAll('#stop, #chat-stop, #compare-stop')
    .forEach(button => button.click())"""

# Makes the link: the page's address, with the request after the #.
LINK_JS = """request =>
    request ? location.href.split('#')[0] + '#' + encodeURIComponent(request) : ''"""

# Runs once when the page opens: installs the keyboard handlers and reads the settings of a link.
OPEN_JS = f"""(...values) => {{
    // another link in the address bar opens like the first one
    onhashchange = () => location.reload();
    // Escape stops all texts
    document.addEventListener('keydown', event => {{ if (event.key == 'Escape') {STOP_JS}; }});
    // remember that the visitor has typed into the text
    document.addEventListener('input', event => {{
        window.edited ||= Boolean(event.target.closest('#text'));
    }});
    try {{
        // take each setting from the link if it is there; the last output starts the text
        const request = JSON.parse(decodeURIComponent(location.hash.slice(1)));
        const settings = {["prompt", *SETTINGS]}.map((name, i) => request[name] ?? values[i]);
        return settings.concat(location.hash);
    }} catch {{
        return values;  // no link, or not one of ours
    }}
}}"""

# Puts one of several versions after the prompt.
USE_JS = "(request, version) => JSON.parse(request).prompt + version"


def download_js(kind: str) -> str:
    """Saves the text as a file: "txt", or "json" with the settings that made it."""
    content = "JSON.stringify(record, null, 2)" if kind == "json" else "text"
    return f"""(text, request) => {{
        // the settings belong to the text only if it has not been edited
        const record = request && !window.edited ? {{...JSON.parse(request), text}} : {{text}};
        const link = document.createElement('a');
        link.href = URL.createObjectURL(new Blob([{content}], {{type: 'text/plain'}}));
        link.download = 'text.{kind}';
        link.click();
        return [];
    }}"""


# --------------------------------------------------------------------------------------------------
# The page

class Tab(NamedTuple):
    text: gr.Textbox
    model: gr.Dropdown
    look_button: gr.Button  # app.py connects it to the Look inside tab


def build(models: Models) -> Tab:
    """Lays out the tab and connects its events."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            text = gr.Textbox(models.first_prompt(), label="Text",
                              info="Edit it as you like. Shift+Enter generates, Escape stops.",
                              placeholder="Write the beginning of a text. The model continues it.",
                              lines=14, max_lines=28, max_length=MAX_BYTES, autofocus=True,
                              buttons=["copy"], elem_id="text")
            with gr.Row():
                generate_button = gr.Button(
                    "Generate", variant="primary", min_width=120, elem_id="generate")
                continue_button = gr.Button("Continue", min_width=120, elem_id="continue")
                regenerate_button = gr.Button("Regenerate", min_width=120, elem_id="regenerate")
                stop_button = gr.Button("Stop", variant="stop", min_width=120, elem_id="stop")
            figures = figures_box("status", "Speed and length appear here once the model writes.")
            # several versions of the continuation, side by side
            with gr.Row():
                use_buttons = [gr.Button("Use", size="sm") for _ in range(MAX_VERSIONS)]
                versions = [
                    gr.Textbox(visible=False, lines=8, max_lines=16, min_width=220,
                               interactive=False, buttons=["copy", use_button],
                               elem_id=f"version-{i}")
                    for i, use_button in enumerate(use_buttons)
                ]
            look_button = gr.Button("Look inside this text", size="sm", elem_id="look")
            beginnings = gr.Column()
            gr.Markdown(WARNING)
        with gr.Column(scale=3, min_width=300):
            model = model_box(models)
            with beginnings:
                gr.Examples(models.examples(), [text, model], label="Try one of these beginnings")
            sliders = [slider(name) for name in ("temperature", "top_k", "top_p", "length")]
            seed = slider("seed")
            new_seed = gr.Checkbox(value=True, label="New seed each time", elem_id="new-seed")
            with gr.Accordion("More settings", open=False, elem_id="more"):
                version_count = slider("versions")
                stop = gr.Textbox(
                    label="Stop strings",
                    info="One per line, \\n for a line break. The text ends before the first one.",
                    lines=2, elem_id="stops")
                dtype = gr.Dropdown(DTYPES, value=models.dtype, label="Precision", elem_id="dtype")
            with gr.Accordion("Save or share", open=False, elem_id="save"):
                link = gr.Textbox(
                    label="Link",
                    info="Contains prompt, settings and seed, and writes the same text again.",
                    buttons=["copy"], interactive=False, max_lines=2, elem_id="link")
                with gr.Row():
                    download_buttons = {
                        kind: gr.Button(f"Download {kind}", size="sm") for kind in ("txt", "json")
                    }
    request = gr.Textbox(visible="hidden", elem_id="request")
    opened_link = gr.Textbox(visible="hidden")

    # generating: the browser picks prompt and seed, then the server streams the text
    settings = [model, dtype, *sliders, seed, version_count, stop]
    run = {"fn": MethodType(show, models), "inputs": [text, *settings],
           "outputs": [text, figures, request, *versions], "api_visibility": "private",
           "show_progress": "hidden", "concurrency_limit": None}
    starts = [([generate_button.click, text.submit], start_js(restart=True, seed=CHOSEN_SEED)),
              ([continue_button.click], start_js(restart=False, seed=CHOSEN_SEED)),
              ([regenerate_button.click], start_js(restart=True, seed=RANDOM_SEED))]
    running = [opened_link.change(**run)]
    for triggers, js in starts:
        picked = gr.on(triggers, None, [text, request, seed, new_seed], [text, seed], js=js)
        running.append(picked.then(**run))
    stop_button.click(None, cancels=running)

    # what the browser does without the server
    request.change(None, request, link, js=LINK_JS)
    for use_button, version in zip(use_buttons, versions):
        use_button.click(None, [request, version], text, js=USE_JS)
    for kind, button in download_buttons.items():
        button.click(None, [text, request], [], js=download_js(kind))
    boxes = [text, *settings, opened_link]
    gr.context.Context.root_block.load(None, boxes, boxes, js=OPEN_JS)

    gr.api(MethodType(write, models), api_name="generate", concurrency_limit=None)
    return Tab(text, model, look_button)


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
            yield {"text": prompt, "versions": [], "figures": "Loading the model …", "settings": {}}
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
            yield {"text": prompt + best, "versions": results, "figures": writing.figures(),
                   "settings": settings}


async def show(models: Models, prompt: str, *values):
    """Runs `write` for the page: yields the values of its text, figures, request and versions."""
    *values, stop = values
    async for result in write(models, prompt or "", *values, stop_strings(stop)):
        # show a box for each version if there are several
        boxes = [gr.update(visible=False)] * MAX_VERSIONS
        if len(result["versions"]) > 1:
            for i, version in enumerate(result["versions"]):
                label = f"Version {i + 1} · {version['mean_logprob']:.3f} nats per token"
                boxes[i] = gr.update(visible=True, value=version["text"], label=label)
        # write the stop strings into the request as the page's box has them, one per line
        request = dict(result["settings"])
        if request:
            request["stop"] = "\n".join(s.replace("\n", "\\n") for s in request["stop"])
        yield result["text"], result["figures"], json.dumps(request) if request else "", *boxes
