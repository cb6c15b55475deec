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


def example(ind, activity, ctx_a, ctx_b, endings, label):
    return {"ind": ind, "activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}".strip(),
            "endings": endings, "label": label, "split": "val", "split_type": "indomain", "source_id": f"x~{ind}"}


EXAMPLES = [
    example(11, "Kite flying", "Two boys unroll a red kite on a windy beach.", "the taller boy", [  # ctx_b in lowercase
        "runs backwards while the string unwinds.", "eats the kite with a fork.",
        "is shown again in a kitchen, baking bread.", "tells the wind to be quiet and it sings."], 0),
    example(12, "Peeling potatoes", "A woman stands at a sink.  She holds a peeler.", "she", [  # two blanks
        "peels a  potato in long strips.", "throws the sink away.", "paints a   wall, then another.",
        "sleeps under  the table."], 2),
    example(13, "Personal Care and Style", "[header] How to braid short hair [title] Wash it first. [step] Use a mild "
            "shampoo and let it dry. [substeps] Comb out every knot.", "", [  # WikiHow's marks, no ctx_b
                "[title] Part the hair in Three. [step] Hold one part in each hand.",
                "Buy a hat. [title] Wear it. [step] Nobody will see the hair.",
                "[step] Braid the left side, then the right side, then stop.", "Cut it all off [title] Start again."], 1),
    example(14, "Home and Garden", "[header] How to water a Cactus [title] Wait until the soil is dry. [step] Push a finger in.",
            "[title] Ask Dr. McPherson in New York [step]", [  # a mark, and so a blank, ends the context
                "Pour slowly; stop when water runs out below.", "Fill the room up to the ceiling.",
                "[step] Call the cactus by name.", " Leading and trailing blanks. "], 3),
    example(15, "Café", "A waiter in a small café carries 3 crèmes brûlées — all on one hand.", "He", [
        "doesn't drop any of them.", "drops them; „Entschuldigung“, says he.", "sings ♫ for 25 minutes…", "naïvely juggles."], 1),
    example(16, "Long jump", "An athlete waits. " * 30 + "He claps his hands above his head.", "then", [  # more than 64 tokens
        "he runs and leaps into the sand, rises, and walks off while people clap.", "he is gone.",
        "sand leaps into him.", "the bar falls on the mat behind a judge who writes a number on a board."], 0),
    example(17, "Chess", "An old man moves a pawn.", "his opponent", ["resigns.", "smiles.", "waits.", "waits."], 2),  # equals
    example(18, "Archery", "[header] Draw [title] Aim [step] Loose [note", "arrow] [x]   EVERY time", [
        "Hits.", "[a] [b] misses", "It hits [the] mark.", "A dog  barks [loudly."], 1)]


@pytest.fixture
def gpt():
    return tiny_gpt(vocab_size=50304, block_size=64)


@pytest.fixture
def gpt2():
    return load_tokenizer("gpt2")


def one_by_one(gpt, tokenizer, examples):
    """build-nanogpt's protocol as plainly as it can be: a forward pass for each ending, all of its logits."""
    found = []
    for e in examples:
        sums, means = [], []
        for ending in e["endings"]:
            context, tokens = tokenizer.encode(e["ctx"]), tokenizer.encode(" " + ending)
            ids = torch.tensor([(context + tokens)[-gpt.config.block_size - 1:]])
            logits = gpt(ids[:, :-1])[0][0, :, :tokenizer.vocab_size]
            losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")[-len(tokens):]
            sums.append(-losses.sum().item())
            means.append(losses.mean().item())
        found.append((sums, sums.index(max(sums)), means.index(min(means))))
    return found


@pytest.mark.parametrize("batch_tokens", [None, 1, 150])
def test_nanogpts_protocol_is_the_plain_loop_example_by_example(gpt, gpt2, batch_tokens):
    result = evaluate(gpt, gpt2, EXAMPLES, "nanogpt", batch_tokens)["nanogpt"]
    plain = one_by_one(gpt, gpt2, EXAMPLES)
    torch.testing.assert_close(torch.tensor(result["logprobs"]), torch.tensor([sums for sums, _, _ in plain]), atol=1e-3, rtol=0)
    assert result["predictions"] == [norm for _, _, norm in plain]
    labels = [e["label"] for e in EXAMPLES]
    assert result["acc"] == sum(choice == label for (_, choice, _), label in zip(plain, labels)) / 8
    assert result["acc_norm"] == sum(norm == label for (_, _, norm), label in zip(plain, labels)) / 8
    p = result["acc_norm"]
    assert result["n"] == 8 and math.isclose(result["stderr"], math.sqrt(p * (1 - p) / 7))


