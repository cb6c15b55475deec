"""The Compare tab: one prompt and one seed for two models, two precisions or two checkpoints, and
for all checkpoints of a run."""
import asyncio
import dataclasses
import os.path
from types import MethodType

import gradio as gr

import checkpoint
from common.errors import UserError
from ui import settings
from ui.models import DTYPES, Models
from ui.stream import Writing, follow

LENGTH = 200  # tokens of the two texts, by default
MAX_TIMELINE_LENGTH = 200  # tokens of a text in the timeline

# --------------------------------------------------------------------------------------------------
# The page

def build(models: Models):
    """Lays out the tab and connects its events."""
    # two texts
    prompt = gr.Textbox(models.beginnings(models.default)[0], label="Prompt", lines=3, max_lines=10,
                        max_length=settings.MAX_BYTES, elem_id="compare-prompt")
    chosen, dtypes = [], []
    with gr.Row():
        for i, (letter, dtype) in enumerate((("A", "float32"), ("B", "int8"))):
            chosen.append(gr.Dropdown(models.list_with_checkpoints(), value=models.default,
                                      label=f"Model {letter}", scale=3,
                                      elem_id=f"compare-model-{i}"))
            dtypes.append(gr.Dropdown(DTYPES, value=dtype, label=f"Precision {letter}",
                                      min_width=130, elem_id=f"compare-dtype-{i}"))
    with gr.Accordion("Settings", open=False, elem_id="compare-settings"), gr.Row():
        box = {"tab": "compare-", "info": None, "min_width": 220}
        sliders = [settings.slider(name, **box) for name in settings.SAMPLING]
        sliders += [settings.slider("length", value=LENGTH, **box), settings.slider("seed", **box)]
    with gr.Row():
        start = gr.Button("Compare", variant="primary", min_width=120, elem_id="compare")
        stop = gr.Button("Stop", variant="stop", min_width=120, visible=False,
                         elem_id="compare-stop")
    figures = settings.plain_box("Figures", "compare-status", settings.TEXTS["compare"])
    with gr.Row():
        texts = [gr.HTML(min_width=300, elem_id=f"side-{i}") for i in range(2)]

    # all checkpoints of a run
    gr.Markdown(settings.TEXTS["timeline"])
    no_run = gr.Markdown(settings.TEXTS["no run"])
    with gr.Column(visible=False) as column:
        run = gr.Dropdown([], label="Run", elem_id="timeline-run")
        with gr.Row():
            start_all = gr.Button("Write with every checkpoint", elem_id="timeline")
            stop_all = gr.Button("Stop", variant="stop", visible=False, elem_id="timeline-stop")
    table = gr.Dataframe(headers=["step", "loss", "text"], column_widths=["20%", "20%", "60%"],
                         interactive=False, wrap=True, visible=False, buttons=["copy"],
                         elem_id="timeline-table")

    # writing
    connect(start, stop, MethodType(side_by_side, models), [prompt, *chosen, *dtypes, *sliders],
            [*texts, figures])
    connect(start_all, stop_all, MethodType(rows, models), [prompt, run, *sliders], table)

    def update_runs():
        runs = checkpoint.list_runs()
        return (gr.Dropdown(runs, value=runs[0] if runs else None),
                gr.Column(visible=bool(runs)), gr.Markdown(visible=not runs))

    # without triggers: when the page opens, as a run may have saved its first checkpoint
    gr.on(fn=update_runs, outputs=[run, column, no_run], **settings.QUIET)


def connect(start: gr.Button, stop: gr.Button, write, inputs: list, outputs):
    """Lets one button start the writing and another, which is visible meanwhile, stop it."""
    shown = start.click(lambda: gr.update(visible=True), None, stop, **settings.QUIET)
    running = shown.then(write, inputs, outputs, concurrency_limit=None, **settings.QUIET)
    stop.click(None, cancels=running)
    for ended in stop.click, running.then:
        ended(lambda: gr.update(visible=False), None, stop, **settings.QUIET)


# --------------------------------------------------------------------------------------------------
# Two texts

