"""HellaSwag's two protocols equal their originals, and perplexity equals a plain loop."""
import gzip
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import PROSE, tiny_gpt

import hellaswag
from common.errors import UserError
from common.files import sha256
from corpus import sources
from ddp import World
from engine.likelihood import perplexity
from hellaswag import evaluate, read_examples
from model import GPT, GPTConfig
from tokenizer import CharTokenizer, load_tokenizer
from weights.huggingface import save_huggingface

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def example(ind, activity, ctx_a, ctx_b, endings, label):
    return {"ind": ind, "activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b,
            "ctx": f"{ctx_a} {ctx_b}".strip(), "endings": endings, "label": label,
            "split": "val", "split_type": "indomain", "source_id": f"x~{ind}"}


EXAMPLES = [
    # ctx_b in lowercase
    example(11, "Kite flying", "Two boys unroll a red kite on a windy beach.", "the taller boy", [
        "runs backwards while the string unwinds.", "eats the kite with a fork.",
        "is shown again in a kitchen, baking bread.",
        "tells the wind to be quiet and it sings."], 0),
    # double spaces
    example(12, "Peeling potatoes", "A woman stands at a sink.  She holds a peeler.", "she", [
        "peels a  potato in long strips.", "throws the sink away.",
        "paints a   wall, then another.", "sleeps under  the table."], 2),
    # WikiHow's markup, no ctx_b
    example(13, "Personal Care and Style",
            "[header] How to braid short hair [title] Wash it first. [step] Use a mild "
            "shampoo and let it dry. [substeps] Comb out every knot.", "", [
                "[title] Part the hair in Three. [step] Hold one part in each hand.",
                "Buy a hat. [title] Wear it. [step] Nobody will see the hair.",
                "[step] Braid the left side, then the right side, then stop.",
                "Cut it all off [title] Start again."], 1),
    # markup, and so a space, at the end of the context
    example(14, "Home and Garden",
            "[header] How to water a Cactus [title] Wait until the soil is dry. "
            "[step] Push a finger in.",
            "[title] Ask Dr. McPherson in New York [step]", [
                "Pour slowly; stop when water runs out below.",
                "Fill the room up to the ceiling.", "[step] Call the cactus by name.",
                " Leading and trailing blanks. "], 3),
    # characters outside ASCII
    example(15, "Café", "A waiter in a small café carries 3 crèmes brûlées — all on one hand.",
            "He", [
                "doesn't drop any of them.", "drops them; „Entschuldigung“, says he.",
                "sings ♫ for 25 minutes…", "naïvely juggles."], 1),
    # more than 64 tokens
    example(16, "Long jump",
            "An athlete waits. " * 30 + "He claps his hands above his head.", "then", [
                "he runs and leaps into the sand, rises, and walks off while people clap.",
                "he is gone.", "sand leaps into him.",
                "the bar falls on the mat behind a judge who writes a number on a board."], 0),
    # equal endings
    example(17, "Chess", "An old man moves a pawn.", "his opponent", [
        "resigns.", "smiles.", "waits.", "waits."], 2),
    # markup that spans ctx_a and ctx_b
    example(18, "Archery", "[header] Draw [title] Aim [step] Loose [note",
            "arrow] [x]   EVERY time", [
                "Hits.", "[a] [b] misses", "It hits [the] mark.", "A dog  barks [loudly."], 1),
]


@pytest.fixture
def gpt():
    return tiny_gpt(vocab_size=50304, block_size=64)


@pytest.fixture
def gpt2():
    return load_tokenizer("gpt2")


def token_logprobs(gpt, ids, vocab_size=50257):
    """The log-probabilities (T - 1,) of ids[1:], from a plain forward pass."""
    ids = torch.tensor([ids])
    logits = gpt(ids[:, :-1])[0][0, :, :vocab_size]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


# --------------------------------------------------------------------------------------------------
# The nanogpt protocol

