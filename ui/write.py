"""The Write tab: a prompt, the text that a model makes of it while it is made, and what that took."""
import functools
import secrets
import time

import gradio as gr

from errors import UserError
from ui.models import Models, sentences

MAX_PROMPT = 20_000  # characters
MAX_LENGTH = 2_000  # tokens
REFRESH_S = 0.05  # the page is sent the text at most this often

EXAMPLES = ["ROMEO:\n", "First Citizen:\nBefore we proceed any further, hear me speak.\n", "KING RICHARD III:\nNow is the"]
WARNING = ("A base model continues a text; it does not answer questions. What it writes is invented and can be false or "
           "offensive.")


def build(models: Models):
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0], lines=3, max_lines=10, max_length=MAX_PROMPT, autofocus=True,
                                placeholder="Write a beginning; the model goes on.", elem_id="prompt")
            gr.Examples(EXAMPLES, prompt, label="Beginnings")
            with gr.Row():
                generate_button = gr.Button("Generate", variant="primary", min_width=90, elem_id="generate")
                continue_button = gr.Button("Continue", min_width=90, elem_id="continue")
                stop_button = gr.Button("Stop", variant="stop", min_width=90, elem_id="stop")
            text = gr.Textbox(label="Text", lines=14, max_lines=28, buttons=["copy"], interactive=True, elem_id="text",
                              info="Edit it freely; Continue starts from this text.")
            status = gr.Textbox(show_label=False, container=False, interactive=False, max_lines=4, elem_id="status",
                                placeholder="Time to the first token and tokens a second appear here.")
            gr.Markdown(WARNING)
        with gr.Column(scale=3, min_width=300):
            model = gr.Dropdown(models.names, value=models.names[0], label="Model", info="Loading …", elem_id="model")
            temperature = gr.Slider(0.1, 2.0, value=0.8, step=0.05, label="Temperature", elem_id="temperature",
                                    info="Low: the likeliest words. High: surprises.")
            top_k = gr.Slider(0, 200, value=0, step=1, precision=0, label="Top-k", elem_id="top-k",
                              info="Choose among the k likeliest tokens; 0 allows all.")
            length = gr.Slider(1, MAX_LENGTH, value=400, step=1, precision=0, label="Length", elem_id="length",
                               info="Tokens to write.")
            seed = gr.Number(value=42, precision=0, minimum=0, maximum=2**53, label="Seed", elem_id="seed",
                             info="The same seed and settings give the same text again.")
            fresh = gr.Checkbox(value=True, label="A new seed each time", elem_id="fresh")

    def next_seed(seed: int | None, fresh: bool) -> int:
        return secrets.randbits(32) if fresh or seed is None else seed

    def show_description(name: str):
        with sentences():
            return gr.update(info=models.describe(name))

    settings = [model, temperature, top_k, length, seed]
    events = []
    for triggers, start, api in (([generate_button.click, prompt.submit], prompt, {"api_name": "generate"}),
                                 ([continue_button.click], text, {"api_visibility": "private"})):
        picked = gr.on(triggers, next_seed, [seed, fresh], seed, api_visibility="private", show_progress="hidden")
        written = picked.then(functools.partial(write, models.engine), [start, *settings], [text, status], show_progress="hidden",
                              concurrency_limit=32, concurrency_id="engine", **api)
        events += [picked, written]
    stop_button.click(None, cancels=events)
    gr.on([model.change, gr.context.Context.root_block.load], show_description, model, model, api_visibility="private",
          show_progress="hidden")


def write(engine, prompt: str, model: str, temperature: float, top_k: int, length: int, seed: int | None):
    """Continues `prompt` and streams (the text so far, what it took)."""
    began = shown = time.perf_counter()
    prompt = prompt or ""
    seed = secrets.randbits(32) if seed is None else seed
    pieces, first = [prompt], None
    with sentences():
        if len(prompt) > MAX_PROMPT:
            raise UserError(f"The text has {len(prompt):,} characters, and the page takes {MAX_PROMPT:,}.")
        if not model:
            raise UserError("Choose a model first.")
        llm = engine(model)
        ids, notices = llm.encode(prompt)
        for piece in llm.stream(ids, max_new_tokens=length, temperature=temperature, top_k=top_k or None, seed=seed):
            pieces.append(piece)
            now = time.perf_counter()
            first = first or now
            if now - shown > REFRESH_S:
                shown = now
                yield "".join(pieces), measured(len(pieces) - 1, first - began, now - first, seed, notices)
    now = time.perf_counter()
    yield "".join(pieces), measured(len(pieces) - 1, (first or now) - began, now - (first or now), seed, notices)


def measured(tokens: int, first_s: float, rest_s: float, seed: int, notices: list[str]) -> str:
    """What a text took, in a line: the first token is the wait, the others the speed."""
    speed = f" · {(tokens - 1) / rest_s:,.0f} tokens/s" if tokens > 1 else ""
    return "  ".join([f"{tokens:,} tokens · first after {first_s * 1000:,.0f} ms{speed} · seed {seed}", *notices])
