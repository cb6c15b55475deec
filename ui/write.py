"""The Write tab: one text, which the model continues in place.

The page itself keeps what was asked for last, in `made`: from it come Regenerate, the link and the downloads. The server keeps
nothing.
"""
import json
import secrets
from types import MethodType
from typing import NamedTuple

import gradio as gr

from ui.models import Models, sentences
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

WARNING = ("A base model continues a text; it does not answer questions. What it writes is invented and can be false or "
           "offensive.")
SETTINGS = ["model", "dtype", "temperature", "top_k", "top_p", "length", "seed", "versions", "stop"]

# What the browser does by itself. An event's functions get the values of its inputs, and return those of its outputs.
ANY = "Math.floor(Math.random() * 2 ** 32)"
BEGIN = """(text, made, seed, fresh) => {
    const prompt = made && !window.edited && %s ? JSON.parse(made).prompt : text;
    window.edited = false;
    return [text.startsWith(prompt) ? prompt : text, %s];
}"""
FROM_PROMPT, FROM_TEXT = BEGIN % ("true", f"fresh ? {ANY} : seed"), BEGIN % ("false", f"fresh ? {ANY} : seed")
OTHER_SEED = BEGIN % ("true", ANY)
STOP = "document.querySelectorAll('#stop, #chat-stop, #compare-stop').forEach(button => button.click())"
LINK = """made => made ? location.href.split('#')[0] + '#' + encodeURIComponent(made) : ''"""
FROM_LINK = f"""(...values) => {{
    onhashchange = () => location.reload();
    document.addEventListener('keydown', event => {{ if (event.key == 'Escape') {STOP}; }});
    document.addEventListener('input', event => {{ window.edited ||= Boolean(event.target.closest('#text')); }});
    try {{
        const said = JSON.parse(decodeURIComponent(location.hash.slice(1)));
        return {["prompt", *SETTINGS]}.map((name, i) => said[name] ?? values[i]).concat(location.hash);
    }} catch {{ return values; }}
}}"""
DOWNLOAD = """(text, made) => {
    const all = made && !window.edited ? {...JSON.parse(made), text} : {text}, kind = '%s';
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([kind == 'json' ? JSON.stringify(all, null, 2) : text], {type: 'text/plain'}));
    link.download = 'text.' + kind;
    link.click();
    return [];
}"""


class Tab(NamedTuple):
    text: gr.Textbox
    model: gr.Dropdown
    look: gr.Button  # app.py connects it with the tab that looks inside


