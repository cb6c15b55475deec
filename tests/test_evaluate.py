"""evaluate.py and the engine as a model of lm-evaluation-harness."""
import functools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PROSE, small_bpe, tiny_gpt

import checkpoint
import evaluate
import generate
from common.errors import UserError
from engine.likelihood import SharedPrefix, group_by_prefix, log_likelihoods
from generate import Engine
from weights.huggingface import save_huggingface

WORDS = PROSE.split()
EXAMPLES = [{"question": " ".join(WORDS[i:i + 8]), "label": i % 3,
             "answers": [" ".join(WORDS[i + 8:i + 8 + n]) for n in (1, 2, 4)]}
            for i in range(0, 60, 5)]
COMMON = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}", "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "contexts": {  # several contexts and one continuation, as in WinoGrande
        "output_type": "multiple_choice", "doc_to_text": "{{label}}",
        "doc_to_choice": "{{answers}}", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "acc"}]},
    "last_word": {
        "output_type": "loglikelihood", "doc_to_text": "{{question}}",
        "doc_to_target": " {{answers[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
    "few_shot": {
        "output_type": "multiple_choice", "doc_to_text": "{{question[:9]}}:",
        "doc_to_choice": ["yes", "no"], "doc_to_target": "{{label % 2}}", "num_fewshot": 2,
        "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}]},
    "texts": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{question * 3}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    "completion": {
        "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answers[2]}}",
        # 24 tokens, which transformers takes from generation_config.json anyway
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}]},
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of each shape, and its data."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "examples.jsonl"
    data.write_text("\n".join(map(json.dumps, EXAMPLES)), encoding="utf-8")
    for task, fields in TASKS.items():
        content = {**COMMON, "task": task, **fields,
                   "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{task}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return folder


@pytest.fixture
def model_folder(tmp_path):
    save_huggingface(tmp_path / "model", tiny_gpt(vocab_size=300, block_size=48), small_bpe(),
                     torch.float32)
    return tmp_path / "model"


# --------------------------------------------------------------------------------------------------
# The harness

def test_every_shape_of_task_has_the_figures_of_the_hugging_face_backend(tasks, model_folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    pytest.importorskip("accelerate")
    from lm_eval import simple_evaluate  # noqa: PLC0415 (an optional package)

    config = evaluate.EvaluateConfig(tasks=",".join(TASKS), task_folder=tasks)
    manager, names = evaluate.load_tasks(config)
    model, tokenizer, _ = checkpoint.load_model(model_folder)
    ours = evaluate.evaluate(Engine(model, tokenizer, "float32"), names, manager)
    theirs = simple_evaluate(huggingface.HFLM(str(model_folder), device="cpu", dtype="float32"),
                             tasks=names, task_manager=manager, bootstrap_iters=0)
    for task in TASKS:
        for our_sample, their_sample in zip(ours["samples"][task], theirs["samples"][task]):
            assert our_sample["doc_id"] == their_sample["doc_id"]
            for (our, *_), (their, *_) in zip(our_sample["resps"], their_sample["resps"]):
                same = their if isinstance(their, str) else pytest.approx(their, abs=1e-3)
                assert our == same, task
        for metric, value in ours["results"][task].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert value == pytest.approx(theirs["results"][task][metric], rel=1e-4), metric


def generate_until(options: dict, requests: int = 1, **limits) -> list[str]:
    """What the engine generates for equal requests of the harness with a task's options."""
    pytest.importorskip("lm_eval")
    from engine.harness import HarnessModel  # noqa: PLC0415 (it imports an optional package)

    engine = Engine(tiny_gpt(vocab_size=300), small_bpe(), **limits)
    request = SimpleNamespace(args=("The fox", {"until": [], "max_gen_toks": 20, **options}))
    return HarnessModel(engine).generate_until([request] * requests)


def test_a_task_that_does_not_mention_sampling_is_greedy():
    assert generate_until({}) == generate_until({"do_sample": False})


def test_the_texts_of_a_repeated_request_differ_but_not_between_runs():
    sampling = {"do_sample": True, "temperature": 1.0}
    texts = generate_until(sampling, requests=3)
    assert len(set(texts)) == 3
    assert generate_until(sampling, requests=3) == texts


def test_a_slow_machine_cuts_no_text_of_a_task_short():
    options = {"do_sample": False}
    assert generate_until(options, deadline_s=0) == generate_until(options)


def test_main_prints_a_table_and_writes_json(tasks, model_folder, capsys, tmp_path):
    evaluate.main(evaluate.EvaluateConfig(
        model=str(model_folder), tasks="choices,last_w*", task_folder=tasks, limit=3,
        json=tmp_path / "out.json"))
    printed = capsys.readouterr().out
    assert "acc_norm" in printed and "choices, centered accuracy" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written["results"]) == set(written["centered"]) == {"choices", "last_word"}
    assert written["n-samples"]["choices"]["effective"] == 3


@pytest.mark.parametrize(("asked", "used"), [("auto", "float32"), ("int8", "int8")])
def test_a_cpu_evaluates_in_float32_unless_asked_otherwise(monkeypatch, model_folder, asked, used):
    monkeypatch.setattr(generate, "LARGE_MODEL", 0)  # the engine's own choice would be int8
    monkeypatch.setattr(evaluate, "load_tasks", lambda config: (None, []))
    monkeypatch.setattr(evaluate, "print_results", lambda results: None)
    dtypes = []
    monkeypatch.setattr(evaluate, "evaluate", lambda engine, *_: dtypes.append(engine.dtype))
    evaluate.main(evaluate.EvaluateConfig(
        model=str(model_folder), device="cpu", dtype=asked, tasks=""))
    assert dtypes == [used]


def test_centered_accuracy_is_0_for_guessing_and_1_for_a_perfect_model():
    def results(accuracy, answers):
        return {"results": {"x": {"acc,none": accuracy}},
                "samples": {"x": [{"resps": [0] * answers}] * 5}}
    for accuracy, answers, centered in (0.25, 4, 0), (1, 4, 1), (0.4, 1, 0.4), (0.1, 2, -0.8):
        assert evaluate.centered_accuracies(results(accuracy, answers))["x"] == (
            pytest.approx(centered))


def test_mistakes_get_one_sentence(tasks, tmp_path, monkeypatch):
    # leave out the harness's own tasks, as reading them takes long
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (an optional package)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager,
                                                                       include_defaults=False))
    (tasks / "gone.yaml").write_text(json.dumps(
        {**COMMON, "task": "gone", **TASKS["choices"],
         "dataset_kwargs": {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}}))
    for options, message in [
            ({"tasks": "choices,nothing", "task_folder": tasks}, "There is no task 'nothing'"),
            ({"tasks": "gone", "task_folder": tasks}, "The tasks gone could not be loaded"),
            ({"tasks": "choices", "task_folder": tasks / "x"}, "There is no folder"),
            ({"tasks": "choices", "limit": 0}, "--limit must be at least 1"),
            ({"tasks": "choices", "num_fewshot": -1}, "--num-fewshot must be at least 0")]:
        with pytest.raises(UserError, match=message):
            evaluate.main(evaluate.EvaluateConfig(**options))


