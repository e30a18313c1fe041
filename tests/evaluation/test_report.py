"""The report counts right, keeps its contract, and hides nothing that could not be judged."""

import copy
import io
import json
import re
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from evaluation.judges import Judgement, JudgementLog, judge_rows
from evaluation.metrics import wilson_interval
from evaluation.plots import Chart, Curve, Panel
from evaluation.refusal import RefusalJudge
from evaluation.report import (
    REPORT_KEYS,
    RESULT_KEYS,
    SYNTHESIS_KEYS,
    build_report,
    synthesis_summary,
    validate_report,
    write_report,
)
from evaluation.report_text import CAVEAT, print_report
from evaluation.rows import GenerationRow

YES, NO = "Sure, first get the cake. Then bake it.", "Sorry, I cannot help with that."


def rows_of(
    variant: str, task: str, harmful: list[str], benign: list[str], reading: list[str] = ()
) -> list[GenerationRow]:
    """Harmful requests of two scenarios in turn, benign and reading ones of another."""
    rows = []
    for request, answers in (("harmful", harmful), ("benign", benign), ("reading", reading)):
        for i, answer in enumerate(answers):
            scenario = "kitchen" if request != "harmful" else ("fraud", "sex")[i % 2]
            expected = None if request == "harmful" else "bake the cake"
            id = f"{task}-{request}-{i}"
            rows.append(GenerationRow(id, "micro", task, scenario, request, "q", answer, expected, variant))
    return rows


@pytest.fixture
def log(tmp_path):
    with JudgementLog(tmp_path / "judgements.jsonl") as log:
        yield log


@pytest.fixture
def rows() -> list[GenerationRow]:
    rows = rows_of("sea_sft", "image_plain", [YES, NO, NO, NO], [YES, NO], ["it shows bake the cake", "a bridge"])
    rows += rows_of("sea_sft", "text_only", [NO, NO], [YES, YES])
    rows += rows_of("base", "image_plain", [YES, YES, YES, ""], [YES, "Sure."], ["it shows bake the cake", ""])
    return rows + rows_of("base", "text_only", [YES, NO], [YES, YES])


def report_of(rows, log, **settings):
    given = {"experiment": "sea_image", "run_dir": "runs/x", "model": {"name": "micro_llava"}, "seed": 0, **settings}
    return build_report(rows, log, **given)


def entry(report, variant, task, metric, scenario="all"):
    keys = ("variant", "task", "metric", "scenario")
    found = [e for e in report["results"] if tuple(e[k] for k in keys) == (variant, task, metric, scenario)]
    assert len(found) == 1, found
    return found[0]


def test_names_of_scenarios_cannot_break_the_report(rows, log, tmp_path):
    names = {"fraud": "a | b\nc <img src=x> [d](e)", "sex": "all"}
    rows = [replace(row, scenario=names.get(row.scenario, row.scenario)) for row in rows]
    rows.append(replace(rows[0], id="another", scenario="third"))
    judge_rows(rows, RefusalJudge(), log)
    report = report_of(rows, log)
    assert entry(report, "sea_sft", "image_plain", "asr")["n"] == 5
    assert entry(report, "sea_sft", "image_plain", "asr", names["fraud"])["n"] == 2
    lines = write_report(report, tmp_path).markdown.read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| a ")]
    assert line.startswith(r"| a \| b c &lt;img src=x&gt; \[d\](e) | ")


def test_rates_are_counted_by_variant_task_and_scenario(rows, log):
    judge_rows(rows, RefusalJudge(), log)
    report = report_of(rows, log)
    asr = entry(report, "sea_sft", "image_plain", "asr")
    assert (asr["value"], asr["n"], asr["unjudged"], asr["judge"]) == (0.25, 4, 0, "refusal")
    assert asr["ci95"] == pytest.approx(wilson_interval(1, 4))
    assert (asr["benchmark"], asr["guard"]) == ("micro", "none")
    assert entry(report, "sea_sft", "image_plain", "asr", "fraud")["value"] == 0.5
    assert entry(report, "sea_sft", "image_plain", "asr", "sex")["value"] == 0.0
    assert entry(report, "sea_sft", "text_only", "refusal_rate")["value"] == 1.0
    assert entry(report, "base", "text_only", "refusal_rate")["value"] == 0.5
    assert entry(report, "sea_sft", "image_plain", "benign_compliance")["value"] == 0.5
    assert entry(report, "base", "image_plain", "benign_compliance")["value"] == 1.0
    assert entry(report, "base", "image_plain", "benign_on_topic")["value"] == 0.5  # "Sure." complies and says nothing
    assert entry(report, "sea_sft", "image_plain", "reading_accuracy")["value"] == 0.5
    assert entry(report, "base", "image_plain", "reading_accuracy")["n"] == 2  # silence has not read it
    assert not any(e["metric"] == "asr" and e["scenario"] == "kitchen" for e in report["results"])


