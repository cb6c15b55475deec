"""The Compare tab: one prompt and the same random draws for two models, precisions or checkpoints; and for all of a run's
checkpoints, a line each."""
import asyncio
import dataclasses
import itertools
import secrets
from types import MethodType

import gradio as gr

from common.errors import UserError
from ui.models import Models, sentences
from ui.stream import DTYPES, MAX_BYTES, Writing, default_of, figures_box, follow, slider, validate_settings

MAX_LINE = 200  # tokens that a checkpoint of the timeline writes


def build(models: Models):
    """Lays the tab out and connects it."""
    prompt = gr.Textbox(models.beginning(), label="Prompt", lines=3, max_lines=10, max_length=MAX_BYTES, elem_id="compare-prompt")
    with gr.Row():
        sliders = [slider(name, "compare-", info=None, **changes) for name, changes in (
            ("temperature", {}), ("top_k", {}), ("top_p", {}), ("length", {"value": 200}), ("seed", {}))]
    names = models.with_checkpoints()
    with gr.Row():
        one, one_dtype, other, other_dtype = (each for i, label in enumerate(("One", "The other")) for each in (
            gr.Dropdown(names, value=models.names[0], label=label, scale=3, elem_id=f"compare-model-{i}"),
            gr.Dropdown(DTYPES, value=["float32", "int8"][i], label="Precision", min_width=110, elem_id=f"compare-dtype-{i}")))
    with gr.Row():
        start = gr.Button("Compare", variant="primary", min_width=120, elem_id="compare")
        stop = gr.Button("Stop", variant="stop", min_width=120, elem_id="compare-stop")
    with gr.Row():
        texts = [gr.Textbox(label=label, lines=10, max_lines=24, interactive=False, min_width=300, buttons=["copy"],
                            elem_id=f"side-{i}") for i, label in enumerate(("One", "The other"))]
    figures = figures_box("compare-status", "How far the two agree appears here.")
    gr.Markdown("### A run through time\nThe same prompt, settings and draws at every checkpoint that the run has kept.")
    run = gr.Dropdown(runs(models), label="Run", elem_id="timeline-run")
    show_all = gr.Button("Write with each", elem_id="timeline")
    table = gr.Dataframe(headers=["step", "loss", "text"], interactive=False, wrap=True, column_widths=["20%", "20%", "60%"],
                         buttons=["copy"], elem_id="timeline-table")

    options = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    events = [start.click(MethodType(side_by_side, models), [prompt, one, other, one_dtype, other_dtype, *sliders],
                          [*texts, figures], **options),
              show_all.click(MethodType(rows, models), [prompt, run, *sliders], table, **options)]
    stop.click(None, cancels=events)
    page = gr.context.Context.root_block
    page.load(lambda: [*[gr.update(choices=models.with_checkpoints())] * 2,
                       gr.update(choices=(found := runs(models)), value=next(iter(found), None))],
              None, [one, other, run], api_visibility="private", show_progress="hidden")
    gr.api(MethodType(compare, models), api_name="compare", concurrency_limit=None)
    gr.api(MethodType(timeline, models), api_name="timeline", concurrency_limit=None)


def runs(models: Models) -> list[str]:
    return [name for name in models.list() if models.checkpoints(name)]


async def compare(models: Models, prompt: str, model: str, other_model: str, dtype: str | None = None,
                  other_dtype: str | None = None, temperature: float = default_of("temperature"), top_k: int = default_of("top_k"),
                  top_p: float = default_of("top_p"), length: int = 200, seed: int | None = None) -> dict:
    """Continues a text twice with the same random draws: by two models, two checkpoints of a run, or one model in two precisions.
    Streams "texts", the two continuations; "agree", with how many characters they begin alike; "figures" of each, in words."""
    with sentences():
        seed = secrets.randbits(32) if seed is None else seed
        sampling = validate_settings(prompt, temperature=temperature, top_k=top_k, top_p=top_p, length=length, seed=seed)
        futures = models.future(model, dtype), models.future(other_model, other_dtype)
        if not all(future.done() for future in futures):
            yield {"texts": ["", ""], "agree": 0, "figures": ["Loading the models …"] * 2}
        pair = [await asyncio.shield(asyncio.wrap_future(future)) for future in futures]
        writings = [Writing(loaded, prompt, sampling) for loaded in pair]
        async for _ in follow(*writings):
            texts = [writing.texts[0] for writing in writings]
            agree = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts)))
            yield {"texts": texts, "agree": agree, "figures": [writing.figures() for writing in writings]}


async def side_by_side(models: Models, prompt: str, *values):
    """`compare` for the page's components."""
    async for said in compare(models, prompt or "", *values):
        alike = f"Alike for the first {said['agree']:,} characters; one other token changes all after it."
        lines = [f"{label}: {line}" for label, line in zip(("One", "The other"), said["figures"])]
        yield *[(prompt or "") + text for text in said["texts"]], "\n".join([alike * any(said["texts"]), *lines])


async def timeline(models: Models, prompt: str, run: str, temperature: float = default_of("temperature"), top_k: int = default_of("top_k"),
                   top_p: float = default_of("top_p"), length: int = 100, seed: int | None = None) -> list[dict]:
    """Continues a text with each checkpoint that a run has kept, with the same random draws. Streams a list of {"step",
    "val_loss", "text"}, the oldest first; a text has at most 200 tokens here."""
    with sentences():
        seed, lines = secrets.randbits(32) if seed is None else seed, []
        sampling = validate_settings(prompt, temperature=temperature, top_k=top_k, top_p=top_p, length=length, seed=seed)
        sampling = dataclasses.replace(sampling, max_new_tokens=min(length, MAX_LINE))
        names = models.checkpoints(run)
        if not names:
            raise UserError("Choose a run of the list: it has no checkpoint yet, or it is not ours.")
        for step, name in names.items():
            lines.append({"step": step, "val_loss": None, "text": ""})
            yield lines
            loaded = await asyncio.wrap_future(models.start_loading(name, models.dtype))  # it is not kept: nobody else needs it
            lines[-1]["val_loss"], writing = loaded.info.get("val_loss"), Writing(loaded, prompt, sampling)
            async for _ in follow(writing):
                lines[-1]["text"] = writing.texts[0]
                yield lines


async def rows(models: Models, prompt: str, run: str, *values):
    """`timeline` for the page's components."""
    async for lines in timeline(models, prompt or "", run or "", *values):
        yield [[line["step"], "" if line["val_loss"] is None else f"{line['val_loss']:.3f}", line["text"]] for line in lines]
