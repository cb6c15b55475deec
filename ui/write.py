"""The Write tab: a prompt, the text that a model makes of it as it is made, and what that took."""
import secrets
import time

import gradio as gr

from errors import UserError

MAX_PROMPT = 20_000  # characters
MAX_LENGTH = 2_000  # tokens
REFRESH_S = 0.05  # the page is sent the text at most this often

EXAMPLES = ["ROMEO:\n", "First Citizen:\nBefore we proceed any further, hear me speak.\n", "KING RICHARD III:\nNow is the"]
WARNING = ("This is a base model: it continues a text, it does not answer questions. What it writes is invented, and can "
           "be false or offensive.")


def build(models: list[str], engine, describe):
    """Lays the tab out and connects it. `engine(name)` gives the engine of one of `models`, `describe(name)` a line on it."""
    prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0], lines=3, max_lines=12, max_length=MAX_PROMPT, autofocus=True,
                        placeholder="Write the beginning; the model goes on.", elem_id="prompt")
    with gr.Row():
        generate_button = gr.Button("Generate", variant="primary", elem_id="generate", min_width=90)
        continue_button = gr.Button("Continue", elem_id="continue", min_width=90)
        stop_button = gr.Button("Stop", variant="stop", elem_id="stop", min_width=90)
    text = gr.Textbox(label="Text", lines=14, max_lines=30, buttons=["copy"], interactive=True, elem_id="text",
                      info="Yours to edit: Continue goes on from what stands here.")
    status = gr.Textbox(show_label=False, container=False, interactive=False, lines=1, max_lines=4, elem_id="status",
                        placeholder="Time to the first token, tokens a second and the seed appear here.")
    with gr.Accordion("Settings", open=True):
        model = gr.Dropdown(models, value=models[0], label="Model", info=describe(models[0]), elem_id="model")
        with gr.Row():
            temperature = gr.Slider(0.1, 2.0, value=0.8, step=0.05, label="Temperature", elem_id="temperature",
                                    info="Low: the likeliest words. High: surprises.")
            top_k = gr.Slider(0, 200, value=0, step=1, label="Top-k", elem_id="top-k",
                              info="Choose among the k likeliest tokens; 0 allows all.")
            length = gr.Slider(1, MAX_LENGTH, value=400, step=1, label="Length", info="Tokens to write.", elem_id="length")
        with gr.Row():
            seed = gr.Number(value=42, precision=0, minimum=0, maximum=2**53, label="Seed", elem_id="seed",
                             info="The same seed and settings give the same text again.")
            fresh = gr.Checkbox(value=True, label="A new seed each time", elem_id="fresh")
    gr.Examples(EXAMPLES, prompt, label="Beginnings")
    gr.Markdown(WARNING)

    def write(prompt: str, model: str, temperature: float, top_k: int, length: int, seed: int | None):
        """Continues `prompt` and streams (the text so far, what it took)."""
        if len(prompt) > MAX_PROMPT:
            raise gr.Error(f"The text has {len(prompt):,} characters; the page takes {MAX_PROMPT:,}.", print_exception=False)
        seed = secrets.randbits(32) if seed is None else seed
        began = shown = time.perf_counter()
        pieces, notices = [prompt], []
        try:
            llm = engine(model)
            ids, notices = llm.encode(prompt)
            for piece in llm.stream(ids, max_new_tokens=length, temperature=temperature, top_k=top_k or None, seed=seed):
                pieces.append(piece)
                now = time.perf_counter()
                if len(pieces) == 2:
                    first = now
                if now - shown > REFRESH_S:
                    shown = now
                    yield "".join(pieces), measured(len(pieces) - 1, first - began, now - first, seed, notices)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        now = time.perf_counter()
        if len(pieces) == 1:
            first = now
        yield "".join(pieces), measured(len(pieces) - 1, first - began, now - first, seed, notices)

    def next_seed(seed, fresh):
        return secrets.randbits(32) if fresh or seed is None else seed

    settings = [model, temperature, top_k, length, seed]
    limits = {"concurrency_limit": 2, "concurrency_id": "engine"}
    picks, writes = [], []
    for triggers, start, api in (([generate_button.click, prompt.submit], prompt, {"api_name": "generate"}),
                                 ([continue_button.click], text, {"api_visibility": "private"})):
        picks.append(gr.on(triggers, next_seed, [seed, fresh], seed, api_visibility="private"))
        writes.append(picks[-1].then(write, [start, *settings], [text, status], show_progress="minimal", **limits, **api))
    stop_button.click(None, cancels=[*picks, *writes])
    model.change(lambda name: gr.update(info=describe(name)), model, model, api_visibility="private")


def measured(tokens: int, first_s: float, rest_s: float, seed: int, notices: list[str]) -> str:
    """What a text took, in a line: the first token counts as the wait, the others as the speed."""
    speed = f" · {(tokens - 1) / rest_s:,.0f} tokens/s" if tokens > 1 else ""
    return "  ".join([f"{tokens:,} tokens · first after {first_s * 1000:,.0f} ms{speed} · seed {seed}", *notices])
