import json
import re

import pandas as pd
import pytest
from PIL import Image

import report
from common.errors import UserError


@pytest.fixture
def fake_run(tmp_path):
    """A run of 8 A100s on FineWeb-Edu: resumed at step 20 after it had come to 30, its last line cut off."""
    lines = [{"time": 0, "event": "start", "step": 0, "device": "NVIDIA A100-SXM4-80GB", "processes": 8},
             {"time": 100, "step": 0, "val_loss": 10.9, "hellaswag": 0.25},
             {"time": 1000, "step": 10, "train_loss": 6.0, "tokens_per_s": 1_700_000},
             {"time": 1800, "step": 20, "val_loss": 5.0, "hellaswag": 0.26},
             {"time": 3600, "step": 30, "train_loss": 99.0},
             {"time": 90_000, "event": "resume", "step": 20, "device": "NVIDIA A100-SXM4-80GB", "processes": 8},
             {"time": 93_600, "step": 30, "train_loss": 4.5, "tokens_per_s": 1_500_000}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"time": 93601, "ste')
    (tmp_path / "samples.jsonl").write_text(json.dumps({"time": 1, "step": 20, "prompt": "a", "text": "ab"}) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"batch_tokens": 2**19, "data": "edu_fineweb10B"}))
    return tmp_path


def test_what_a_lost_attempt_wrote_and_a_torn_line_do_not_count(fake_run):
    frame = report.loss(fake_run).query("curve == 'training'")
    assert frame[["step", "loss"]].to_numpy().tolist() == [[10, 6.0], [30, 4.5]]
    assert frame["tokens"].tolist() == [10 * 2**19, 30 * 2**19]
    assert report.samples(fake_run).to_dict("records") == [{"step": 20, "prompt": "a", "text": "ab"}]


def test_published_curves_stand_beside_a_run_on_fineweb_edu_and_no_other(fake_run):
    curves = report.loss(fake_run).groupby("curve")["loss"].last()
    assert curves["allenporter/nano-gpt"] == 3.0538 and curves["samkeet/GPT_124M"] == 2.9716
    assert set(report.hellaswag(fake_run)["curve"]) == {"HellaSwag", "samkeet/GPT_124M"}
    (fake_run / "config.json").write_text(json.dumps({"batch_tokens": 100, "data": "data/tiny_shakespeare_char"}))
    assert set(report.loss(fake_run)["curve"]) == {"training", "validation"}


def test_a_loss_is_compared_with_the_published_runs_after_as_many_tokens():
    assert re.match(r"0\.0\d (above|below) the published runs after 9,999,220,736 tokens", report.compared(19_072 * 2**19, 3.13))
    assert report.compared(0, 12.0).startswith("1.06 above") and report.compared(0, 10.93).startswith("between")


def test_energy_is_the_devices_draw_over_the_hours_with_the_lost_ones(fake_run):
    """An hour before the interruption and one after it, eight times 400 W; the day between them is nobody's."""
    found = report.summary(fake_run)
    assert found["time"].startswith("2.00 hours") and found["machine"] == "8 x NVIDIA A100-SXM4-80GB"
    assert found["energy"].startswith("6.4 kWh") and found["CO2e"].startswith(f"{6.4 * 0.473:.1f} kg")
    assert found["best validation loss"] == "5.0000 nats a token (step 20)"
    assert found["throughput, median"] == "1,600,000 tokens/s"


def test_a_device_nobody_knows_draws_nothing_that_is_stated(fake_run):
    path = fake_run / "metrics.jsonl"
    path.write_text(path.read_text().replace("NVIDIA A100-SXM4-80GB", "cpu"))
    assert report.summary(fake_run)["energy, CO2e"].startswith("not stated")


def test_the_command_shows_the_figures_and_draws_the_plots(fake_run, command):
    done = command("report.py", fake_run, "--out", fake_run / "plots")
    assert "2.00 hours" in done.stdout and "6.4 kWh" in done.stdout
    for name in "loss.png", "hellaswag.png", "throughput.png":
        with Image.open(fake_run / "plots" / name) as image:
            assert image.size == (1050, 630) and len(image.convert("RGB").getcolors(10**6)) > 10


def test_curves_and_lines_are_in_the_plot(fake_run):
    axes = report.plot(report.hellaswag(fake_run)).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["HellaSwag", "samkeet/GPT_124M", "OpenAI's GPT-2 124M: 0.2955", "GPT-3 124M: 0.337"]
    axes = report.plot(report.loss(fake_run)).axes[0]
    assert axes.get_ylim()[0] < 4.5 < axes.get_ylim()[1] and axes.get_xlim()[1] < 40 * 2**19  # a young run fills the plot
    axes = report.plot(pd.concat(report.published("loss"))).axes[0]  # without any run of ours
    assert len(axes.lines) == 3 and axes.get_xlim()[1] > 19e9


def test_a_log_that_something_damaged_still_gives_what_is_whole(fake_run):
    with open(fake_run / "metrics.jsonl", "ab") as file:
        file.write(b'\n3\n{"step": "x", "time": 1}\n{"step": 40}\n\xff\n{"time": 1, "step": 40, "val_loss": Infinity}\n')
    assert report.loss(fake_run)["loss"].max() < 11
    report.plot(report.loss(fake_run))
    for damaged in "{", "[]", "{}":
        (fake_run / "config.json").write_text(damaged)
        with pytest.raises(UserError):
            report.summary(fake_run)


def test_what_is_no_run_gets_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no run with measurements"):
        report.summary(tmp_path)
