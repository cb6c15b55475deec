"""HellaSwag: which of four endings does a model find the likeliest? And the perplexity of any text, by the same machinery.

    python hellaswag.py -m gpt2 -d cuda                      # both published protocols
    python hellaswag.py -m bundled --data hellaswag_val.jsonl.gz --limit 500 --protocol nanogpt
    python hellaswag.py -m gpt2 --text novel.txt             # nats a token, bits a byte

Two protocols are in use, and their figures do not compare. `nanogpt` is build-nanogpt's: the raw context, context and
ending tokenized apart; acc takes the ending with the highest log-likelihood, acc_norm the one with the highest mean over its
tokens. `harness` is lm-evaluation-harness's: the activity before a context cleaned of its marks, context and ending
tokenized together; acc_norm divides by the ending's characters.

Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?" (arXiv 1905.07830).
"""
import dataclasses
import gzip
import json
import math
import re
import sys
import time
import zlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from tqdm import tqdm

import ddp
from checkpoint import describe, load_model
from common.errors import UserError, report_user_errors
from common.files import write_json
from corpus.sources import DATA, fetch
from engine.likelihood import encode, fit_to_context, log_likelihoods, perplexity
from generate import Dtype, Engine
from model import GPT
from tokenizer import Tokenizer, without_surrogates

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

EXAMPLES = 10_042  # of the validation part

# Published in build-nanogpt's hellaswag.py: what it gave, and what lm-evaluation-harness did; (acc, acc_norm).
PUBLISHED = {"nanogpt": {"OpenAI's GPT-2 124M": (0.2859, 0.2955), "OpenAI's GPT-2 XL": (0.3842, 0.4893)},
             "harness": {"OpenAI's GPT-2 124M": (0.2892, 0.3114), "OpenAI's GPT-2 XL": (0.4004, 0.5089)}}


# ----------------------------------------------------------------------------------------------------------------
# The examples, and what each protocol makes of one

class Question(NamedTuple):
    """An example in token ids."""
    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # of the endings, as acc_norm divides by them


def nanogpt(example: dict, tokenizer: Tokenizer) -> Question:
    endings = [encode(tokenizer, f" {ending}") for ending in example["endings"]]
    return Question(encode(tokenizer, example["ctx"]), endings, [len(ids) for ids in endings])


