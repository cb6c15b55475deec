"""The page: a GPT that goes on writing where you stop.

    python app.py                                            # http://127.0.0.1:7860, with the newest run or the bundled model
    python app.py --model log/shakespeare-char-cpu --port 8000

It assembles the tabs of ui/; each asks the sampling engine, as does OpenAI's API under /v1 (serve.py). Nothing is loaded from,
or reported to, anywhere else.
"""
import dataclasses
import functools
import os
import socket

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import tyro

import checkpoint
import serve
from ddp import pick_device
from errors import UserError, one_sentence
from generate import Dtype, Engine
from kernels import use_allowed_cores
from ui import write


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


@functools.lru_cache(maxsize=2)  # the last two models stay in memory
def load(name: str, device: str, dtype: str) -> tuple[Engine, dict]:
    model, tokenizer, info = checkpoint.load_model(name, pick_device(device))
    return Engine(model, tokenizer, dtype), info


def model_names(config: AppConfig) -> list[str]:
    """The models that the page offers, the default first: the one asked for, the runs, the bundled ones."""
    bundled = [f"bundled:{name}" for name in checkpoint.list_bundled()]
    asked = bundled[:1] if config.model == "bundled" else [config.model] if config.model else []
    names = [*asked, *checkpoint.list_runs(), *bundled]
    if not names:
        raise UserError("There is no model to show: train one, or name one with --model.")
    return list(dict.fromkeys(names))


def describe(engine: Engine, info: dict) -> tuple[str, dict | None]:
    """(a line on the model, the configuration that it was trained with where that is known)."""
    return (f"{checkpoint.describe(info)}, reads {engine.block_size:,} tokens at a time; "
            f"{engine.dtype} on {engine.device}", info.get("train_config"))


def build(config: AppConfig) -> gr.Blocks:
    with gr.Blocks(title="GPT-2 From Scratch", analytics_enabled=False) as page:
        gr.Markdown("# GPT-2 From Scratch\nA small language model and the whole road to it, from raw text to this page, in "
                    "plain PyTorch.")
        write.build(model_names(config), engine=lambda name: load(name, config.device, config.dtype)[0],
                    describe=lambda name: describe(*load(name, config.device, config.dtype)))
    return page


def main(config: AppConfig, **launch_options) -> gr.Blocks:
    check_port(config.host, config.port)
    use_allowed_cores()
    page = build(config)
    page.queue(max_size=64)
    api = serve.routes(model_names(config), lambda name: load(name, config.device, config.dtype)[0])
    page.launch(server_name=config.host, server_port=config.port, share=config.share, theme=gr.themes.Default(),
                run_history=False, footer_links=["api"], ssr_mode=False, enable_monitoring=False,
                max_threads=100, app_kwargs={"routes": api.routes}, **launch_options)
    return page


def check_port(host: str, port: int):
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            if server.getsockname()[1] != port:  # 0 asks for any port
                raise OverflowError("ports are numbered from 1")
    except (OSError, OverflowError) as error:
        raise UserError(f"The page cannot listen on {host}:{port} ({error}): choose another --port or --host.") from None


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(AppConfig))