@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_the_harness_protocol_is_lm_evaluation_harness_example_by_example(kind, tmp_path):
    tasks = pytest.importorskip("lm_eval.tasks")
    from datasets import Dataset  # noqa: PLC0415
    from lm_eval.api.task import ConfigurableTask  # noqa: PLC0415
    from lm_eval.evaluator import evaluate as their_evaluate  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
    from lm_eval.tasks._yaml_loader import load_yaml  # noqa: PLC0415

    letters = "".join(sorted(set("".join(json.dumps(e, ensure_ascii=False) for e in EXAMPLES))))
    tokenizer = load_tokenizer("gpt2") if kind == "gpt2" else CharTokenizer(letters)
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size + 47, block_size=64 if kind == "gpt2" else 128)
    save_huggingface(tmp_path, gpt, tokenizer, torch.float32)
    task = load_yaml(f"{tasks.__path__[0]}/hellaswag/hellaswag.yaml")
    task = ConfigurableTask(config={**{key: value for key, value in task.items() if key != "tag"}, "training_split": None,
                                    "num_fewshot": 0,
                                    "custom_dataset": lambda **_: {"validation": Dataset.from_list(EXAMPLES)}})
    options = {} if kind == "gpt2" else {"prefix_token_id": 0}  # it wants one, and does not use it here
    done = their_evaluate(HFLM(str(tmp_path), device="cpu", dtype="float32", batch_size=1, **options),
                          {"tasks": {"hellaswag": task}}, bootstrap_iters=10)
    samples = sorted(done["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    theirs = torch.tensor([[logprob for logprob, _ in sample["filtered_resps"]] for sample in samples])

    ours = evaluate(gpt, tokenizer, EXAMPLES, "harness")["harness"]
    torch.testing.assert_close(torch.tensor(ours["logprobs"]), theirs, atol=1e-3, rtol=0)
    assert [e["label"] == choice for e, choice in zip(EXAMPLES, ours["predictions"])] == [bool(s["acc_norm"]) for s in samples]
    figures = done["results"]["hellaswag"]
    assert (ours["acc"], ours["acc_norm"]) == (figures["acc,none"], figures["acc_norm,none"])
    assert math.isclose(ours["stderr"], figures["acc_norm_stderr,none"])


def test_padded_ids_have_no_probability(gpt, gpt2):
    before = evaluate(gpt, gpt2, EXAMPLES)
    with torch.no_grad():
        gpt.transformer.wte.weight[50257:] += 100
    assert evaluate(gpt, gpt2, EXAMPLES) == before


def test_ranks_share_the_examples_and_no_example_is_scored_twice(gpt, gpt2, monkeypatch):
    whole, parts = evaluate(gpt, gpt2, EXAMPLES, "nanogpt")["nanogpt"], []
    monkeypatch.setattr("ddp.sum_over_ranks", lambda world, *values: parts.append(values) or values)
    seen = [evaluate(gpt, gpt2, EXAMPLES, "nanogpt", world=World(rank, 3, torch.device("cpu")))["nanogpt"]["predictions"]
            for rank in range(3)]
    assert [[choice for choice in choices if choice is not None] for choices in zip(*seen)] == [[c] for c in whole["predictions"]]
    n, right, right_norm = map(sum, zip(*parts))
    assert (n, right / n, right_norm / n) == (8, whole["acc"], whole["acc_norm"])


def test_a_compiled_model_and_one_in_training_are_scored_alike(gpt, gpt2):
    before = evaluate(gpt, gpt2, EXAMPLES, "nanogpt")
    gpt.train()
    gpt.compile(backend="eager")
    assert evaluate(gpt, gpt2, EXAMPLES, "nanogpt") == before and gpt.training


def test_an_ending_without_tokens_is_never_chosen_and_an_empty_context_begins_with_end_of_text(gpt, gpt2):
    e = {**EXAMPLES[0], "ctx": "", "endings": ["", "the wind sings.", "a kite", "b"]}
    result = evaluate(gpt, gpt2, [e], "nanogpt")["nanogpt"]
    ids = torch.tensor([[gpt2.eot, *gpt2.encode(" the wind sings.")]])
    logprobs = gpt(ids[:, :-1])[0][0, :, :50257].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert math.isclose(result["logprobs"][0][1], logprobs.item(), abs_tol=1e-4)
    letters = CharTokenizer("abcdefghijklmnopqrstuvwxyz")  # has no blank, so the first ending has no token
    choices = evaluate(tiny_gpt(vocab_size=26, block_size=64), letters, [e])
    assert choices["nanogpt"]["predictions"][0] != 0 and choices["harness"]["predictions"][0] != 0


def test_equal_endings_are_equally_likely_and_the_first_is_chosen(gpt, gpt2):
    e = {**EXAMPLES[0], "endings": ["waits for the wind.", "sings.", "waits for the wind.", "waits for the wind."]}
    for protocol in "nanogpt", "harness":
        result = evaluate(gpt, gpt2, [e], protocol)[protocol]
        assert len({result["logprobs"][0][i] for i in (0, 2, 3)}) == 1 and result["predictions"][0] in (0, 1)


def test_an_ending_longer_than_the_model_reads_is_scored_whole_in_windows(gpt2):
    gpt, long = tiny_gpt(vocab_size=50304, block_size=16), " ".join(PROSE.split()[:60])
    e = {**EXAMPLES[0], "endings": [long, "a", "b", "c"]}
    total, ids = 0.0, gpt2.encode(e["ctx"]) + gpt2.encode(" " + long)
    start = done = len(gpt2.encode(e["ctx"]))
    while done < len(ids):
        stop = min(max(done + 8, 17), len(ids))
        window = torch.tensor([ids[max(0, stop - 17):stop]])
        logprobs = gpt(window[:, :-1])[0][0, :, :50257].log_softmax(-1).gather(1, window[0, 1:, None])
        total, done = total + logprobs[done - stop:].sum().item(), stop
    assert start > 8 and evaluate(gpt, gpt2, [e], "nanogpt")["nanogpt"]["logprobs"][0][0] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("endings", [["", "", ""], ["a", "b", "c"], ["ж", "ж", "я"]])
@pytest.mark.parametrize("context", ["", "ж", "a"])
def test_examples_that_leave_nothing_to_score_are_scored_as_nothing(endings, context):
    e = {**EXAMPLES[0], "ctx": context, "ctx_a": context, "ctx_b": "", "endings": endings, "activity_label": ""}
    result = evaluate(tiny_gpt(vocab_size=26), CharTokenizer("abcdefghijklmnopqrstuvwxyz"), [e, EXAMPLES[0]])
    assert all(len(result[protocol]["logprobs"][0]) == 3 for protocol in result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_lower_precision_no_token_is_likelier_than_certain(gpt, gpt2, dtype):
    exact = evaluate(gpt, gpt2, EXAMPLES, "nanogpt")["nanogpt"]["logprobs"]
    sure = torch.tensor(evaluate(gpt.to(dtype), gpt2, EXAMPLES, "nanogpt")["nanogpt"]["logprobs"])
    assert (sure < 0).all()
    torch.testing.assert_close(sure, torch.tensor(exact), rtol=0.02, atol=0.5)


def test_scoring_under_autocast_and_an_early_end_leave_the_model_as_it_was(gpt, gpt2):
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(gpt, gpt2, EXAMPLES[:2], "nanogpt")
    gpt.train()
    gpt.transformer.h[0].eval()
    with torch.no_grad():
        gpt.transformer.ln_f.bias[0] = float("nan")
    with pytest.raises(UserError, match="predicts NaN"):
        evaluate(gpt, gpt2, EXAMPLES)
    assert gpt.training and not gpt.transformer.h[0].training and gpt.transformer.h[1].training


def test_examples_without_labels_are_predicted_and_not_counted(gpt, gpt2):
    unlabelled = [{**e, "label": None} for e in EXAMPLES[:3]] + EXAMPLES[3:]
    with_labels, without = (evaluate(gpt, gpt2, them, "nanogpt")["nanogpt"] for them in (EXAMPLES, unlabelled))
    assert without["predictions"] == with_labels["predictions"] and without["n"] == 5
    nothing = evaluate(gpt, gpt2, unlabelled[:3])["harness"]
    assert nothing["acc"] is None and nothing["stderr"] is None and nothing["n"] == 0


def test_files_are_read_plain_and_gzipped_and_a_malformed_line_is_named(tmp_path):
    lines = [json.dumps({**e, "label": str(e["label"]) if i else e["label"]}) for i, e in enumerate(EXAMPLES)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in "a.jsonl", "a.jsonl.gz":
        assert read_examples(tmp_path / name) == EXAMPLES and read_examples(tmp_path / name, 3) == EXAMPLES[:3]
    whole = lines[2]
    for damaged in (whole[:40], "[]", "7", json.dumps({"ctx": "a"}), json.dumps({**EXAMPLES[2], "label": 4}),
                    json.dumps({**EXAMPLES[2], "endings": []}), json.dumps({**EXAMPLES[2], "ctx_b": None}),
                    json.dumps({**EXAMPLES[2], "endings": ["a", 3]}), json.dumps({**EXAMPLES[2], "label": "x"}),
                    json.dumps({**EXAMPLES[2], "endings": "abcd"}), json.dumps({**EXAMPLES[2], "label": 1.7}), "[" * 100_000,
                    json.dumps({**EXAMPLES[2], "label": float("inf")}), json.dumps({**EXAMPLES[2], "label": True})):
        (tmp_path / "b.jsonl").write_text("\n".join([*lines[:2], damaged, *lines[3:]]), encoding="utf-8")
        with pytest.raises(UserError, match=r"Line 3 of .*b.jsonl"):
            read_examples(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:200])
    (tmp_path / "d.jsonl").write_bytes(b"")
    damaged = bytearray((tmp_path / "a.jsonl.gz").read_bytes())
    damaged[300:330] = b"x" * 30
    (tmp_path / "e.jsonl.gz").write_bytes(damaged)
    for name, sentence in ("c.jsonl.gz", "damaged"), ("d.jsonl", "no examples"), ("e.jsonl.gz", "damaged"):
        with pytest.raises(UserError, match=sentence):
            read_examples(tmp_path / name)


def test_perplexity_is_the_plain_strided_one(gpt, gpt2):
    ids = [gpt2.eot, *gpt2.encode(PROSE[:1500])]
    for stride in 1, 20, 64:
        total, done = 0.0, 1
        while done < len(ids):
            stop = min(len(ids), done + (64 if done == 1 else stride))
            window = torch.tensor([ids[max(0, stop - 65):stop]])
            logprobs = gpt(window[:, :-1])[0][0, :, :50257].log_softmax(-1).gather(1, window[0, 1:, None])
            total -= logprobs[-(stop - done):].sum().item()
            done = stop
        found = perplexity(gpt, gpt2, PROSE[:1500], stride)
        assert math.isclose(found["nats_per_token"], total / (len(ids) - 1), rel_tol=1e-5)
        assert math.isclose(found["perplexity"], math.exp(found["nats_per_token"])) and found["tokens"] == len(ids) - 1
        assert math.isclose(found["bits_per_byte"], total / math.log(2) / 1500, rel_tol=1e-5)
    for text, stride in ("", None), ("a", 65), ("a", 0):
        with pytest.raises(UserError):
            perplexity(gpt, gpt2, text, stride)


def test_a_model_that_knows_nothing_needs_all_the_bits_of_a_letter():
    letters = CharTokenizer("abcd")
    with torch.no_grad():
        gpt = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=4)).eval()
        gpt.transformer.wte.weight.zero_()
    found = perplexity(gpt, letters, "abcdabcdabcdabcdabcd")
    assert math.isclose(found["bits_per_byte"], 2, rel_tol=1e-5) and found["tokens"] == found["bytes"] == 19


def test_the_command_prints_the_figures_beside_the_published_ones(command, tmp_path):
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    done = command("hellaswag.py", "-m", "bundled:shakespeare", "-d", "cpu", "--data", "h.jsonl", "--limit", 5, "--show", 1,
                   "--json", "h.json")
    for said in "0.2955", "0.5089", "0.337", "do not compare", "runs backwards while", "predicted", "seconds", "alphabet lacks":
        assert said in done.stdout
    written = json.loads((tmp_path / "h.json").read_text())
    assert written["nanogpt"]["n"] == 5 and len(written["harness"]["predictions"]) == 5
    assert f"{written['nanogpt']['acc_norm']:.4f}" in done.stdout
    (tmp_path / "t.txt").write_text(PROSE)
    (tmp_path / "h.bin").write_bytes(b"\xff\xfe\x00")
    assert "bits_per_byte" in command("hellaswag.py", "-m", "bundled:shakespeare", "--text", "t.txt").stdout
    for arguments, sentence in ((["--data", "none.jsonl"], "none.jsonl"), (["--data", "h.jsonl", "--limit", "0"], "at least 1"),
                                (["--text", "none.txt"], "none.txt"), (["--text", "h.bin"], "not UTF-8"),
                                (["--data", "h.jsonl", "--json", "no/h.json"], "a folder that there is"),
                                (["--data", "h.jsonl", "--stride", "3"], "belongs to --text"),
                                (["--text", "t.txt", "--limit", "3"], "leave --data")):
        done = command("hellaswag.py", "-m", "bundled:shakespeare", *arguments, check=False)
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_the_examples_are_downloaded_once_checked_and_a_broken_download_goes_on(web, tmp_path, monkeypatch):
    content = "\n".join(map(json.dumps, EXAMPLES)).encode()
    (tmp_path / "there").write_bytes(content)
    monkeypatch.setattr(hellaswag, "SHA256", sha256(tmp_path / "there"))
    monkeypatch.setattr(hellaswag, "URL", f"{web({'/h.jsonl': content})}/h.jsonl")
    part = tmp_path / "data" / "downloads" / "hellaswag_val.jsonl.tmp"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" + content[1:1000])
    with pytest.raises(UserError, match="sha256 differs"):  # it went on from what was there
        hellaswag.download()
    part.write_bytes(content[:1000])
    assert read_examples(hellaswag.download()) == EXAMPLES and not part.exists()
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/h.jsonl")
    assert read_examples(hellaswag.download()) == EXAMPLES
    (sources.DATA / "downloads" / "hellaswag_val.jsonl").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"could not be downloaded.*--data FILE"):
        hellaswag.download()
