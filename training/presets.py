"""The presets, each a set of defaults for train.py, and the recipe that speeds them up."""
from dataclasses import replace
from pathlib import Path

from training.config import TrainConfig

# GPT-3 paper (arXiv 2005.14165), table 2.1 and appendix B: batches of 0.5M tokens, learning rate
# 6e-4, betas 0.9 and 0.95, clipping at 1.0, weight decay 0.1, and a warm-up of 375M tokens (715
# steps). 10B tokens are 19,073 steps. All of these are TrainConfig's defaults.
GPT2_124M = TrainConfig(name="gpt2-124m", vocab_size=50_304, hellaswag="auto", samples=4)

# nanoGPT's baby GPT (with biases): 5,000 steps of 64 sequences of 256 characters.
SHAKESPEARE_CHAR = TrainConfig(
    name="shakespeare-char", data=Path("data/tiny_shakespeare_char"),
    n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
    batch_tokens=64 * 256, max_steps=5000, learning_rate=1e-3, warmup_steps=100, beta2=0.99,
    eval_every=250, sample_every=500, save_every=500, sample_prompt="ROMEO:\n")

# The same text on two CPU cores, where few layers, small batches and Muon lower the loss fastest.
SHAKESPEARE_CHAR_CPU = replace(
    SHAKESPEARE_CHAR, name="shakespeare-char-cpu",
    n_layer=2, n_head=3, n_embd=96, block_size=64, dropout=0.0,
    batch_tokens=12 * 64, micro_batch=12, max_steps=1000,
    optimizer="muon", learning_rate=1e-2, warmup_steps=20, min_lr_ratio=0.0,
    eval_every=200, eval_tokens=20 * 12 * 64)

PUSHKIN_CHAR = replace(
    SHAKESPEARE_CHAR, name="pushkin-char", data=Path("data/tiny_pushkin_char"),
    sample_prompt="Я вас любил")

# --------------------------------------------------------------------------------------------------
# Fine-tuning

FINETUNE = TrainConfig(
    name="finetune", data=Path("data/finetune"), init_from="bundled", dropout=0.1,
    batch_tokens=32 * 1024, micro_batch=8, max_steps=200,
    learning_rate=3e-5, schedule="constant", warmup_steps=0,
    eval_every=20, sample_every=100, save_every=100)

# OpenAI's GPT-2 for two epochs of tiny Shakespeare, as in nanoGPT, or three of tiny Pushkin.
FINETUNE_SHAKESPEARE = replace(
    FINETUNE, name="finetune-shakespeare", init_from="gpt2",
    data=Path("data/tiny_shakespeare_gpt2"), max_steps=20, eval_every=5)
FINETUNE_PUSHKIN = replace(
    FINETUNE, name="finetune-pushkin", init_from="gpt2",
    data=Path("data/tiny_pushkin_gpt2"), max_steps=100, sample_prompt="Я вас любил")

# --------------------------------------------------------------------------------------------------
# The models in assets/bundled, trained on two CPU cores

SHAKESPEARE_BUNDLED = replace(
    SHAKESPEARE_CHAR, name="shakespeare-bundled",
    n_layer=4, n_head=6, n_embd=192, dropout=0.1,
    batch_tokens=8 * 256, micro_batch=8, max_steps=4500,
    optimizer="muon", learning_rate=3e-3, min_lr_ratio=0.02)

PUSHKIN_BUNDLED = replace(
    SHAKESPEARE_BUNDLED, name="pushkin-bundled",
    data=Path("data/tiny_pushkin_char"), dropout=0.0, max_steps=1600,
    learning_rate=6e-3, schedule="wsd", min_lr_ratio=0.0, sample_prompt="Я вас любил")

EDU_BUNDLED = TrainConfig(
    name="edu-bundled", data=Path("data/edu_corpus_bpe-4096"),
    n_layer=6, n_head=6, n_embd=192, block_size=256,
    batch_tokens=16 * 256, micro_batch=16, max_steps=5000,
    optimizer="muon", learning_rate=8e-3, schedule="wsd", warmup_steps=50, min_lr_ratio=0.0,
    eval_every=100, eval_tokens=2**16, sample_every=500, save_every=50,
    sample_prompt="The history of")

# Simple stories, read in the order of examples/bundled_text.py: some easy classics come first.
STORIES_BUNDLED = replace(
    EDU_BUNDLED, name="stories-bundled",
    data=Path("data/stories_bpe-4096"), order="sequential",
    n_layer=4, n_head=4, n_embd=256, block_size=512, micro_batch=8,
    max_steps=2400, embedding_rate=4.0,
    eval_every=200, eval_tokens=2**15, sample_every=400, save_every=200,
    sample_prompt="Once upon a time")

# Small talk, from the storyteller's weights.
CHAT_BUNDLED = replace(
    STORIES_BUNDLED, name="chat-bundled",
    data=Path("data/chat_bpe-4096"), order="shuffled", init_from="bundled:stories",
    batch_tokens=16 * 512, max_steps=640, learning_rate=5e-3, warmup_steps=20, decay_ratio=0.8,
    eval_every=100, save_every=50, sample_every=300, sample_prompt="User: Hi! How are you?")

PRESETS = {preset.name: preset for preset in (
    GPT2_124M, SHAKESPEARE_CHAR, SHAKESPEARE_CHAR_CPU, SHAKESPEARE_BUNDLED,
    PUSHKIN_CHAR, PUSHKIN_BUNDLED, STORIES_BUNDLED, CHAT_BUNDLED, EDU_BUNDLED,
    FINETUNE, FINETUNE_SHAKESPEARE, FINETUNE_PUSHKIN)}

# --------------------------------------------------------------------------------------------------
# --recipe fast


def fast_recipe(config: TrainConfig) -> TrainConfig:
    """A preset for AdamW, changed to train with Muon in half of the steps (benchmarks/recipes)."""
    return replace(
        config, optimizer="muon", learning_rate=2 * config.learning_rate, embedding_rate=4.0,
        max_steps=round(0.5 * config.max_steps), warmup_steps=round(0.5 * config.warmup_steps))