def score_one_by_one(gpt, tokenizer, examples):
    """build-nanogpt's protocol as a plain loop, with a forward pass per ending.

    Returns for each example (sums of the endings, choice of acc, choice of acc_norm).
    """
    scores = []
    for e in examples:
        sums, mean_losses = [], []
        for ending in e["endings"]:
            context, tokens = tokenizer.encode(e["ctx"]), tokenizer.encode(" " + ending)
            ids = torch.tensor([(context + tokens)[-gpt.config.block_size - 1:]])
            logits = gpt(ids[:, :-1])[0][0, :, :tokenizer.vocab_size]
            losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")[-len(tokens):]
            sums.append(-losses.sum().item())
            mean_losses.append(losses.mean().item())
        scores.append((sums, sums.index(max(sums)), mean_losses.index(min(mean_losses))))
    return scores


@pytest.mark.parametrize("batch_tokens", [None, 1, 150])
def test_the_nanogpt_protocol_equals_a_plain_loop(gpt, gpt2, batch_tokens):
    result = evaluate(gpt, gpt2, EXAMPLES, "nanogpt", batch_tokens)["nanogpt"]
    sums, choices, norm_choices = zip(*score_one_by_one(gpt, gpt2, EXAMPLES))
    torch.testing.assert_close(
        torch.tensor(result["logprobs"]), torch.tensor(sums), atol=1e-3, rtol=0)
    assert result["predictions"] == list(norm_choices)
    labels = [e["label"] for e in EXAMPLES]
    assert result["acc"] == sum(c == label for c, label in zip(choices, labels)) / 8
    assert result["acc_norm"] == sum(c == label for c, label in zip(norm_choices, labels)) / 8
    p = result["acc_norm"]
    assert result["n"] == 8
    assert math.isclose(result["stderr"], math.sqrt(p * (1 - p) / 7))


# --------------------------------------------------------------------------------------------------
# The harness protocol

