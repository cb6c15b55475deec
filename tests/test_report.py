"""Tables, figures and plots of a run."""
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

import report
from common.errors import UserError


@pytest.fixture
def fake_run(tmp_path):
    """A run on 8 A100s that reached step 30, resumed at step 20, and was cut off while writing."""
    device = {"device": "NVIDIA A100-SXM4-80GB", "processes": 8}
    lines = [{"time": 0, "event": "start", "step": 0, **device},
             {"time": 100, "step": 0, "val_loss": 10.9, "hellaswag": 0.25},
             {"time": 1000, "step": 10, "train_loss": 6.0, "tokens_per_s": 1_700_000},
             {"time": 1800, "step": 20, "val_loss": 5.0, "hellaswag": 0.26},
             {"time": 3600, "step": 30, "train_loss": 99.0},
             {"time": 90_000, "event": "resume", "step": 20, **device},
             {"time": 93_600, "step": 30, "train_loss": 4.5, "tokens_per_s": 1_500_000}]
    log = "\n".join(map(json.dumps, lines)) + '\n{"time": 93601, "ste'
    (tmp_path / "metrics.jsonl").write_text(log)
    sample = {"time": 1, "step": 20, "prompt": "a", "text": "ab"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    config = {"batch_tokens": 2**19, "data": "edu_fineweb10B"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Tables

def test_steps_lost_to_a_resume_and_an_incomplete_line_do_not_count(fake_run):
    frame = report.loss(fake_run).query("curve == 'training'")
    assert frame[["step", "loss"]].to_numpy().tolist() == [[10, 6.0], [30, 4.5]]
    assert frame["tokens"].tolist() == [10 * 2**19, 30 * 2**19]
    samples = report.samples(fake_run).to_dict("records")
    assert samples == [{"step": 20, "prompt": "a", "text": "ab"}]


def test_damage_that_is_still_json_is_left_out(fake_run):
    """A name that is not Unicode, and a vocabulary whose size is not a number."""
    with open(fake_run / "metrics.jsonl", "a") as file:
        file.write('\n{"time": 93602, "step": 31, "\\ud800": 1}\n')
        file.write('{"time": 93603, "step": 30, "event": "resume", "processes": "eight"}\n')
    config = {"batch_tokens": 2**19, "data": "edu_fineweb10B", "vocab_size": [1]}
    (fake_run / "config.json").write_text(json.dumps(config))
    assert report.metrics(fake_run)["step"].max() == 30
    assert set(report.loss(fake_run)["curve"]) == {"training", "validation"}
    assert report.cost(fake_run)


def test_numbers_beyond_the_range_of_a_float_are_left_out(fake_run):
    huge = "9" * 400
    device = '"device": "NVIDIA A100-SXM4-80GB"'
    with open(fake_run / "metrics.jsonl", "a") as file:
        file.write(f'\n{{"time": 93602, "step": 30, "val_loss": {huge}}}\n'
                   f'{{"time": 93602, "step": 1e308, "val_loss": 5}}\n'  # times batch_tokens
                   f'{{"time": 93603, "step": 30, "event": "resume", {device}, '
                   f'"processes": {huge}}}\n')
    assert report.loss(fake_run)["loss"].max() < 11
    assert report.metrics(fake_run)["tokens"].max() == 30 * 2**19
    assert report.summary(fake_run)["machine"] == "8 x NVIDIA A100-SXM4-80GB"
    for batch_tokens in 0, 2**63, int(huge):
        (fake_run / "config.json").write_text(json.dumps({"batch_tokens": batch_tokens}))
        with pytest.raises(UserError, match="not a run with measurements"):
            report.summary(fake_run)


def test_published_curves_accompany_only_runs_on_fineweb_edu(fake_run):
    curves = report.loss(fake_run).groupby("curve")["loss"].last()
    assert curves["allenporter/nano-gpt"] == 3.0538 and curves["samkeet/GPT_124M"] == 2.9716
    assert set(report.hellaswag(fake_run)["curve"]) == {"HellaSwag", "samkeet/GPT_124M"}
    config = {"batch_tokens": 100, "data": "data/tiny_shakespeare_char"}
    (fake_run / "config.json").write_text(json.dumps(config))
    assert set(report.loss(fake_run)["curve"]) == {"training", "validation"}


def test_a_loss_is_compared_with_the_published_runs_after_as_many_tokens():
    # their files are read once
    assert report.published_curves("loss") is report.published_curves("loss")
    comparison = report.compare_to_published(19_072 * 2**19, 3.13)
    assert re.match(r"0\.0\d (above|below) the published runs after 9,999,220,736 tokens",
                    comparison)
    assert report.compare_to_published(0, 12.0).startswith("1.06 above")
    assert report.compare_to_published(0, 10.93).startswith("between")


def test_a_damaged_log_still_gives_its_intact_lines(fake_run):
    with open(fake_run / "metrics.jsonl", "ab") as file:
        file.write(b'\n3\n{"step": "x", "time": 1}\n{"step": 40}\n\xff\n' + b"[" * 10**5 + b"\n"
                   b'{"time": 1, "step": 1e999}\n'
                   b'{"time": 1, "step": 40, "val_loss": Infinity}\n')
    assert report.loss(fake_run)["loss"].max() < 11
    report.plot(report.loss(fake_run))
    for damaged in "{", "[]", "{}", "[" * 10**5:
        (fake_run / "config.json").write_text(damaged)
        with pytest.raises(UserError):
            report.summary(fake_run)


def test_a_folder_without_a_run_gets_one_sentence(tmp_path):
    with pytest.raises(UserError, match="not a run with measurements"):
        report.summary(tmp_path)


# --------------------------------------------------------------------------------------------------
# Figures

def test_energy_counts_lost_hours_but_not_the_time_between_sessions(fake_run):
    """One hour before the interruption and one after it, at eight times 400 W."""
    figures = report.summary(fake_run)
    assert figures["time"].startswith("2.00 hours")
    assert figures["machine"] == "8 x NVIDIA A100-SXM4-80GB"
    assert figures["energy"].startswith("6.4 kWh")
    assert figures["CO2e"].startswith(f"{6.4 * 0.473:.1f} kg")
    assert figures["best validation loss"] == "5.0000 nats per token (step 20)"
    assert figures["throughput, median"] == "1,600,000 tokens/s"


def test_a_device_is_looked_up_once_however_long_the_log_is(fake_run, monkeypatch):
    names = []
    monkeypatch.setattr(report, "find_device", names.append)
    report.cost(fake_run)
    assert names == ["NVIDIA A100-SXM4-80GB"]


def test_a_clock_that_is_set_back_takes_no_time_from_the_report(fake_run):
    path = fake_run / "metrics.jsonl"
    lines = path.read_text().replace('"time": 3600,', '"time": -9000,')
    path.write_text(lines)
    assert report.summary(fake_run)["time"].startswith("1.50 hours")  # without the line's 1,800 s


def test_no_energy_is_stated_for_an_unknown_device(fake_run):
    path = fake_run / "metrics.jsonl"
    path.write_text(path.read_text().replace("NVIDIA A100-SXM4-80GB", "cpu"))
    assert report.summary(fake_run)["energy, CO2e"].startswith("not stated")


# --------------------------------------------------------------------------------------------------
# Plots

def test_the_command_prints_the_figures_and_draws_the_plots(fake_run, command):
    done = command("report.py", fake_run, "--out", fake_run / "plots")
    assert "2.00 hours" in done.stdout and "6.4 kWh" in done.stdout
    for name in "loss.png", "hellaswag.png", "throughput.png":
        with Image.open(fake_run / "plots" / name) as image:
            assert image.size == (1050, 630)
            assert len(image.convert("RGB").getcolors(10**6)) > 10


def test_a_plot_has_the_curves_and_the_published_models(fake_run):
    axes = report.plot(report.hellaswag(fake_run)).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["HellaSwag", "samkeet/GPT_124M", "OpenAI's GPT-2 124M: 0.2955",
                      "GPT-3 124M: 0.337"]
    # a short run fills the plot
    axes = report.plot(report.loss(fake_run)).axes[0]
    assert axes.get_ylim()[0] < 4.5 < axes.get_ylim()[1] and axes.get_xlim()[1] < 40 * 2**19
    # without a run of ours, the published ones do
    axes = report.plot(pd.concat(report.published_curves("loss"))).axes[0]
    assert len(axes.lines) == 3 and axes.get_xlim()[1] > 19e9


def test_training_and_generation_do_not_import_what_only_reports_and_exports_need():
    program = ("import sys, train, generate; print(*sorted("
               "{'gguf', 'huggingface_hub', 'matplotlib', 'pandas'} & set(sys.modules)))")
    imported = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True,
                              capture_output=True, encoding="utf-8").stdout
    assert not imported.strip()
