"""HellaSwag: which of four endings does a model find the likeliest? And the perplexity of any text, by the same machinery.

    python hellaswag.py -m gpt2 -d cuda                      # both published protocols
    python hellaswag.py -m bundled --data hellaswag_val.jsonl.gz --limit 500 --protocol nanogpt
    python hellaswag.py -m gpt2 --text novel.txt             # nats a token, bits a byte

Two protocols are in use, and their figures do not compare. `nanogpt` is build-nanogpt's: the raw context, context and
ending tokenized apart; acc takes the ending with the highest log-likelihood, acc_norm the one with the highest mean over its
tokens. `harness` is lm-evaluation-harness's: the activity before a context cleaned of its marks, context and ending
tokenized together; acc_norm divides by the ending's characters.

An example is one forward pass over one sequence: its context once, and behind it the four endings, each of which sees the
context and itself alone. Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?" (arXiv 1905.07830).
"""
import dataclasses
import gzip
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

import ddp
from checkpoint import describe, load_model
from errors import UserError, one_sentence
from files import write_json
from generate import Dtype, Engine
from kernels import packed
from model import GPT
from sources import DATA, fetch
from tokenizer import Tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
LOGITS = 2**24  # so many at a time

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


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(tokenizer.replace_unknown(text)[0])


PROTOCOLS = {"nanogpt": nanogpt, "harness": harness}


def download() -> Path:
    return fetch(URL, SHA256, DATA / "downloads" / "hellaswag_val.jsonl", "--data")


def read_examples(path: Path, limit: int | None = None) -> list[dict]:
    """The examples of a .jsonl or .jsonl.gz, in HellaSwag's form or derived from it: at least `ctx`, `endings` and
    `activity_label`, and a `label` from 0 on where there is one. Raises UserError naming a line that is none."""
    examples = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(examples) == limit:
                    break
                if line.strip():
                    examples.append(checked(line, f"Line {number} of {path}"))
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}).") from None
    if not examples:
        raise UserError(f"{path} holds no examples.")
    return examples


def checked(line: str, where: str) -> dict:
    try:
        example = json.loads(line)
        texts = [example[key] for key in ("ctx", "activity_label", *(("ctx_a", "ctx_b") if "ctx_a" in example else ()))]
        label = example.get("label", "")
        example["label"] = None if label in ("", None) else int(label)
        endings = example["endings"]
        labels = (None, *range(len(endings)))
        if endings and example["label"] in labels and all(isinstance(text, str) for text in (*texts, *endings)):
            return example
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{where} is no HellaSwag example: it needs ctx, activity_label, endings, and a label that counts from 0.")


# ----------------------------------------------------------------------------------------------------------------
# Log-likelihoods

class Tree(NamedTuple):
    """A context, and endings that each go on from it."""
    context: list[int]
    endings: list[list[int]]


def plant(context: list[int], endings: list[list[int]], tokenizer: Tokenizer, block_size: int) -> list[Tree]:
    """The trees whose endings, in order, are these: one, where all of it fits the model. Else each ending has a context of its
    own, cut off on the left as lm-evaluation-harness does. `<|endoftext|>` stands for an empty context; where the tokenizer has
    none, an ending's first token does, and is not scored."""
    if not context and tokenizer.eot is not None:
        context = [tokenizer.eot]
    if context and len(context) + max(map(len, endings)) - 1 <= block_size:
        return [Tree(context, endings)]
    trees = []
    for ending in endings:
        whole = (context + ending)[-block_size - 1:]
        start = max(1, len(whole) - len(ending))
        trees.append(Tree(whole[:start], [whole[start:]]))
    return trees


