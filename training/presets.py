"""The presets, each a set of defaults for a run, and recipes that change them."""
import dataclasses
from pathlib import Path

from training.config import TrainConfig

# GPT-3 paper, table 2.1 and appendix B: 0.5M tokens a batch, 6e-4, betas 0.9 and 0.95, clip 1.0, decay 0.1; its warm-up
# of 375M tokens is 715 steps, and 19,073 steps are 10B tokens.
GPT2_124M = TrainConfig(vocab_size=50_304, hellaswag="auto", samples=4)

# nanoGPT's baby GPT (with biases), 5000 steps of 64 x 256 characters.
SHAKESPEARE_CHAR = TrainConfig(
    data=Path("data/tiny_shakespeare_char"), n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
    batch_tokens=64 * 256, max_steps=5000, learning_rate=1e-3, warmup_steps=100, beta2=0.99,
    eval_every=250, sample_every=500, save_every=500, sample_prompt="ROMEO:\n")

# The same text for two CPU cores, where few layers, small batches and Muon bring the loss down soonest.
SHAKESPEARE_CHAR_CPU = dataclasses.replace(
    SHAKESPEARE_CHAR, n_layer=2, n_head=3, n_embd=96, block_size=64, dropout=0.0, batch_tokens=12 * 64, micro_batch=12,
    max_steps=1000, optimizer="muon", learning_rate=1e-2, warmup_steps=20, min_lr_ratio=0.0, eval_every=200,
    eval_tokens=20 * 12 * 64)

PRESETS = {
    "gpt2-124m": GPT2_124M,
    "shakespeare-char": SHAKESPEARE_CHAR,
    "shakespeare-char-cpu": SHAKESPEARE_CHAR_CPU,
    "shakespeare-bundled": dataclasses.replace(  # assets/bundled/shakespeare, under 4 MB in float16
        SHAKESPEARE_CHAR, n_layer=4, n_head=6, n_embd=192, batch_tokens=8 * 256, micro_batch=8, dropout=0.1, max_steps=4500,
        optimizer="muon", learning_rate=3e-3, min_lr_ratio=0.02),
    "pushkin-char": dataclasses.replace(SHAKESPEARE_CHAR, data=Path("data/tiny_pushkin_char"), sample_prompt="Я вас любил"),
    "finetune": TrainConfig(
        data=Path("data/finetune"), init_from="bundled", batch_tokens=32 * 1024, micro_batch=8, max_steps=200,
        learning_rate=3e-5, schedule="constant", warmup_steps=0, dropout=0.1, eval_every=20, sample_every=100,
        save_every=100),
}
PRESETS |= {  # two epochs, as nanoGPT's, and three
    "finetune-shakespeare": dataclasses.replace(
        PRESETS["finetune"], init_from="gpt2", data=Path("data/tiny_shakespeare_gpt2"), max_steps=20, eval_every=5),
    "finetune-pushkin": dataclasses.replace(
        PRESETS["finetune"], init_from="gpt2", data=Path("data/tiny_pushkin_gpt2"), max_steps=100, sample_prompt="Я вас любил"),
}

# Models that lie in assets/bundled, trained on two cores.
PRESETS |= {
    "edu-bundled": TrainConfig(
        data=Path("data/edu_corpus_bpe-4096"), n_layer=6, n_head=6, n_embd=192, block_size=256, batch_tokens=16 * 256,
        micro_batch=16, max_steps=5000, optimizer="muon", learning_rate=8e-3, schedule="wsd", warmup_steps=50, min_lr_ratio=0.0,
        eval_every=100, eval_tokens=2**16, sample_every=500, save_every=50, sample_prompt="The history of"),
    "pushkin-bundled": dataclasses.replace(
        PRESETS["shakespeare-bundled"], data=Path("data/tiny_pushkin_char"), dropout=0.0, max_steps=1600, learning_rate=6e-3,
        schedule="wsd", min_lr_ratio=0.0, sample_prompt="Я вас любил"),
}


def fast(config: TrainConfig) -> TrainConfig:
    """The recipe that won in benchmarks/recipes, for a configuration made for AdamW."""
    return dataclasses.replace(config, optimizer="muon", learning_rate=2 * config.learning_rate, embedding_rate=4.0,
                               max_steps=round(0.5 * config.max_steps), warmup_steps=round(0.5 * config.warmup_steps))


RECIPES = {"fast": fast}