def test_the_mean_of_scenarios_stands_beside_the_pooled_rate(rows, log, tmp_path):
    rows += [replace(rows[0], id=f"more-{i}", answer=NO) for i in range(6)]  # of scenario fraud, all refused
    judge_rows(rows, RefusalJudge(), log)
    report = report_of(rows, log)
    assert entry(report, "sea_sft", "image_plain", "asr")["value"] == 0.1
    assert entry(report, "sea_sft", "image_plain", "asr", "fraud")["value"] == 1 / 8
    mean = entry(report, "sea_sft", "image_plain", "asr", "mean")
    assert (mean["value"], mean["n"]) == (1 / 16, 10)
    assert not any(e["scenario"] == "mean" and e["metric"] == "benign_compliance" for e in report["results"])
    renamed = [replace(row, scenario="mean") if row.scenario == "sex" else row for row in rows]
    assert entry(report_of(renamed, log), "sea_sft", "image_plain", "asr", "mean")["value"] == 1 / 16
    text = write_report(report, tmp_path).markdown.read_text()
    table = text.split("### micro: ASR, unweighted mean of the scenarios")[1].split("###")[0]
    assert "| `sea_sft` | 6.2 %" in table


def test_several_judges_of_asr_stand_side_by_side_and_the_first_in_the_tables(rows, log, tmp_path):
    judge_rows(rows, RefusalJudge(), log)
    harmful = [r for r in rows if r.request == "harmful" and r.answer]
    log.append(Judgement.of(r, "strict", "unsafe") for r in harmful)
    log.append(Judgement.of(r, "mild", "safe") for r in harmful)
    report = report_of(rows, log, asr_judges=["strict", "mild"])
    pooled = {"variant": "base", "task": "image_plain", "metric": "asr", "scenario": "all"}
    found = {e["judge"]: e["value"] for e in report["results"] if pooled.items() <= e.items()}
    assert found == {"strict": 1.0, "mild": 0.0}
    text = write_report(report, tmp_path).markdown.read_text()
    assert "| variant | task | `strict` | `mild` |" in text
    assert "harmful text: complied (ASR)" in text  # more than the refusals leave over
    line = next(line for line in text.splitlines() if line.startswith("| `base`"))
    assert line.split(" | ")[1].startswith("**100.0 %**")


def test_variants_stand_in_the_documented_order(rows, log):
    report = report_of(rows, log)
    assert list(dict.fromkeys(e["variant"] for e in report["results"])) == ["base", "sea_sft"]


def test_what_is_not_judged_is_counted_apart_and_never_safe(rows, log):
    nothing = entry(report_of(rows, log), "base", "image_plain", "asr")
    assert (nothing["value"], nothing["ci95"], nothing["n"], nothing["unjudged"]) == (None, None, 0, 4)
    judge_rows(rows, RefusalJudge(), log)
    asr = entry(report_of(rows, log), "base", "image_plain", "asr")
    assert (asr["value"], asr["n"], asr["unjudged"]) == (1.0, 3, 1)  # the empty answer
    assert entry(report_of(rows, log), "base", "image_plain", "asr", "sex")["unjudged"] == 1


def test_another_judge_decides_asr_while_compliance_stays_with_the_refusal_judge(rows, log):
    judge_rows(rows, RefusalJudge(), log)
    harmful = [r for r in rows if r.request == "harmful" and r.variant == "sea_sft" and r.task == "image_plain"]
    log.append(Judgement.of(r, "api:judge", "unsafe") for r in harmful[:3])
    log.append([Judgement.failed(harmful[3], "api:judge", "time-out")])
    report = report_of(rows, log, asr_judges=["api:judge"])
    asr = entry(report, "sea_sft", "image_plain", "asr")
    assert (asr["value"], asr["n"], asr["unjudged"], asr["judge"]) == (1.0, 3, 1, "api:judge")
    assert entry(report, "sea_sft", "image_plain", "refusal_rate")["value"] == 0.75
    assert entry(report, "sea_sft", "image_plain", "benign_compliance")["judge"] == "refusal"


def test_the_written_report_keeps_the_schema(rows, log, tmp_path):
    judge_rows(rows, RefusalJudge(), log)
    synthesis = synthesis_summary([True, True, False], [True, None], [10, 20, 60], seconds=6.0)
    panel = Panel("alignment_loss", "Alignment loss", [Chart([Curve("sea_sft", [0, 1, 2], [2.0, 1.0, 0.5])])])
    files = write_report(report_of(rows, log, synthesis=synthesis, settings={"lr": 2e-4}), tmp_path / "run", [panel])
    report = json.loads(files.json.read_text())
    assert set(report) == set(REPORT_KEYS)
    assert set(report["synthesis"]) == set(SYNTHESIS_KEYS)
    assert report["results"]
    assert all(set(e) == set(RESULT_KEYS) for e in report["results"])
    for result in report["results"]:
        for key, types in RESULT_KEYS.items():
            assert isinstance(result[key], types), (key, result)
    assert report["versions"]["torch"]
    assert report["seed"] == 0
    assert report["settings"] == {"lr": 2e-4}
    block = report["synthesis"]
    assert (block["n"], block["osr"], block["vsr"], block["vsr_n"], block["vsr_unjudged"]) == (3, 2 / 3, 1.0, 1, 1)
    assert (block["seconds_per_embedding"], block["steps_mean"]) == (2.0, 30.0)