async def compare(models: Models, prompt: str, model: str, other_model: str,
                  dtype: str | None = None, other_dtype: str | None = None,
                  temperature: float = settings.TEMPERATURE, top_k: int = settings.TOP_K,
                  top_p: float = settings.TOP_P, length: int = LENGTH,
                  seed: int | None = None) -> dict:
    """Continues a text twice with the same random numbers and streams both results.

    Args:
        prompt: The text to continue.
        model: A name from /models, or the path of a run's checkpoint.
        other_model: The second model; may be the same one with another precision.
        dtype: The first model's precision. Default: the page's.
        other_dtype: The second model's precision. Default: the page's.
        temperature: Lower is more predictable, higher is more surprising.
        top_k: Sample from the k most likely tokens; 0 is all of them.
        top_p: Sample from the smallest set of tokens with this total probability.
        length: Number of tokens to write.
        seed: The same seed and settings give the same texts. Default: a random one.

    Returns:
        A stream of dicts with these keys:
        "texts": The two continuations.
        "agree": The number of characters at their beginning that are equal.
        "names": The model and the precision of each, such as "bundled:stories · float32".
        "figures": Length and speed of each, as a sentence for people.
    """
    sampling = settings.validate(prompt, temperature, top_k, top_p, length, seed)

    # load both models at the same time
    chosen = [(model, dtype), (other_model, other_dtype)]
    if not all([models.future(*one).done() for one in chosen]):
        yield {"texts": ["", ""], "agree": 0, "names": [model, other_model],
               "figures": ["Loading the models …"] * 2}
    loaded = await asyncio.gather(*(models.wait_for(*one) for one in chosen))

    names = [f"{name} · {engine.dtype}" for (name, _), (engine, _) in zip(chosen, loaded)]
    writings = [Writing(engine, engine.encode(prompt), sampling) for engine, _ in loaded]
    async for _ in follow(*writings):
        texts = [writing.texts[0] for writing in writings]
        agree = len(os.path.commonprefix(texts))  # noqa: RUF071 (they are not paths)
        yield {"texts": texts, "agree": agree, "names": names,
               "figures": [writing.figures() for writing in writings]}


async def side_by_side(models: Models, prompt: str, *values):
    """Runs `compare` for the page: yields the two texts as HTML, and the figures."""
    async for result in compare(models, prompt, *values):
        texts, agree = result["texts"], result["agree"]
        lines = [f"{letter}: {figures}" for letter, figures in zip("AB", result["figures"])]
        # a text that is only ahead of the other does not differ yet
        parted = agree < min(map(len, texts))
        if parted:
            lines.insert(0, f"Identical for the first {agree:,} characters, then they part.")
        elif any(texts):
            lines.insert(0, f"Identical so far: {agree:,} characters.")
        shared = agree if parted else max(map(len, texts))
        sides = [settings.HTML.side(letter, name, prompt, text[:shared], text[shared:])
                 for letter, name, text in zip("AB", result["names"], texts)]
        yield *sides, "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# All checkpoints of a run

async def timeline(models: Models, prompt: str, run: str,
                   temperature: float = settings.TEMPERATURE, top_k: int = settings.TOP_K,
                   top_p: float = settings.TOP_P, length: int = 100,
                   seed: int | None = None) -> list[dict]:
    """Continues a text with every checkpoint of a run, with the same random numbers, and streams
    the results.

    Args:
        prompt: The text to continue.
        run: A run from /models.
        temperature: Lower is more predictable, higher is more surprising.
        top_k: Sample from the k most likely tokens; 0 is all of them.
        top_p: Sample from the smallest set of tokens with this total probability.
        length: Number of tokens to write, at most 200.
        seed: The same seed and settings give the same texts. Default: a random one.

    Returns:
        A stream of lists, one dict per checkpoint, the oldest first: "step", "val_loss", "text".
    """
    sampling = settings.validate(prompt, temperature, top_k, top_p, length, seed)
    sampling = dataclasses.replace(sampling, max_new_tokens=min(length, MAX_TIMELINE_LENGTH))
    checkpoints = models.checkpoints(run)
    if not checkpoints:
        raise UserError("Choose a run from the list; if it has just started, wait for its "
                        "first checkpoint.")

    lines = []
    for step, name in checkpoints.items():
        line = {"step": step, "val_loss": None, "text": ""}
        lines.append(line)
        yield lines
        # load it without keeping it in memory
        engine, info = await asyncio.wrap_future(models.start_loading(name, models.dtype))
        line["val_loss"] = info.get("val_loss")
        writing = Writing(engine, engine.encode(prompt), sampling)
        async for _ in follow(writing):
            line["text"] = writing.texts[0]
            yield lines


async def rows(models: Models, prompt: str, run: str, *values):
    """Runs `timeline` for the page: yields the rows of its table."""
    async for lines in timeline(models, prompt, run, *values):
        losses = ["" if line["val_loss"] is None else f"{line['val_loss']:.3f}" for line in lines]
        table = [[line["step"], loss, line["text"]] for line, loss in zip(lines, losses)]
        yield gr.Dataframe(table, visible=True)
