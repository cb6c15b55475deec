"""The page: a GPT that goes on writing where you stop.

    python app.py                                            # http://127.0.0.1:7860, with the newest run or the bundled model
    python app.py --model log/shakespeare-char-cpu --port 8000

It assembles the tabs of ui/; each asks the sampling engine, as does OpenAI's API under /v1 (serve.py). Nothing is loaded from,
or reported to, anywhere else.
"""
import dataclasses
import os

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # read when gradio is imported
               "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000"}  # else it makes a table of its events at each of them

import gradio as gr
import tyro

import serve
from common.errors import report_user_errors
from engine.packed import use_allowed_cores
from generate import Dtype
from ui import about, chat, compare, look, training, write
from ui.models import Models


@dataclasses.dataclass
class AppConfig:
    """Opens the page."""

    model: str | None = os.environ.get("MODEL")  # as a Space may set it
    """bundled[:name], a run folder, a .pt, a Hugging Face folder or Hub id; the newest run or `bundled` when not given."""
    host: str = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Space sets these two
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    share: bool = False
    """Ask Gradio for a public link."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA; on a CPU int8 for models of 20 million parameters or more, and float32 for smaller ones."""


SESSIONS = 200  # visitors whose page the server remembers, at 150 kB each: Gradio would ten thousand
TABS = {"Write": write, "Chat": chat, "Look inside": look, "Compare": compare, "Training": training, "About": about}


def build(models: Models) -> gr.Blocks:
    with gr.Blocks(title="GPT-2 From Scratch", analytics_enabled=False) as page:
        gr.Markdown("# GPT-2 From Scratch\nA small language model and the whole road to it, from raw text to this page, in "
                    "plain PyTorch.")
        built = {}
        with gr.Tabs() as tabs:
            for name, tab in TABS.items():
                with gr.Tab(name, id=name):
                    built[name] = tab.build(models)
        built["Write"].look.click(lambda text: (text, gr.Tabs(selected="Look inside")), built["Write"].text,
                                  [built["Look inside"], tabs], api_visibility="private", show_progress="hidden")
        gr.api(models.list, api_name="models")
    return page


def main(config: AppConfig, **launch_options) -> gr.Blocks:
    serve.check_port(config.host, config.port)
    use_allowed_cores()
    models = Models(config.model, config.device, config.dtype)
    page = build(models)
    models.load_in_background()
    page.queue(max_size=64)
    api = serve.routes(models.names, models.engine)
    page.launch(server_name=config.host, server_port=config.port, share=config.share, theme=gr.themes.Default(),
                run_history=False, footer_links=["api"], ssr_mode=False, enable_monitoring=False,
                css="#about-card code { white-space: pre-wrap }", max_threads=100, state_session_capacity=SESSIONS,
                app_kwargs={"routes": api.routes}, **launch_options)
    return page


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(AppConfig))