def build(models: Models) -> Tab:
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            text = gr.Textbox(models.beginning(), label="Text", lines=14, max_lines=28, max_length=MAX_BYTES, autofocus=True,
                              buttons=["copy"], elem_id="text", placeholder="Write a beginning; the model goes on.",
                              info="Edit it freely; Shift+Enter generates, Escape stops.")
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
                go_on = gr.Button("Continue", min_width=120, elem_id="continue")
                again = gr.Button("Regenerate", min_width=120, elem_id="regenerate")
                stop_button = gr.Button("Stop", variant="stop", min_width=120, elem_id="stop")
            figures = figures_box("status", "Time to the first token and tokens a second appear here.")
            with gr.Row():
                uses = [gr.Button("Use", size="sm") for _ in range(RANGES["versions"][1])]
                versions = [gr.Textbox(visible=False, lines=8, max_lines=16, min_width=220, buttons=["copy", use],
                                       interactive=False, elem_id=f"version-{i}") for i, use in enumerate(uses)]
            look = gr.Button("Look inside this text", size="sm", elem_id="look")
            beginnings = gr.Column()
            gr.Markdown(WARNING)
        with gr.Column(scale=3, min_width=300):
            model = model_box(models)
            with beginnings:
                gr.Examples(models.examples(), [text, model], label="Beginnings")
            sliders = [slider(name) for name in ("temperature", "top_k", "top_p", "length")]
            seed = slider("seed")
            fresh = gr.Checkbox(value=True, label="A new seed each time", elem_id="fresh")
            with gr.Accordion("More", open=False, elem_id="more"):
                count = slider("versions")
                stop = gr.Textbox(label="Stop strings", lines=2, elem_id="stops",
                                  info="One a line, \\n in it a line break: a text ends before the first of them.")
                dtype = gr.Dropdown(DTYPES, value=models.dtype, label="Precision", elem_id="dtype")
            with gr.Accordion("Keep", open=False, elem_id="keep"):
                link = gr.Textbox(label="Link", buttons=["copy"], interactive=False, max_lines=2, elem_id="link",
                                  info="It holds prompt, settings and seed, and writes the same text again.")
                with gr.Row():
                    downloads = [gr.Button(f"Download {kind}", size="sm") for kind in ("txt", "json")]
    made = gr.Textbox(visible="hidden", elem_id="made")
    opened = gr.Textbox(visible="hidden")

    settings = [model, dtype, *sliders, seed, count, stop]
    run = {"fn": MethodType(show, models), "inputs": [text, *settings], "outputs": [text, figures, made, *versions],
           "api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    events = [opened.change(**run)]
    for triggers, js in (([generate.click, text.submit], FROM_PROMPT), ([go_on.click], FROM_TEXT), ([again.click], OTHER_SEED)):
        picked = gr.on(triggers, None, [text, made, seed, fresh], [text, seed], js=js)
        events.append(picked.then(**run))
    stop_button.click(None, cancels=events)
    made.change(None, made, link, js=LINK)
    for use, version in zip(uses, versions):
        use.click(None, [made, version], text, js="(made, version) => JSON.parse(made).prompt + version")
    for kind, button in zip(("txt", "json"), downloads):
        button.click(None, [text, made], [], js=DOWNLOAD % kind)
    gr.context.Context.root_block.load(None, [text, *settings, opened], [text, *settings, opened], js=FROM_LINK)
    gr.api(MethodType(write, models), api_name="generate", concurrency_limit=None)
    return Tab(text, model, look)


async def write(models: Models, prompt: str = "", model: str | None = None, dtype: str | None = None,
                temperature: float = default_of("temperature"), top_k: int = default_of("top_k"), top_p: float = default_of("top_p"),
                length: int = default_of("length"), seed: int | None = None, versions: int = default_of("versions"),
                stop: list[str] | None = None) -> dict:
    """Continues a text, and streams what there is of it: "text", the prompt with its continuation (of several the likeliest, once
    all have ended); "versions", for each its text, tokens, mean_logprob (nats, where there are several) and why it ended;
    "figures", what it took; "settings", which give the same again. The models are those of /models, the first when none is named;
    the precision is the page's; the seed a random one; a version ends before the first of at most four stop strings."""
    with sentences():
        model, seed = model or models.names[0], secrets.randbits(32) if seed is None else seed
        sampling = validate_settings(prompt, stop or [], temperature=temperature, top_k=top_k, top_p=top_p, length=length, seed=seed,
                           versions=versions)
        if not models.future(model, dtype).done():
            yield {"text": prompt, "versions": [], "figures": "Loading the model …", "settings": {}}
        loaded = await models.wait_for(model, dtype)
        writing = Writing(loaded, prompt, sampling, versions)
        values = model, loaded.engine.dtype, temperature, top_k, top_p, length, seed, versions, stop or []
        asked = {"prompt": prompt, **dict(zip(SETTINGS, values))}
        async for _ in follow(writing):
            told = [{"text": writing.texts[i], "tokens": writing.tokens[i], "reason": writing.reasons[i],
                     "mean_logprob": writing.mean_logprob(i) if versions > 1 else None} for i in writing.ranked()]
            best = told[0]["text"] if versions == 1 or writing.done else ""
            yield {"text": prompt + best, "versions": told, "figures": writing.figures(), "settings": asked}


async def show(models: Models, prompt: str, *values):
    """`write` for the page's components."""
    *values, stop = values
    async for said in write(models, prompt or "", *values, stop_strings(stop)):
        told, made = said["versions"], said["settings"]
        boxes = [gr.update(visible=False)] * RANGES["versions"][1]
        if len(told) > 1:
            boxes[:len(told)] = [gr.update(visible=True, value=each["text"], label=f"{i}: {each['mean_logprob']:.3f} a token")
                                 for i, each in enumerate(told, 1)]
        stops = {"stop": "\n".join(s.replace("\n", "\\n") for s in made["stop"])} if made else {}
        yield said["text"], said["figures"], json.dumps({**made, **stops}) if made else "", *boxes
