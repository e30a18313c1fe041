"""Curves come from what CSVLogger really writes; figures are drawn with what they must show."""

import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image

from evaluation import plots
from evaluation.plots import SIDES, Chart, Curve, Panel, plot_asr_against_compliance, plot_losses, read_curves


def log_steps(folder, steps, loss, version=None):
    """A metrics.csv of Lightning's own logger, with another metric on rows of its own."""
    logger = CSVLogger(folder, name="", version=version)
    for step in steps:
        logger.log_metrics({"train/loss": loss(step)}, step=step)
        logger.log_metrics({"val/acc": 0.5}, step=step)
    logger.finalize("success")
    return logger.experiment.metrics_file_path


def test_curves_are_read_from_lightnings_csv_files(tmp_path):
    path = log_steps(tmp_path, range(3), lambda step: 2.0 - step / 2)
    assert read_curves({"sea_dpo": path}, "train/loss") == [Curve("sea_dpo", [0, 1, 2], [2.0, 1.5, 1.0])]


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    first = log_steps(tmp_path, range(5), lambda step: 10.0 + step, version=0)
    second = log_steps(tmp_path, (3, 6), lambda step: 20.0 + step, version=1)
    (curve,) = read_curves({"x": [first, second]}, "train/loss")
    assert curve == Curve("x", [0, 1, 2, 3, 6], [10.0, 11.0, 12.0, 23.0, 26.0])  # step 4 was never part of this run


def test_a_missing_file_or_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        read_curves({"x": tmp_path / "none.csv"}, "train/loss")
    path = log_steps(tmp_path, range(2), lambda step: 1.0)
    with pytest.raises(ValueError, match=r"metrics\.csv: needs the columns 'step' and 'train/los', has .*train/loss"):
        read_curves({"x": path}, "train/los")
    empty = tmp_path / "empty.csv"
    empty.write_text("step,train/loss\n1,\n")
    with pytest.raises(ValueError, match=r"empty\.csv: column 'train/loss' has no values"):
        read_curves({"x": empty}, "train/loss")


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures as they are saved, so that a test can look at what is on them."""
    saved: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (saved.append(figure), save(figure, path))[1])
    return saved


def test_a_loss_figure_shows_every_curve_with_its_label(tmp_path, figures):
    curves = [
        Curve("sea_sft", list(range(200)), [2.0 / (i + 1) for i in range(200)]),
        Curve("new", [0, 10], [1.0, 0.5]),
    ]
    path = plot_losses(
        Panel("loss", "Alignment loss", [Chart(curves, log_scale=True)]), tmp_path / "plots" / "loss.png"
    )
    with Image.open(path) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sea_sft", "new"]
    assert axes.get_yscale() == "log"
    assert figures[0].get_suptitle() == "Alignment loss"
    smooth = next(line for line in axes.lines if line.get_label() == "sea_sft")
    assert len(smooth.get_xdata()) == 200
    assert smooth.get_ydata()[100] == pytest.approx(2.0 / 101, rel=0.02)


def result(variant, task, metric, value, scenario="all", guard="none"):
    return {"variant": variant, "guard": guard, "benchmark": "micro", "task": task, "metric": metric,
            "scenario": scenario, "value": value, "ci95": [value * 0.9, value * 0.9 + 0.1]}  # fmt: skip


def dots(axes) -> list[tuple[str, str, float]]:
    """(row, metric, value) of every dot in a panel, and what is written beside it is checked."""
    rows = [label.get_text() for label in axes.figure.axes[0].get_yticklabels()]  # the first panel names the rows
    written = {(text.xy[1], text.get_color()): text.get_text() for text in axes.texts if hasattr(text, "xy")}
    found = []
    for line in axes.lines:
        for side in SIDES:
            if line.get_marker() == side.marker:
                ((value, place),) = line.get_xydata().tolist()
                assert written[place, side.colour] == f"{value * 100:.0f} %"
                found.append((rows[round(place)], side.metric, value))
    return found


def test_asr_stands_beside_compliance_one_panel_a_task(tmp_path, figures):
    results = [
        result(v, t, "asr", asr) for v, asr in (("base", 1.0), ("sea_dpo", 0.02)) for t in ("image_plain", "text_only")
    ]
    results += [result(v, "image_plain", "benign_compliance", 0.9) for v in ("base", "sea_dpo")]
    results += [
        result("base", "text_only", "benign_compliance", 0.8),
        result("base", "image_plain", "asr", 0.5, "fraud"),
    ]
    assert plot_asr_against_compliance(results, "micro", tmp_path / "asr.png")
    image_panel, text_panel = figures[0].axes
    assert dots(image_panel) == [
        ("base", "asr", 1.0), ("base", "benign_compliance", 0.9),
        ("sea_dpo", "asr", 0.02), ("sea_dpo", "benign_compliance", 0.9),
    ]  # fmt: skip
    assert dots(text_panel) == [("base", "asr", 1.0), ("base", "benign_compliance", 0.8)]
    # sea_dpo has no compliance there: its ASR is not shown alone
    assert [text.get_text() for text in text_panel.texts][-1] == "not measured"
    intervals = [line.get_xdata().tolist() for line in image_panel.lines if len(line.get_xdata()) == 2]
    assert intervals[0] == pytest.approx([0.9, 1.0])
    assert [text.get_text().split(": ")[1] for text in figures[0].legends[0].get_texts()] == [
        "lower is better", "higher is better",
    ]  # fmt: skip


def test_equal_rates_do_not_hide_one_another_and_a_guard_is_a_row_of_its_own(tmp_path, figures):
    systems = [("base", "none"), ("base", "protector"), ("sea_dpo", "none"), ("sea_dpo", "protector")]
    results = [
        result(variant, "image_plain", side.metric, 1.0, guard=guard) for variant, guard in systems for side in SIDES
    ]
    assert plot_asr_against_compliance(results, "micro", tmp_path / "asr.png")
    (axes,) = figures[0].axes
    names = ["base", "base + protector", "sea_dpo", "sea_dpo + protector"]
    assert [name for name, metric, _ in dots(axes) if metric == "asr"] == names
    places = {tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    assert len(places) == 8


def test_a_name_has_one_colour_whatever_stands_beside_it():
    assert plots._colours(["sea_dpo (+ 12 x SFT loss)", "base"]) == [plots.COLOURS["sea_dpo"], plots.COLOURS["base"]]
    (alone,) = plots._colours(["mine"])
    assert plots._colours(["base", "mine"])[1] == alone
    assert len(set(plots._colours(["mine", "yours", "theirs"]))) == 3


def test_a_mean_tells_how_many_it_is_still_of(tmp_path, figures):
    share = Curve("running", [0, 1], [1.0, 0.25])
    charts = [
        Chart([Curve("E", [0, 1], [2.0, 1.0])], xlabel="age", share=share),
        Chart([Curve("E", [0], [1.0])], "acc"),
    ]
    plot_losses(Panel("loss", "Loss", charts), tmp_path / "loss.png")
    left, beside, right = figures[0].axes
    assert (left.get_xlabel(), beside.get_ylabel(), right.get_ylabel()) == ("age", "acc", "running")
    assert right.lines[0].get_ydata().tolist() == [1.0, 0.25]


def test_an_attack_success_rate_alone_is_not_drawn(tmp_path):
    assert not plot_asr_against_compliance([result("base", "image_typo", "asr", 1.0)], "micro", tmp_path / "asr.png")
    assert not (tmp_path / "asr.png").exists()
