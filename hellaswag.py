"""HellaSwag: which of four endings does a model find most likely? Also the perplexity of a text.

    python hellaswag.py -m gpt2 -d cuda               # both protocols, beside the published results
    python hellaswag.py -m bundled --data hellaswag_val.jsonl.gz --limit 500 --protocol nanogpt
    python hellaswag.py -m gpt2 --text novel.txt      # nats per token, perplexity, bits per byte

There are two protocols, and their results are not comparable:

`nanogpt`   build-nanogpt's. The context is used as it is; context and ending are tokenized
            separately. acc_norm divides an ending's log-likelihood by its number of tokens.
`harness`   lm-evaluation-harness's. WikiHow's markup is removed, and the activity label precedes
            the context; context and ending are tokenized together. acc_norm divides by the ending's
            number of characters.

In both, acc chooses the ending with the highest log-likelihood and does not divide.

Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?" (arXiv 1905.07830).
"""
import dataclasses
import gzip
import math
import re
import time
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

from common.program import report_user_errors

import torch
import tyro
from tqdm import tqdm

import ddp
from checkpoint import describe
from common.errors import UserError, check_range
from common.files import parse_json, read_text, write_json
from corpus.sources import DATA, fetch
from engine.likelihood import encode, fit_to_context, log_likelihoods, perplexity
from generate import Dtype, ModelConfig
from model import GPT
from tokenizer import Tokenizer, without_surrogates

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
VALIDATION_EXAMPLES = 10_042

# (acc, acc_norm) of both protocols, from the comments at the top of build-nanogpt's hellaswag.py
PUBLISHED = {
    "nanogpt": {"OpenAI's GPT-2 124M": (0.2859, 0.2955), "OpenAI's GPT-2 XL": (0.3842, 0.4893)},
    "harness": {"OpenAI's GPT-2 124M": (0.2892, 0.3114), "OpenAI's GPT-2 XL": (0.4004, 0.5089)}}
GPT3_ACC_NORM = "0.337"  # GPT-3 paper, table H.1


# --------------------------------------------------------------------------------------------------
# The two protocols

class TokenizedExample(NamedTuple):
    """A context and its endings in token ids."""
    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # of the endings, by which acc_norm divides: tokens or characters


def tokenize_nanogpt(example: dict, tokenizer: Tokenizer) -> TokenizedExample:
    context = encode(tokenizer, example["ctx"])
    endings = [encode(tokenizer, f" {ending}") for ending in example["endings"]]
    return TokenizedExample(context, endings, [len(ids) for ids in endings])


def tokenize_harness(example: dict, tokenizer: Tokenizer) -> TokenizedExample:
    if "ctx_a" in example:
        context = f"{example['ctx_a']} {example['ctx_b'].capitalize()}"
        context = remove_markup(f"{example['activity_label']}: {context}")
        endings = [remove_markup(ending) for ending in example["endings"]]
    else:  # a derived file, whose texts have no markup
        context = f"{example['activity_label']}: {example['ctx']}"
        endings = example["endings"]
    # spaces at the end of the context belong to the endings
    context_ids = encode(tokenizer, context.rstrip())
    ending_ids = []
    for ending in endings:
        ids = encode(tokenizer, f"{context} {ending}")
        ending_ids.append(ids[len(context_ids):])
    return TokenizedExample(context_ids, ending_ids, [len(ending) for ending in endings])


def remove_markup(text: str) -> str:
    """Remove WikiHow's markup ([title], [step], …) exactly as lm-evaluation-harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


PROTOCOLS = {"nanogpt": tokenize_nanogpt, "harness": tokenize_harness}


# --------------------------------------------------------------------------------------------------
# Reading examples

def download(option: str = "--data") -> Path:
    """Downloads the validation set once. A failure's message names `option`, which takes a file."""
    return fetch(URL, SHA256, DATA / "downloads" / "hellaswag_val.jsonl", option)


def read_examples(path: Path, limit: int | None = None) -> list[dict]:
    """Reads a .jsonl or .jsonl.gz file of examples in HellaSwag's format, or derived from it.

    An example has `ctx`, `endings`, `activity_label`, and optionally `label`, an index into the
    endings. Raises UserError that names the line if one is invalid.
    """
    examples = []
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if len(examples) == limit:
                    break
                if line.strip():
                    examples.append(parse_example(line, f"Line {number} of {path}"))
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again.") from None
    if not examples:
        raise UserError(f"{path} contains no examples: give a file in HellaSwag's format.")
    return examples


def parse_example(line: str, location: str) -> dict:
    try:
        example = parse_json(line)
        endings = example["endings"]
        texts = [example["ctx"], example["activity_label"]]
        if "ctx_a" in example:
            texts += [example["ctx_a"], example["ctx_b"]]
        # a label is a number, its text, or missing
        labels = {"": None, "None": None} | {str(i): i for i in range(len(endings))}
        label = str(example.get("label", ""))
        valid = isinstance(endings, list) and endings and label in labels
        if valid and all(isinstance(text, str) for text in texts + endings):
            return example | {"label": labels[label]}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{location} is not a HellaSwag example: it needs ctx, activity_label, "
                    "endings, and a label that counts from 0.")


