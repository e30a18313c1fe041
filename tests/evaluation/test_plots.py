"""Curves come from what CSVLogger really writes; figures are drawn with what they must show."""

import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image

from evaluation import plots
from evaluation.plots import Curve, Panel, plot_asr_against_compliance, plot_losses, read_curves


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
    path = plot_losses(Panel("loss", "Alignment loss", curves, log_scale=True), tmp_path / "plots" / "loss.png")
    with Image.open(path) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sea_sft", "new"]
    assert axes.get_yscale() == "log"
    assert axes.get_title() == "Alignment loss"
    smooth = next(line for line in axes.lines if line.get_label() == "sea_sft")
    assert len(smooth.get_xdata()) == 200
    assert smooth.get_ydata()[100] == pytest.approx(2.0 / 101, rel=0.02)


def result(variant, task, metric, value, scenario="all", guard="none"):
    return {"variant": variant, "guard": guard, "benchmark": "micro", "task": task, "metric": metric,
            "scenario": scenario, "value": value, "ci95": [value * 0.9, value * 0.9 + 0.1]}  # fmt: skip


def test_asr_stands_against_compliance_one_panel_a_task(tmp_path, figures):
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
    points = [
        [line.get_xydata().tolist()[0] for line in axes.lines if line.get_marker() in plots.MARKERS]
        for axes in (image_panel, text_panel)
    ]
    assert points[0] == [[0.9, 1.0], [0.9, 0.02]]
    assert points[1] == [[0.8, 1.0]]  # sea_dpo has no compliance there: its ASR is not shown alone
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["base", "sea_dpo"]


def test_a_guarded_variant_has_the_same_marker_hollow(tmp_path, figures):
    rates = {("base", "none"): (1.0, 1.0), ("base", "protector"): (0.1, 0.9), ("sea_dpo", "none"): (0.2, 0.8)}
    rates[("sea_dpo", "protector")] = (0.0, 0.7)
    results = []
    for (variant, guard), (asr, benign) in rates.items():
        results.append(result(variant, "image_plain", "asr", asr, guard=guard))
        results.append(result(variant, "image_plain", "benign_compliance", benign, guard=guard))
    assert plot_asr_against_compliance(results, "micro", tmp_path / "asr.png")
    (axes,) = figures[0].axes
    points = [line for line in axes.lines if line.get_marker() in plots.MARKERS]
    assert [tuple(reversed(line.get_xydata().tolist()[0])) for line in points] == list(rates.values())
    assert [line.get_markerfacecolor() == "none" for line in points] == [False, True, False, True]
    assert points[0].get_marker() == points[1].get_marker() != points[2].get_marker() == points[3].get_marker()
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["base", "base + protector", "sea_dpo", "sea_dpo + protector"]


def test_an_attack_success_rate_alone_is_not_drawn(tmp_path):
    assert not plot_asr_against_compliance([result("base", "image_typo", "asr", 1.0)], "micro", tmp_path / "asr.png")
    assert not (tmp_path / "asr.png").exists()