def harness(example: dict, tokenizer: Tokenizer) -> Question:
    if "ctx_a" in example:
        context = preprocess(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
        endings = [preprocess(ending) for ending in example["endings"]]
    else:  # the derived form, whose marks are resolved
        context, endings = f"{example['activity_label']}: {example['ctx']}", example["endings"]
    bare = context.rstrip()  # blanks at the context's end go to the endings
    ids = encode(tokenizer, bare)
    wholes = [encode(tokenizer, f"{context} {ending}") for ending in endings]
    return Question(ids, [whole[len(ids):] for whole in wholes], [len(ending) for ending in endings])


def preprocess(text: str) -> str:
    """A text without WikiHow's marks, exactly as lm-evaluation-harness cleans it, what it leaves over included."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


PROTOCOLS = {"nanogpt": nanogpt, "harness": harness}


def download(option: str = "--data") -> Path:
    """The validation part, downloaded once; `option` is how a command takes it from elsewhere."""
    return fetch(URL, SHA256, DATA / "downloads" / "hellaswag_val.jsonl", option)


def read_examples(path: Path, limit: int | None = None) -> list[dict]:
    """The examples of a .jsonl or .jsonl.gz, in HellaSwag's form or derived from it: at least `ctx`, `endings` and
    `activity_label`, and a `label` from 0 on where there is one. Raises UserError naming a line that is none."""
    examples = []
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if len(examples) == limit:
                    break
                if line.strip():
                    examples.append(parse_example(line, f"Line {number} of {path}"))
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}).") from None
    if not examples:
        raise UserError(f"{path} holds no examples.")
    return examples


def parse_example(line: str, where: str) -> dict:
    try:
        example = json.loads(line)
        texts = [example[key] for key in ("ctx", "activity_label", *(("ctx_a", "ctx_b") if "ctx_a" in example else ()))]
        endings, label = example["endings"], str(example.get("label", ""))  # a number, in some files as text
        labels = {"": None, "None": None} | {str(i): i for i in range(len(endings))}
        if label in labels and isinstance(endings, list) and endings and all(isinstance(text, str) for text in texts + endings):
            return example | {"label": labels[label]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{where} is no HellaSwag example: it needs ctx, activity_label, endings, and a label that counts from 0.")


# ----------------------------------------------------------------------------------------------------------------
# The verdicts

def evaluate(model: GPT, tokenizer: Tokenizer, examples: list[dict], protocol: str = "both", batch_tokens: int | None = None,
             world: ddp.World | None = None, show_progress: bool = False) -> dict[str, dict]:
    """HellaSwag's figures by protocol: {"nanogpt": {"acc", "acc_norm", "acc_stderr", "stderr", "n", …}, "harness": …}.

    `stderr` is acc_norm's, `n` counts the examples with a label, `predictions` are acc_norm's choices and `logprobs` the sums
    (nats) of the endings, example by example. An ending without tokens is never chosen. In a world of several processes each
    scores its part of the examples, and the figures are of them all; the others' predictions are then None.
    """
    if protocol not in (*PROTOCOLS, "both"):
        raise UserError(f"A protocol is one of {', '.join(PROTOCOLS)} and both, not {protocol!r}.")
    model = getattr(model, "module", model)  # in DistributedDataParallel
    world = world or ddp.World(0, 1, next(model.parameters()).device)
    names = [name for name in PROTOCOLS if protocol in (name, "both")]
    return {name: verdicts(model, tokenizer, examples, name, batch_tokens, world, show_progress) for name in names}


def verdicts(model, tokenizer, examples, protocol: str, batch_tokens, world: ddp.World, show_progress: bool) -> dict:
    mine = range(world.rank, len(examples), world.size)
    questions = [PROTOCOLS[protocol](examples[i], tokenizer) for i in mine]
    distinct = [{tuple(ids): None for ids in question.endings} for question in questions]  # equal endings are equally likely
    items = [fit_to_context(question.context, list(map(list, endings)), tokenizer, model.config.block_size)
             for question, endings in zip(questions, distinct)]
    predictions, logprobs = [None] * len(examples), [None] * len(examples)
    n = right = right_norm = 0
    with tqdm(total=len(items), desc=protocol, unit="example", disable=not show_progress) as bar:
        for item, sums in log_likelihoods(model, tokenizer.vocab_size, items, batch_tokens, world):
            i, (_, endings, lengths) = mine[item], questions[item]
            found = dict(zip(distinct[item], sums))
            logprobs[i] = [found.get(tuple(ids), 0.0) for ids in endings]  # without tokens there is none
            predictions[i] = most_likely(logprobs[i], endings, lengths)
            if (label := examples[i]["label"]) is not None:
                n += 1
                right += most_likely(logprobs[i], endings, [1] * len(endings)) == label
                right_norm += predictions[i] == label
            bar.update()
            bar.set_postfix_str(f"acc {right / max(n, 1):.4f}, acc_norm {right_norm / max(n, 1):.4f}", refresh=False)
    n, right, right_norm = map(int, ddp.sum_over_ranks(world, n, right, right_norm))
    (acc, acc_stderr), (acc_norm, stderr) = rate(right, n), rate(right_norm, n)
    return {"acc": acc, "acc_norm": acc_norm, "acc_stderr": acc_stderr, "stderr": stderr, "n": n,
            "predictions": predictions, "logprobs": logprobs}


def most_likely(logprobs: list[float], endings: list[list[int]], lengths: list[int]) -> int:
    """The ending with the highest log-likelihood for its length, the first of equals."""
    scores = [total / length if ids and length else -math.inf for total, ids, length in zip(logprobs, endings, lengths)]
    return scores.index(max(scores))


def rate(right: int, n: int) -> tuple[float | None, float | None]:
    """(share, its standard error by n - 1), None where n is too small for either."""
    share = right / n if n else None
    return share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None


# ----------------------------------------------------------------------------------------------------------------
# The command line

@dataclasses.dataclass
class HellaSwagConfig:
    """Evaluates a model on HellaSwag, or on a text."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """bundled[:name], a run folder, a .pt, a Hugging Face folder or Hub id; the newest run or `bundled` when not given."""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cuda, mps or cpu."""
    data: Path | None = None
    """HellaSwag's examples, .jsonl or .jsonl.gz; the validation part is downloaded when not given."""
    limit: int | None = None
    """Score the first so many examples alone."""
    protocol: Literal["nanogpt", "harness", "both"] = "both"
    batch_tokens: int | None = None
    """Tokens of a forward pass; 1,024 on a CPU and 65,536 elsewhere when not given."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA and float32 elsewhere."""
    json: Path | None = None
    """Write figures, choices and log-likelihoods to this file."""
    show: int = 0
    """Print so many examples, with the losses of their endings."""
    text: Path | None = None
    """Score this text instead."""
    stride: int | None = None
    """Of a text: each window scores so many tokens, given those before; half the model's context when not given."""


def main(config: HellaSwagConfig):
    check(config)
    sys.stdout.reconfigure(errors="replace")  # where the terminal cannot show a character
    text = read_text(config.text) if config.text else None
    examples = None if config.text else read_examples(config.data or download(), config.limit)
    model, tokenizer, info = load_model(config.model, ddp.pick_device(config.device))
    cuda = next(model.parameters()).is_cuda
    engine = Engine(model, tokenizer, ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype)
    print(f"{info['name']}: {describe(info)}; {engine.dtype} on {engine.device}")
    _, unknown = tokenizer.replace_unknown(text or "".join(example["ctx"] + "".join(example["endings"]) for example in examples))
    if unknown:
        print(f"The model's alphabet lacks these characters, which became spaces or were left out: {unknown}")
    if config.text:
        results = perplexity(engine.packed, tokenizer, text, config.stride, config.batch_tokens, show_progress=True)
        for name, value in results.items():
            print(f"{value:>16,.4f}  {name}" if isinstance(value, float) else f"{value:>16,}  {name}")
    else:
        results, lines = {}, []
        for protocol in PROTOCOLS if config.protocol == "both" else [config.protocol]:
            began = time.perf_counter()
            results |= evaluate(engine.packed, tokenizer, examples, protocol, config.batch_tokens, show_progress=True)
            lines += rows(protocol, results[protocol], info["name"], time.perf_counter() - began)
            for i in range(min(config.show, len(examples))):
                print(shown(examples[i], PROTOCOLS[protocol](examples[i], tokenizer), results[protocol], i))
        print("\n".join([row("protocol", "acc", "acc_norm", "examples", "seconds", "model"), *lines]))
        if len(examples) != EXAMPLES or "ctx_a" not in examples[0]:
            print("These are not all examples of the validation part as it was published: their figures do not compare.")
    if config.json:
        write_json(config.json, {"model": info["name"], "dtype": engine.dtype,
                                 "data": str(config.text or config.data or URL), **results})


def check(config: HellaSwagConfig):
    """Raises UserError for options that mean nothing, or nothing together."""
    for name in ("limit", "batch_tokens", "stride"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is at least 1, not {getattr(config, name)}.")
    if config.show < 0:
        raise UserError(f"--show is at least 0, not {config.show}.")
    if config.stride and not config.text:
        raise UserError("--stride belongs to --text.")
    if config.text and (config.data or config.limit or config.show):
        raise UserError("--text scores a text instead of HellaSwag: leave --data, --limit and --show out.")
    if config.json and (config.json.is_dir() or not config.json.parent.is_dir()):
        raise UserError(f"--json names a file in a folder that there is, not {config.json}.")


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: it is not UTF-8 ({error.reason} at byte {error.start:,}).") from None


def shown(example: dict, question: Question, result: dict, i: int) -> str:
    """An example as a person reads it, with the mean loss of each ending."""
    losses = [-total / max(1, len(ids)) for total, ids in zip(result["logprobs"][i], question.endings)]
    endings = [f"{number} (loss {loss:.4f}) {ending}" for number, (loss, ending) in enumerate(zip(losses, example["endings"]))]
    lines = ["---", example["ctx"], *endings, f"predicted {result['predictions'][i]}, actual {example['label']}"]
    return without_surrogates("\n".join(lines))


def rows(protocol: str, result: dict, model: str, seconds: float) -> list[str]:
    """The model's line of the table and, under it, the published ones."""
    acc, acc_norm = (f"{result[name]:.4f} ±{result[error] or 0:.4f}" if result["n"] else "no labels"
                     for name, error in (("acc", "acc_stderr"), ("acc_norm", "stderr")))
    published = [row(protocol, f"{acc:.4f}", f"{acc_norm:.4f}", "10,042", "", f"{name}, published")
                 for name, (acc, acc_norm) in PUBLISHED[protocol].items()]
    return [row(protocol, acc, acc_norm, f"{result['n']:,}", f"{seconds:,.1f}", model), *published,
            row("", "", "0.337", "", "", "GPT-3 124M, as its paper has it")]


def row(protocol: str, acc: str, acc_norm: str, examples: str, seconds: str, model: str) -> str:
    return f"{protocol:<10} {acc:<16} {acc_norm:<16} {examples:>8} {seconds:>8}  {model}"


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(HellaSwagConfig))