def test_the_markdown_shows_every_rate_with_its_interval_and_only_plots_that_exist(rows, log, tmp_path):
    judge_rows(rows, RefusalJudge(), log)
    panel = Panel("alignment_loss", "Alignment loss", [Chart([Curve("sea_sft", [0, 1], [2.0, 1.0])])])
    synthesis = synthesis_summary([True], [True], [10], 1.0)
    files = write_report(report_of(rows, log, synthesis=synthesis), tmp_path, [panel])
    text = files.markdown.read_text()
    assert CAVEAT in text
    assert "(+1 unjudged)" in text
    line = next(line for line in text.splitlines() if line.startswith("| `sea_sft`"))
    assert line.split(" | ")[1] == "**25.0 %**<br>[4.6, 69.9] n=4"
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert sorted(links) == ["plots/alignment_loss.png", "plots/asr_against_compliance_micro.png"]
    for link in links:
        with Image.open(tmp_path / link) as image:
            image.verify()
    for table in re.findall(r"### micro, .*?\n\n(.*?)\n\n", text, re.DOTALL):  # no ASR without what it costs
        assert "*benign compliance*" in table


def test_a_benchmark_without_harmless_requests_says_so_and_gets_no_plot(log, tmp_path):
    rows = [GenerationRow("f1", "figstep", "image_typo", "Fraud", "harmful", "q", YES, None, "base")]
    judge_rows(rows, RefusalJudge(), log)
    files = write_report(report_of(rows, log), tmp_path)
    assert files.plots == {}
    assert "figstep has no harmless requests" in files.markdown.read_text()


def test_the_terminal_table_fits_eighty_columns_and_names_the_unjudged(rows, log):
    judge_rows(rows, RefusalJudge(), log)
    report = report_of(rows, log, synthesis=synthesis_summary([True], [True], [10], 1.0), experiment="[red]x")
    out = io.StringIO()
    print_report(report, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "[red]x: micro" in text
    assert "25.0 %" in text
    assert "OSR 100.0 %" in text
    assert "2 answers could not be judged" not in text
    assert "1 answers could not be judged" in text


def test_compliance_never_stands_without_what_of_it_is_on_topic(rows, log, tmp_path):
    judge_rows(rows, RefusalJudge(), log)
    report = report_of(rows, log)
    out = io.StringIO()
    print_report(report, Console(file=out, width=80))
    lines = [re.findall(r"[\w.% -]+", line.strip("│ ")) for line in out.getvalue().splitlines()]
    complied = next(i for i, line in enumerate(lines) if line and line[0].startswith("benign"))
    (topic, *_) = [line for line in lines[complied:] if line and line[0].strip() == "on topic"]
    assert topic[1].strip() == "50.0 %"  # of base: the table above it says 100 % complied
    first_table = write_report(report, tmp_path).markdown.read_text().split("*On topic*")[0]
    assert "on topic 50.0 %" in first_table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("seed"), "report.seed is missing"),
        (lambda r: r.update(sed=1), "report.sed is unknown"),
        (lambda r: r.update(seed="0"), "report.seed is '0', expected int"),
        (lambda r: r["synthesis"].pop("osr"), "synthesis.osr is missing"),
        (lambda r: r["synthesis"].update(seconds_per_embedding=float("nan")), "seconds_per_embedding is nan"),
        (lambda r: r["results"][0].update(n=True), r"results\[0\].n is True, expected int"),
        (lambda r: r["results"][0].update(value=None), "null exactly if n is 0"),
        (lambda r: r["results"][0].update(value=1.5), "value <= ci95"),
        (lambda r: r["results"].append(dict(r["results"][0])), "a second entry for"),
    ],
)
def test_a_broken_contract_is_an_error_that_names_the_key(rows, log, change, message):
    judge_rows(rows, RefusalJudge(), log)
    report = copy.deepcopy(report_of(rows, log, synthesis=synthesis_summary([True], [True], [10], 1.0)))
    report["synthesis"]["peak_memory_mb"] = 12.5  # more than the contract asks is allowed here
    validate_report(report)
    change(report)
    with pytest.raises(ValueError, match=message):
        validate_report(report)


def test_synthesis_of_nothing_has_no_rates():
    block = synthesis_summary([], [], [], 0.0)
    assert (block["n"], block["osr"], block["vsr"], block["steps_mean"]) == (0, None, None, 0.0)


def test_a_harmless_request_without_an_expected_phrase_is_never_on_or_off_topic(log):
    rows = [GenerationRow("x1", "xstest", "text_only", "homonyms", "benign", "q", YES, None, "base")]
    judge_rows(rows, RefusalJudge(), log)
    assert {e["metric"] for e in report_of(rows, log)["results"]} == {"benign_compliance"}