@torch.no_grad()
def log_likelihoods(model: GPT, vocab_size: int, items: list[list[Tree]], batch_tokens: int | None) -> Iterator[tuple[int, list]]:
    """The sum of log-probabilities (nats, over the first vocab_size ids) of the tokens of each ending of each item.

    Yields (the item's number, the sums of its endings), the longest items first.
    """
    trained = getattr(model, "module", model)  # in DistributedDataParallel
    was_training = trained.training
    model = packed(trained.eval())
    embedding = model.transformer.wte.weight
    batch_tokens = batch_tokens or (1024 if embedding.device.type == "cpu" else 65_536)  # a CPU's cache, a GPU's cores
    laid = [[lay_out(tree) for tree in trees] for trees in items]
    sizes = [len(item) * max(len(layout.ids) for layout in item) for item in laid]
    order = sorted(range(len(items)), key=lambda i: sizes[i])
    while order:
        count = max(1, batch_tokens // sizes[order[-1]])
        batch, order = order[-count:], order[:-count]
        ids, positions, mask, places, targets, lengths = (
            tensor.to(embedding.device) for tensor in pack([layout for i in batch for layout in laid[i]]))
        hidden = model.hidden(ids, positions=positions, mask=mask).flatten(0, 1)  # (B * T, C)
        distinct, which = places.unique(return_inverse=True)  # the end of a context predicts each ending's first token
        normalizers = torch.cat([log_sum_exp(model.logits(hidden[some])[:, :vocab_size].float())
                                 for some in distinct.split(max(1, LOGITS // vocab_size))])
        logits = (hidden[places].float() * embedding[targets].float()).sum(-1)  # (S,) of the tokens that did follow
        parts = (logits - normalizers[which]).cpu().double().split(lengths.tolist())
        sums = iter([part.sum().item() for part in parts])
        for i in batch:
            yield i, [next(sums) for tree in items[i] for _ in tree.endings]
    trained.train(was_training)


def log_sum_exp(x):
    """(N,) of x (N, V), in place: `torch.logsumexp` is several times slower on a CPU."""
    largest = x.amax(-1, keepdim=True)
    return x.sub_(largest).exp_().sum(-1).log_().add_(largest[:, 0])


class Layout(NamedTuple):
    """A tree as a sequence of T tokens, and where in it the S tokens of its endings are predicted."""
    ids: list[int]  # (T,)
    positions: list[int]  # (T,)
    branches: list[int]  # (T,) 0 in the context, else the number of the ending
    places: list[int]  # (S,)
    targets: list[int]  # (S,) the tokens that follow there
    lengths: list[int]  # of the endings


def lay_out(tree: Tree) -> Layout:
    context, endings = tree
    layout = Layout(list(context), list(range(len(context))), [0] * len(context), [], [], [])
    for branch, ending in enumerate(endings, 1):
        inputs = ending[:-1]  # nobody asks what follows the last token
        if ending:
            layout.places.extend([len(context) - 1, *range(len(layout.ids), len(layout.ids) + len(inputs))])
        layout.ids.extend(inputs)
        layout.positions.extend(range(len(context), len(context) + len(inputs)))
        layout.branches.extend([branch] * len(inputs))
        layout.targets.extend(ending)
        layout.lengths.append(len(ending))
    return layout


def pack(layouts: list[Layout]) -> tuple[torch.Tensor, ...]:
    """ids, positions (B, T) and mask (B, 1, T, T) of a batch; places in it (B * T) and targets (S,); lengths of the endings."""
    T = max(len(layout.ids) for layout in layouts)
    padded = np.zeros((3, len(layouts), T), dtype=np.int64)
    for b, layout in enumerate(layouts):
        padded[:, b, :len(layout.ids)] = layout[:3]
    ids, positions, branches = torch.from_numpy(padded)
    mask = (branches[:, None] == 0) | (branches[:, :, None] == branches[:, None])  # (B, T, T): a token sees context and branch
    places = [b * T + place for b, layout in enumerate(layouts) for place in layout.places]
    targets, lengths = ([value for layout in layouts for value in getattr(layout, name)] for name in ("targets", "lengths"))
    return ids, positions, mask.tril()[:, None], torch.tensor(places), torch.tensor(targets), torch.tensor(lengths)


# ----------------------------------------------------------------------------------------------------------------
# The verdicts

def evaluate(model: GPT, tokenizer: Tokenizer, examples: list[dict], protocol: str = "both", batch_tokens: int | None = None,
             world: ddp.World | None = None, show_progress: bool = False) -> dict[str, dict]:
    """HellaSwag's figures by protocol: {"nanogpt": {"acc", "acc_norm", "acc_stderr", "stderr", "n", …}, "harness": …}.

    `stderr` is acc_norm's, `n` counts the examples with a label, `predictions` are acc_norm's choices and `logprobs` the sums
    (nats) of the endings, example by example. An ending without tokens is never chosen. In a world of several processes each
    scores its part of the examples, and the figures are of them all; the others' predictions are then None.
    """
    world = world or ddp.World(0, 1, next(model.parameters()).device)
    names = [name for name in PROTOCOLS if protocol in (name, "both")]
    return {name: verdicts(model, tokenizer, examples, name, batch_tokens, world, show_progress) for name in names}


def verdicts(model, tokenizer, examples, protocol: str, batch_tokens, world: ddp.World, show_progress: bool) -> dict:
    mine = range(world.rank, len(examples), world.size)
    questions = [PROTOCOLS[protocol](examples[i], tokenizer) for i in mine]
    items = [plant(q.context, q.endings, tokenizer, model.config.block_size) for q in questions]
    predictions, logprobs = [None] * len(examples), [None] * len(examples)
    n = right = right_norm = 0
    with tqdm(total=len(items), desc=protocol, unit="example", disable=not show_progress) as bar:
        for item, sums in log_likelihoods(model, tokenizer.vocab_size, items, batch_tokens):
            i, (_, endings, lengths) = mine[item], questions[item]
            logprobs[i], predictions[i] = sums, likeliest(sums, endings, lengths)
            if (label := examples[i]["label"]) is not None:
                n += 1
                right += likeliest(sums, endings, [1] * len(endings)) == label
                right_norm += predictions[i] == label
            bar.update()
            bar.set_postfix_str(f"acc {right / max(n, 1):.4f}, acc_norm {right_norm / max(n, 1):.4f}", refresh=False)
    n, right, right_norm = map(int, ddp.sum_over_ranks(world, n, right, right_norm))
    (acc, acc_stderr), (acc_norm, stderr) = rate(right, n), rate(right_norm, n)
    return {"acc": acc, "acc_norm": acc_norm, "acc_stderr": acc_stderr, "stderr": stderr, "n": n,
            "predictions": predictions, "logprobs": logprobs}


def likeliest(logprobs: list[float], endings: list[list[int]], lengths: list[int]) -> int:
    """The ending with the highest log-likelihood for its length, the first of equals."""
    scores = [total / length if ids and length else -math.inf for total, ids, length in zip(logprobs, endings, lengths)]
    return scores.index(max(scores))


def rate(right: int, n: int) -> tuple[float | None, float | None]:
    """(share, its standard error by n - 1), None where n is too small for either."""
    share = right / n if n else None
    return share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None


# ----------------------------------------------------------------------------------------------------------------
# Any text

def perplexity(model: GPT, tokenizer: Tokenizer, text: str, stride: int | None = None, batch_tokens: int | None = None,
               show_progress: bool = False) -> dict[str, float]:
    """{"nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes", "stride"} of a text.

    Each window of the model's context scores its last `stride` tokens (half the context when not given), given those before; the
    first window all it has. The text begins after `<|endoftext|>`; where the tokenizer has none, its first token is not scored.
    """
    block_size = model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"The stride is at least 1 and at most the model's context of {block_size} tokens, not {stride}.")
    ids = [tokenizer.eot] * (tokenizer.eot is not None) + encode(tokenizer, text)
    if len(ids) < 2:
        raise UserError("The text has no token to score.")
    scored_bytes = len(text.encode(errors="replace")) - (len(tokenizer.decode(ids[:1]).encode()) if tokenizer.eot is None else 0)
    windows, done = [], 1
    while done < len(ids):
        stop = min(done + (block_size if done == 1 else stride), len(ids))
        windows.append([Tree(ids[max(0, stop - 1 - block_size):done], [ids[done:stop]])])
        done = stop
    total = tokens = 0
    with tqdm(total=len(ids) - 1, desc="text", unit="token", unit_scale=True, disable=not show_progress) as bar:
        for i, (logprob,) in log_likelihoods(model, tokenizer.vocab_size, windows, batch_tokens):
            total += logprob
            tokens += len(windows[i][0].endings[0])
            bar.update(tokens - bar.n)
            bar.set_postfix_str(f"perplexity {safe_exp(-total / tokens):.3f}", refresh=False)
    return {"nats_per_token": -total / tokens, "perplexity": safe_exp(-total / tokens), "tokens": tokens,
            "bits_per_byte": -total / math.log(2) / scored_bytes, "bytes": scored_bytes, "stride": stride}


def safe_exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


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
    for name in ("limit", "batch_tokens", "stride"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is at least 1, not {getattr(config, name)}.")
    examples = None if config.text else read_examples(config.data or download(), config.limit)
    model, tokenizer, info = load_model(config.model, ddp.pick_device(config.device))
    model = Engine(model, tokenizer, config.dtype).model
    weight = model.transformer.wte.weight
    heading = f"{info['name']}: {describe(info)}; {str(weight.dtype).removeprefix('torch.')} on {weight.device}"
    print(heading)
    if config.text:
        text = config.text.read_text(encoding="utf-8", errors="replace")
        results = perplexity(model, tokenizer, text, config.stride, config.batch_tokens, show_progress=True)
        print("\n".join(f"{value:>16,.4f}  {name}" if isinstance(value, float) else f"{value:>16,}  {name}"
                        for name, value in results.items()))
    else:
        began = time.perf_counter()
        results = evaluate(model, tokenizer, examples, config.protocol, config.batch_tokens, show_progress=True)
        for protocol in results:
            for i in range(min(config.show, len(examples))):
                print(shown(examples[i], PROTOCOLS[protocol](examples[i], tokenizer), results[protocol], i))
        print(table(results, time.perf_counter() - began, comparable="ctx_a" in examples[0] and config.limit is None))
    if config.json:
        write_json(config.json, {"model": info["name"], "dtype": str(weight.dtype).removeprefix("torch."),
                                 "data": str(config.text or config.data or "hellaswag_val"), **results})


def shown(example: dict, question: Question, result: dict, i: int) -> str:
    """An example as a person reads it, with the mean loss of each ending."""
    losses = [-total / max(1, len(ids)) for total, ids in zip(result["logprobs"][i], question.endings)]
    endings = [f"{number} (loss {loss:.4f}) {ending}" for number, (loss, ending) in enumerate(zip(losses, example["endings"]))]
    return "\n".join(["---", example["ctx"], *endings, f"predicted {result['predictions'][i]}, actual {example['label']}"])


def table(results: dict[str, dict], seconds: float, comparable: bool) -> str:
    """The figures with their standard errors, and the published ones."""
    def cell(value, error=None):
        return ("" if value is None else f"{value:.4f}" + (f" ±{error:.4f}" if error else "")).ljust(18)
    lines = [f"{'protocol':<12}{'acc':<18}{'acc_norm':<18}{'examples':<10}"]
    for protocol, result in results.items():
        lines.append(f"{protocol:<12}{cell(result['acc'], result['acc_stderr'])}{cell(result['acc_norm'], result['stderr'])}"
                     f"{result['n']:<10,}")
        for name, (acc, acc_norm) in PUBLISHED[protocol].items():
            lines.append(f"{protocol:<12}{cell(acc)}{cell(acc_norm)}{name}, published")
    lines.append(f"{'':<12}{cell(None)}{cell(0.337)}GPT-3 124M, in its paper, by a protocol of its own")
    if not comparable:
        lines.append("These examples are not the whole validation part as it was published: their figures do not compare.")
    return "\n".join([*lines, f"{seconds:,.1f} seconds"])


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(HellaSwagConfig))