# --------------------------------------------------------------------------------------------------
# Scoring

def evaluate(model: GPT, tokenizer: Tokenizer, examples: list[dict], protocol: str = "both",
             batch_tokens: int | None = None, world: ddp.World = ddp.SINGLE_PROCESS,
             show_progress: bool = False) -> dict[str, dict]:
    """Scores the examples and returns {"nanogpt": {"acc", "acc_norm", …}, "harness": {…}}.

    Each result has `acc` and its standard error `acc_stderr`, `acc_norm` and its standard error
    `stderr`, and `n`, the number of examples with a label. `predictions` has the ending that
    acc_norm chooses for each example, `logprobs` the log-likelihoods (nats) of its endings.

    With several processes each scores its share of the examples. The accuracies cover all of them;
    the predictions and logprobs of the other processes' examples are None.
    """
    if protocol not in (*PROTOCOLS, "both"):
        raise UserError(f"The protocol must be nanogpt, harness or both, not {protocol!r}.")
    return {name: evaluate_protocol(model, tokenizer, examples, name, batch_tokens, world,
                                    show_progress)
            for name in (PROTOCOLS if protocol == "both" else [protocol])}


def evaluate_protocol(model: GPT, tokenizer: Tokenizer, examples: list[dict], protocol: str,
                      batch_tokens: int | None, world: ddp.World, show_progress: bool) -> dict:
    # tokenize this process's share of the examples
    share = range(world.rank, len(examples), world.size)
    tokenized = [PROTOCOLS[protocol](examples[i], tokenizer) for i in share]

    # score equal endings once, so that they are equally likely to the last bit
    distinct = [list(dict.fromkeys(map(tuple, example.endings))) for example in tokenized]
    block_size = model.config.block_size
    items = [fit_to_context(example.context, list(map(list, endings)), tokenizer, block_size)
             for example, endings in zip(tokenized, distinct)]

    # score them, and count the examples with a label and the correct predictions
    predictions = [None] * len(examples)
    logprobs = [None] * len(examples)
    n = correct = correct_norm = 0
    with tqdm(total=len(items), desc=protocol, unit="example", disable=not show_progress) as bar:
        scores = log_likelihoods(model, tokenizer.vocab_size, items, batch_tokens, world)
        for item, likelihoods in scores:
            i = share[item]
            example = tokenized[item]
            logprob_of = {ids: score.logprob for ids, score in zip(distinct[item], likelihoods)}
            # an ending without tokens may have no sum
            logprobs[i] = [logprob_of.get(tuple(ids), 0.0) for ids in example.endings]
            predictions[i] = most_likely(logprobs[i], example, normalize=True)
            label = examples[i]["label"]
            if label is not None:
                n += 1
                correct += most_likely(logprobs[i], example, normalize=False) == label
                correct_norm += predictions[i] == label
            bar.update()
            acc, acc_norm = correct / max(n, 1), correct_norm / max(n, 1)
            bar.set_postfix_str(f"acc {acc:.4f}, acc_norm {acc_norm:.4f}", refresh=False)

    # add up the counts of all processes
    n, correct, correct_norm = map(int, ddp.sum_over_ranks(world, n, correct, correct_norm))
    acc, acc_stderr = accuracy(correct, n)
    acc_norm, stderr = accuracy(correct_norm, n)
    return {"acc": acc, "acc_norm": acc_norm, "acc_stderr": acc_stderr, "stderr": stderr, "n": n,
            "predictions": predictions, "logprobs": logprobs}


def most_likely(logprobs: list[float], tokenized: TokenizedExample, normalize: bool) -> int:
    """The ending with the highest log-likelihood, divided by its length if `normalize` is set.

    Returns the first of equally likely endings. An ending without tokens is never chosen.
    """
    scores = []
    for logprob, ids, length in zip(logprobs, tokenized.endings, tokenized.lengths):
        divisor = length if normalize else 1
        scores.append(logprob / divisor if ids and divisor else -math.inf)
    return scores.index(max(scores))


def accuracy(correct: int, n: int) -> tuple[float | None, float | None]:
    """(accuracy p, its standard error sqrt(p (1 - p) / (n - 1))), None if n is too small."""
    p = correct / n if n else None
    stderr = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
    return p, stderr


# --------------------------------------------------------------------------------------------------
# Command line

@dataclasses.dataclass
class HellaSwagConfig(ModelConfig):
    """Evaluates a model on HellaSwag, or on a text."""

    data: Path | None = None
    """HellaSwag's examples, as .jsonl or .jsonl.gz. Default: download the validation set."""
    limit: int | None = None  # Score only the first LIMIT examples.
    protocol: Literal["nanogpt", "harness", "both"] = "both"
    batch_tokens: int | None = None
    """Tokens per forward pass. Default: 1,024 on a CPU, 65,536 elsewhere."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on hardware that computes it, float16 on older GPUs, else float32."""
    json: Path | None = None  # Write results, predictions and log-likelihoods to this file.
    show: int = 0  # Print SHOW examples with the losses of their endings.
    text: Path | None = None  # Score this text instead of HellaSwag.
    stride: int | None = None
    """For --text: tokens that each window scores. Default: half the model's context."""