def test_without_the_harness_a_sentence_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="Install it with: pip install 'lm-eval"):
        evaluate.main(evaluate.EvaluateConfig(tasks="piqa"))


# --------------------------------------------------------------------------------------------------
# Shared prefixes

def test_pairs_that_share_a_prefix_are_scored_together_as_separately():
    model = tiny_gpt(vocab_size=32, block_size=32)
    shared = [3, 1, 4, 1, 5, 9, 2, 6]
    pairs = [(shared, [7]), (shared, [8, 8, 8]), ([*shared, 10, 11], [12]), (shared[:3], [20]),
             ([1], [2, 3]), (shared, [7])]
    groups = group_by_prefix(pairs, max_tokens=64)
    assert max(len(group.indices) for group in groups) >= 4
    assert sorted(i for group in groups for i in group.indices) == list(range(len(pairs)))

    def scores(parts):
        items = [[part._replace(indices=list(range(len(part.continuations))))] for part in parts]
        result = {}
        for item, likelihoods in log_likelihoods(model, 32, items, None):
            result |= dict(zip(parts[item].indices, likelihoods))
        return result

    together = scores(groups)
    separately = scores([SharedPrefix(context, [continuation], [i])
                         for i, (context, continuation) in enumerate(pairs)])
    for i in range(len(pairs)):
        assert together[i].logprob == pytest.approx(separately[i].logprob, abs=1e-4)
        assert together[i].is_greedy == separately[i].is_greedy


def test_a_continuation_is_greedy_if_greedy_decoding_writes_it():
    engine = Engine(tiny_gpt(vocab_size=300), small_bpe())
    context = engine.tokenizer.encode("The fox")
    ids = [event[1].id for event in engine.submit(context, max_new_tokens=4, temperature=0)
           if not isinstance(event[1], str)]
    items = [[SharedPrefix(context, [ids, [*ids[:-1], (ids[-1] + 1) % 300]], [0, 1])]]
    ((_, (greedy, other)),) = log_likelihoods(engine.model, 300, items, None)
    assert greedy.is_greedy and not other.is_greedy
