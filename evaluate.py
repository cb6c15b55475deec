"""Evaluates a model on tasks of lm-evaluation-harness: multiple choice, perplexity, generation.

    pip install 'lm-eval>=0.4.13,<0.5'
    python evaluate.py -m gpt2 --tasks lambada_openai,arc_easy,piqa
    python evaluate.py --tasks my_task --task-folder my_tasks    # your own, without a network

`lm-eval ls tasks` lists the tasks. A task of your own is a YAML file, see docs/evaluation.md.

Besides the harness's table this prints centered accuracies, which are 0 for guessing and 1 for a
perfect model, and their mean. CORE combines its tasks in this way (Li et al. 2024, "DataComp-LM",
arXiv 2406.11794).
"""
import dataclasses
import statistics
import sys
from pathlib import Path

from common.program import report_user_errors

import tyro

from checkpoint import describe
from common.errors import UserError, check_range
from common.files import write_json
from generate import Dtype, Engine, ModelConfig


@dataclasses.dataclass(kw_only=True)
class EvaluateConfig(ModelConfig):
    """Evaluates a model on tasks of lm-evaluation-harness."""

    tasks: str  # Names of tasks, separated by commas; * stands for any characters.
    task_folder: Path | None = None  # A folder with YAML files of more tasks.
    limit: int | None = None  # Use only the first LIMIT examples of each task.
    num_fewshot: int | None = None
    """Number of solved examples before each question. Default: the task's own."""
    dtype: Dtype = "auto"
    """auto is float32 on a CPU, bfloat16 on hardware that computes it, float16 on older GPUs."""
    batch_tokens: int | None = None
    """Tokens per forward pass. Default: 1,024 on a CPU, 65,536 elsewhere."""
    json: Path | None = None  # Write the results to this file.


def main(config: EvaluateConfig):
    check_range(config, "at least 1", lambda n: n >= 1, "limit", "batch_tokens")
    check_range(config, "at least 0", lambda n: n >= 0, "num_fewshot")

    # load the tasks first: their errors come before a model is loaded
    manager, names = load_tasks(config)
    engine, info = config.load(auto_on_cpu="float32")
    print(f"{info['name']}: {describe(info)}; {engine.dtype} on {engine.device}")

    results = evaluate(engine, names, manager, config.limit, config.num_fewshot,
                       config.batch_tokens)
    print_results(results)
    if config.json:
        keys = ("results", "groups", "versions", "n-shot", "n-samples")
        write_json(config.json, {
            "model": info["name"], "dtype": engine.dtype, "centered": centered_accuracies(results),
            **{key: results[key] for key in keys if key in results}})


def load_tasks(config: EvaluateConfig):
    """(the harness's TaskManager, names of the tasks that config.tasks stands for).

    Raises UserError if the harness is not installed, or if a task is not found or has no data.
    """
    # the tasks import Hugging Face's package `evaluate`, which this file would shadow
    if sys.path[0] == str(Path(__file__).parent):
        sys.path.append(sys.path.pop(0))
    try:
        from lm_eval.tasks import TaskManager  # noqa: PLC0415 (an optional package)
    except ModuleNotFoundError:
        raise UserError("evaluate.py needs lm-evaluation-harness. Install it with: "
                        "pip install 'lm-eval>=0.4.13,<0.5'") from None
    if config.task_folder and not config.task_folder.is_dir():
        raise UserError(f"There is no folder {config.task_folder}.")

    # look for the names in the folder; only then read the harness's own tasks, which takes seconds
    patterns = [name.strip() for name in config.tasks.split(",")]
    folder = config.task_folder and str(config.task_folder)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([pattern]) for pattern in patterns):
        manager = TaskManager(include_path=folder)
    for pattern in patterns:
        if not manager.match_tasks([pattern]):
            raise UserError(f"There is no task {pattern!r}: `lm-eval ls tasks` lists them, and "
                            "--task-folder names a folder with others.")
    names = manager.match_tasks(patterns)
    try:
        manager.load(names)
    except Exception as error:  # a task's file can raise anything, and so can a download
        raise UserError(f"The tasks {config.tasks} could not be loaded ({type(error).__name__}: "
                        f"{error}): their data are downloaded at first use, or come from local "
                        "files with --task-folder.") from None
    return manager, names


def evaluate(engine: Engine, tasks: list[str], manager=None, limit: int | None = None,
             num_fewshot: int | None = None, batch_tokens: int | None = None) -> dict:
    """The harness's results for the tasks, with all samples, as its `simple_evaluate` returns."""
    from lm_eval import simple_evaluate  # noqa: PLC0415 (an optional package)

    from engine.harness import HarnessModel  # noqa: PLC0415 (it imports the harness)
    return simple_evaluate(HarnessModel(engine, batch_tokens), tasks=tasks, task_manager=manager,
                           limit=limit, num_fewshot=num_fewshot, bootstrap_iters=1000)


def print_results(results: dict):
    from lm_eval.utils import make_table  # noqa: PLC0415 (an optional package)

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    centered = centered_accuracies(results)
    for task, accuracy in centered.items():
        print(f"{accuracy:>10.4f}  {task}, centered accuracy")
    if len(centered) > 1:
        print(f"{statistics.mean(centered.values()):>10.4f}  mean of {len(centered)} tasks")


def centered_accuracies(results: dict) -> dict[str, float]:
    """(accuracy - chance) / (1 - chance) of each task that has an accuracy.

    The accuracy is acc_norm if the task has it. Chance is 1 / (number of answers), averaged over
    the examples, and 0 if there are no answers to choose from.
    """
    centered = {}
    for task, samples in results["samples"].items():
        scores = results["results"][task]
        accuracy = scores.get("acc_norm,none", scores.get("acc,none"))
        if accuracy is not None:
            answers = [len(sample["resps"]) for sample in samples]  # one response per answer
            chance = statistics.mean(1 / n if n > 1 else 0 for n in answers)
            centered[task] = (accuracy - chance) / (1 - chance)
    return centered


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(EvaluateConfig))