@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_the_harness_protocol_equals_lm_evaluation_harness(kind, tmp_path):
    tasks = pytest.importorskip("lm_eval.tasks")
    from datasets import Dataset  # noqa: PLC0415
    from lm_eval.api.task import ConfigurableTask  # noqa: PLC0415
    from lm_eval.evaluator import evaluate as their_evaluate  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
    from lm_eval.tasks._yaml_loader import load_yaml  # noqa: PLC0415

    # a model for both programs
    if kind == "gpt2":
        tokenizer = load_tokenizer("gpt2")
        options = {}
    else:
        text = "".join(json.dumps(e, ensure_ascii=False) for e in EXAMPLES)
        tokenizer = CharTokenizer("".join(sorted(set(text))))
        options = {"prefix_token_id": 0}  # required, but not used here
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size + 47, block_size=64 if kind == "gpt2" else 128)
    save_huggingface(tmp_path, gpt, tokenizer, torch.float32)

    # their task on our examples
    config = dict(load_yaml(f"{tasks.__path__[0]}/hellaswag/hellaswag.yaml"))
    config.pop("tag", None)
    config["training_split"] = None
    config["num_fewshot"] = 0
    config["custom_dataset"] = lambda **_: {"validation": Dataset.from_list(EXAMPLES)}
    output = their_evaluate(
        HFLM(str(tmp_path), device="cpu", dtype="float32", batch_size=1, **options),
        {"tasks": {"hellaswag": ConfigurableTask(config=config)}}, bootstrap_iters=10)
    samples = sorted(output["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    theirs = output["results"]["hellaswag"]

    # the same log-likelihoods, choices and results
    ours = evaluate(gpt, tokenizer, EXAMPLES, "harness")["harness"]
    their_logprobs = [[logprob for logprob, _ in s["filtered_resps"]] for s in samples]
    torch.testing.assert_close(
        torch.tensor(ours["logprobs"]), torch.tensor(their_logprobs), atol=1e-3, rtol=0)
    correct = [e["label"] == choice for e, choice in zip(EXAMPLES, ours["predictions"])]
    assert correct == [bool(sample["acc_norm"]) for sample in samples]
    assert ours["acc"] == theirs["acc,none"]
    assert ours["acc_norm"] == theirs["acc_norm,none"]
    assert math.isclose(ours["stderr"], theirs["acc_norm_stderr,none"])


# --------------------------------------------------------------------------------------------------
# Both protocols

def test_padding_ids_have_no_probability(gpt, gpt2):
    before = evaluate(gpt, gpt2, EXAMPLES)
    with torch.no_grad():
        gpt.transformer.wte.weight[50257:] += 100
    assert evaluate(gpt, gpt2, EXAMPLES) == before


def test_ranks_share_the_examples_and_score_none_twice(gpt, gpt2, monkeypatch):
    single = evaluate(gpt, gpt2, EXAMPLES, "nanogpt")["nanogpt"]
    sums = []
    monkeypatch.setattr(
        "ddp.sum_over_ranks", lambda world, *values: sums.append(values) or values)
    predictions = []
    for rank in range(3):
        world = World(rank, 3, torch.device("cpu"))
        result = evaluate(gpt, gpt2, EXAMPLES, "nanogpt", world=world)["nanogpt"]
        predictions.append(result["predictions"])
    for of_ranks, expected in zip(zip(*predictions), single["predictions"]):
        assert [choice for choice in of_ranks if choice is not None] == [expected]
    counts = [values for values in sums if len(values) == 3]  # the others are flags
    n, correct, correct_norm = map(sum, zip(*counts))
    assert (n, correct / n, correct_norm / n) == (8, single["acc"], single["acc_norm"])


def test_a_compiled_model_in_training_mode_gets_the_same_scores(gpt, gpt2):
    before = evaluate(gpt, gpt2, EXAMPLES, "nanogpt")
    gpt.train()
    gpt.compile(backend="eager")
    assert evaluate(gpt, gpt2, EXAMPLES, "nanogpt") == before
    assert gpt.training


def test_an_empty_ending_is_never_chosen_and_an_empty_context_is_end_of_text(gpt, gpt2):
    e = {**EXAMPLES[0], "ctx": "", "endings": ["", "the wind sings.", "a kite", "b"]}
    result = evaluate(gpt, gpt2, [e], "nanogpt")["nanogpt"]
    expected = token_logprobs(gpt, [gpt2.eot, *gpt2.encode(" the wind sings.")]).sum()
    assert math.isclose(result["logprobs"][0][1], expected.item(), abs_tol=1e-4)
    letters = CharTokenizer(ALPHABET)  # without a space the first ending has no token
    results = evaluate(tiny_gpt(vocab_size=26, block_size=64), letters, [e])
    assert results["nanogpt"]["predictions"][0] != 0
    assert results["harness"]["predictions"][0] != 0


def test_equal_endings_are_equally_likely_and_the_first_is_chosen(gpt, gpt2):
    same = "waits for the wind."
    e = {**EXAMPLES[0], "endings": [same, "sings.", same, same]}
    for protocol in "nanogpt", "harness":
        result = evaluate(gpt, gpt2, [e], protocol)[protocol]
        assert len({result["logprobs"][0][i] for i in (0, 2, 3)}) == 1
        assert result["predictions"][0] in (0, 1)


def test_an_ending_longer_than_the_context_is_scored_in_windows(gpt2):
    gpt = tiny_gpt(vocab_size=50304, block_size=16)
    long = " ".join(PROSE.split()[:60])
    context, ending = gpt2.encode(EXAMPLES[0]["ctx"]), gpt2.encode(" " + long)
    assert len(context) > 8
    ids = context + ending
    total, done = 0.0, len(context)
    while done < len(ids):
        stop = min(max(done + 8, 17), len(ids))
        logprobs = token_logprobs(gpt, ids[max(0, stop - 17):stop])
        total += logprobs[done - stop:].sum().item()
        done = stop
    e = {**EXAMPLES[0], "endings": [long, "a", "b", "c"]}
    result = evaluate(gpt, gpt2, [e], "nanogpt")["nanogpt"]
    assert result["logprobs"][0][0] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("endings", [["", "", ""], ["a", "b", "c"], ["ж", "ж", "я"]])
@pytest.mark.parametrize("context", ["", "ж", "a"])
def test_examples_with_nothing_to_score_are_accepted(endings, context):
    e = {**EXAMPLES[0], "ctx": context, "ctx_a": context, "ctx_b": "", "endings": endings,
         "activity_label": ""}
    results = evaluate(tiny_gpt(vocab_size=26), CharTokenizer(ALPHABET), [e, EXAMPLES[0]])
    assert all(len(result["logprobs"][0]) == 3 for result in results.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_lower_precision_every_log_likelihood_is_negative_and_close(gpt, gpt2, dtype):
    exact = evaluate(gpt, gpt2, EXAMPLES, "nanogpt")["nanogpt"]["logprobs"]
    lower = evaluate(gpt.to(dtype), gpt2, EXAMPLES, "nanogpt")["nanogpt"]["logprobs"]
    assert (torch.tensor(lower) < 0).all()
    torch.testing.assert_close(torch.tensor(lower), torch.tensor(exact), rtol=0.02, atol=0.5)


def test_autocast_and_errors_leave_the_model_unchanged(gpt, gpt2):
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(gpt, gpt2, EXAMPLES[:2], "nanogpt")
    gpt.train()
    gpt.transformer.h[0].eval()
    with torch.no_grad():
        gpt.transformer.ln_f.bias[0] = float("nan")
    with pytest.raises(UserError, match="predicts NaN"):
        evaluate(gpt, gpt2, EXAMPLES)
    assert gpt.training
    assert not gpt.transformer.h[0].training
    assert gpt.transformer.h[1].training


def test_examples_without_labels_are_predicted_but_not_counted(gpt, gpt2):
    unlabelled = [{**e, "label": None} for e in EXAMPLES[:3]] + EXAMPLES[3:]
    expected = evaluate(gpt, gpt2, EXAMPLES, "nanogpt")["nanogpt"]
    result = evaluate(gpt, gpt2, unlabelled, "nanogpt")["nanogpt"]
    assert result["predictions"] == expected["predictions"]
    assert result["n"] == 5
    result = evaluate(gpt, gpt2, unlabelled[:3])["harness"]
    assert (result["acc"], result["stderr"], result["n"]) == (None, None, 0)


# --------------------------------------------------------------------------------------------------
# Files

def test_examples_are_read_plain_and_gzipped(tmp_path):
    # the first label is a number, the others are text, as some files have them
    lines = [json.dumps(EXAMPLES[0])]
    lines += [json.dumps({**e, "label": str(e["label"])}) for e in EXAMPLES[1:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in "a.jsonl", "a.jsonl.gz":
        assert read_examples(tmp_path / name) == EXAMPLES
        assert read_examples(tmp_path / name, 3) == EXAMPLES[:3]


@pytest.mark.parametrize("line", [
    json.dumps(EXAMPLES[2])[:40], "[]", "7", "[" * 100_000, json.dumps({"ctx": "a"}),
    *(json.dumps({**EXAMPLES[2], **change}) for change in (
        {"label": 4}, {"label": "x"}, {"label": 1.7}, {"label": float("inf")}, {"label": True},
        {"endings": []}, {"endings": ["a", 3]}, {"endings": "abcd"}, {"ctx_b": None}))],
    ids=lambda line: line[-40:])
def test_an_invalid_line_is_named(line, tmp_path):
    lines = [json.dumps(e) for e in EXAMPLES]
    lines[2] = line
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"Line 3 of .*b.jsonl"):
        read_examples(tmp_path / "b.jsonl")


def test_damaged_and_empty_files_are_named(tmp_path):
    compressed = gzip.compress("\n".join(map(json.dumps, EXAMPLES)).encode())
    overwritten = bytearray(compressed)
    overwritten[300:330] = b"x" * 30
    for name, content, message in (("truncated.jsonl.gz", compressed[:200], "damaged"),
                                   ("overwritten.jsonl.gz", overwritten, "damaged"),
                                   ("empty.jsonl", b"", "no examples")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_examples(tmp_path / name)


def test_the_validation_set_is_downloaded_once_and_resumes(web, tmp_path, monkeypatch):
    content = "\n".join(map(json.dumps, EXAMPLES)).encode()
    (tmp_path / "original").write_bytes(content)
    monkeypatch.setattr(hellaswag, "SHA256", sha256(tmp_path / "original"))
    monkeypatch.setattr(hellaswag, "URL", f"{web({'/h.jsonl': content})}/h.jsonl")
    partial = tmp_path / "data" / "downloads" / "hellaswag_val.jsonl.tmp"
    partial.parent.mkdir(parents=True)
    # a partial file is continued, so a wrong one fails the checksum
    partial.write_bytes(b"x" + content[1:1000])
    with pytest.raises(UserError, match="sha256 differs"):
        hellaswag.download()
    partial.write_bytes(content[:1000])
    assert read_examples(hellaswag.download()) == EXAMPLES
    assert not partial.exists()
    # later calls need no network, unless the file is damaged
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/h.jsonl")
    assert read_examples(hellaswag.download()) == EXAMPLES
    (sources.DATA / "downloads" / "hellaswag_val.jsonl").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"could not be downloaded.*--data FILE"):
        hellaswag.download()


# --------------------------------------------------------------------------------------------------
# Perplexity

@pytest.mark.parametrize("stride", [1, 20, 64])
def test_perplexity_equals_a_plain_strided_loop(gpt, gpt2, stride):
    ids = [gpt2.eot, *gpt2.encode(PROSE[:1500])]
    nats, done = 0.0, 1
    while done < len(ids):
        stop = min(len(ids), done + (64 if done == 1 else stride))
        logprobs = token_logprobs(gpt, ids[max(0, stop - 65):stop])
        nats -= logprobs[-(stop - done):].sum().item()
        done = stop
    result = perplexity(gpt, gpt2, PROSE[:1500], stride)
    assert result["tokens"] == len(ids) - 1
    assert math.isclose(result["nats_per_token"], nats / (len(ids) - 1), rel_tol=1e-5)
    assert math.isclose(result["perplexity"], math.exp(result["nats_per_token"]))
    assert math.isclose(result["bits_per_byte"], nats / math.log(2) / 1500, rel_tol=1e-5)


@pytest.mark.parametrize("text, stride", [("", None), ("a", 65), ("a", 0)])
def test_perplexity_rejects_an_empty_text_and_an_invalid_stride(gpt, gpt2, text, stride):
    with pytest.raises(UserError):
        perplexity(gpt, gpt2, text, stride)


def test_a_uniform_model_over_four_letters_needs_two_bits_per_letter():
    with torch.no_grad():
        gpt = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=4)).eval()
        gpt.transformer.wte.weight.zero_()
    result = perplexity(gpt, CharTokenizer("abcd"), "abcdabcdabcdabcdabcd")
    assert math.isclose(result["bits_per_byte"], 2, rel_tol=1e-5)
    assert result["tokens"] == result["bytes"] == 19  # the first letter is not scored


# --------------------------------------------------------------------------------------------------
# The command line

def test_the_command_prints_its_results_beside_the_published_ones(
        command, command_here, tmp_path):
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    (tmp_path / "t.txt").write_text(PROSE)
    (tmp_path / "h.bin").write_bytes(b"\xff\xfe\x00")

    program = ["hellaswag.py", "-m", "bundled:shakespeare", "-d", "cpu"]
    stdout = command(*program, "--data", "h.jsonl", "--limit", 5, "--show", 1,
                     "--json", "h.json").stdout
    for expected in ("0.2955", "0.5089", "0.337", "do not compare", "runs backwards while",
                     "predicted", "seconds", "alphabet lacks"):
        assert expected in stdout
    written = json.loads((tmp_path / "h.json").read_text())
    assert written["nanogpt"]["n"] == 5
    assert len(written["harness"]["predictions"]) == 5
    assert f"{written['nanogpt']['acc_norm']:.4f}" in stdout

    assert "bits_per_byte" in command_here(*program, "--text", "t.txt").stdout

    for arguments, message in (
            (["--data", "none.jsonl"], "none.jsonl"),
            (["--data", "h.jsonl", "--limit", "0"], "at least 1"),
            (["--text", "none.txt"], "none.txt"),
            (["--text", "h.bin"], "not UTF-8"),
            (["--data", "h.jsonl", "--json", "no/h.json"], "an existing folder"),
            (["--data", "h.jsonl", "--stride", "3"], "applies to --text only"),
            (["--text", "t.txt", "--limit", "3"], "leave out --data")):
        finished = command_here(*program, *arguments, check=False)
        assert finished.returncode == 2
        assert message in finished.stderr and finished.stderr.count("\n") == 1