def main(config: HellaSwagConfig):
    validate(config)
    # check the device, then read the text or the examples: errors come before a model is loaded
    device = ddp.pick_device(config.device)
    if config.text:
        text = read_text(config.text)
    else:
        examples = read_examples(config.data or download(), config.limit)
        text = "".join(example["ctx"] + "".join(example["endings"]) for example in examples)

    # load the model, and name the characters that it does not know
    hardware_dtype = ddp.dtype_name(ddp.auto_dtype(device))
    engine, info = config.load(auto_on_cpu=hardware_dtype)
    tokenizer = engine.tokenizer
    print(f"{info['name']}: {describe(info)}; {engine.dtype} on {engine.device}")
    _, unknown = tokenizer.replace_unknown(text)
    if unknown:
        print("The model's alphabet lacks these characters, which were replaced or left out: "
              f"{unknown}")

    # score; a CPU with bfloat16 units does so under autocast, because a packed model only rounds
    # its weights to bfloat16 and multiplies in float32
    autocast = device.type == "cpu" and engine.dtype == hardware_dtype == "bfloat16"
    model = engine.model if autocast else engine.packed
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        if config.text:
            results = score_text(model, tokenizer, text, config)
        else:
            results = score_examples(model, tokenizer, examples, info["name"], config)
    if config.json:
        source = str(config.text or config.data or URL)
        header = {"model": info["name"], "dtype": engine.dtype, "data": source}
        write_json(config.json, header | results)


def validate(config: HellaSwagConfig):
    """Raises UserError if an option is invalid or does not go with another."""
    check_range(config, "at least 1", lambda n: n >= 1, "limit", "batch_tokens", "stride")
    check_range(config, "at least 0", lambda n: n >= 0, "show")
    if config.stride and not config.text:
        raise UserError("--stride applies to --text only: leave it out.")
    if config.text and (config.data or config.limit or config.show):
        raise UserError("--text scores a text instead of HellaSwag: "
                        "leave out --data, --limit and --show.")
    if config.json and (config.json.is_dir() or not config.json.parent.is_dir()):
        raise UserError(f"--json must name a file in an existing folder, not {config.json}.")


def score_text(model: GPT, tokenizer: Tokenizer, text: str, config: HellaSwagConfig) -> dict:
    results = perplexity(model, tokenizer, text, config.stride, config.batch_tokens,
                         show_progress=True)
    for name, value in results.items():
        number = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
        print(f"{number:>16}  {name}")
    return results


def score_examples(model: GPT, tokenizer: Tokenizer, examples: list[dict], model_name: str,
                   config: HellaSwagConfig) -> dict:
    results = {}
    table = [("protocol", "acc", "acc_norm", "examples", "seconds", "model")]
    for protocol in PROTOCOLS if config.protocol == "both" else [config.protocol]:
        began = time.perf_counter()
        results |= evaluate(model, tokenizer, examples, protocol, config.batch_tokens,
                            show_progress=True)
        seconds = time.perf_counter() - began
        table += result_rows(protocol, results[protocol], model_name, seconds)
        for i, example in enumerate(examples[:config.show]):
            tokenized = PROTOCOLS[protocol](example, tokenizer)
            print(format_example(example, tokenized, results[protocol], i))
    for row in table:
        print("{:<10} {:<16} {:<16} {:>8} {:>8}  {}".format(*row))
    if len(examples) != VALIDATION_EXAMPLES or "ctx_a" not in examples[0]:
        print("This is not the complete published validation set: "
              "do not compare the results with published ones.")
    return results


def format_example(example: dict, tokenized: TokenizedExample, result: dict, i: int) -> str:
    """Example i as text, with the mean loss of each ending."""
    lines = ["---", example["ctx"]]
    for number, ending in enumerate(example["endings"]):
        n_tokens = max(1, len(tokenized.endings[number]))
        loss = -result["logprobs"][i][number] / n_tokens
        lines.append(f"{number} (loss {loss:.4f}) {ending}")
    lines.append(f"predicted {result['predictions'][i]}, actual {example['label']}")
    return without_surrogates("\n".join(lines))


def result_rows(protocol: str, result: dict, model_name: str, seconds: float) -> list[tuple]:
    """The model's row of the table, followed by the published ones."""
    acc = acc_norm = "no labels"
    if result["n"]:
        acc = f"{result['acc']:.4f} ±{result['acc_stderr'] or 0:.4f}"
        acc_norm = f"{result['acc_norm']:.4f} ±{result['stderr'] or 0:.4f}"
    rows = [(protocol, acc, acc_norm, f"{result['n']:,}", f"{seconds:,.1f}", model_name)]
    for name, (acc, acc_norm) in PUBLISHED[protocol].items():
        rows.append((protocol, f"{acc:.4f}", f"{acc_norm:.4f}", f"{VALIDATION_EXAMPLES:,}", "",
                     f"{name}, published"))
    rows.append(("", "", GPT3_ACC_NORM, "", "", "GPT-3 124M, from its paper"))
    return rows


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(HellaSwagConfig))
