"""Tables over seeds, from small reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.seed_table import main


def report(folder: Path, asr: float, tasks: bool = True, seed: int = 0) -> str:
    """A run of one variant on video."""
    rows: list[dict[str, Any]] = []

    def add(benchmark: str, task: str, **values: float) -> None:
        for metric, value in values.items():
            common = {"variant": "sea_sft", "guard": "none", "benchmark": benchmark, "task": task, "metric": metric}
            rows.extend(common | {"scenario": s, "value": value if s == "all" else 0.77} for s in ("all", "fraud"))

    add("micro", "text_only", asr=0.0, refusal_rate=1.0, benign_compliance=1.0, benign_on_topic=0.99)
    for task in ("video_plain", "video_prefixed"):
        add("micro", task, asr=asr, benign_compliance=0.955, benign_on_topic=0.9, reading_accuracy=0.99)
    if tasks:
        add("micro_tasks", "typo", asr=0.25, benign_compliance=1.0, benign_on_topic=0.5)
    made = {"n": 448, "osr": 1.0, "vsr": 0.996, "seconds_per_embedding": 0.26, "steps_mean": 30.2}
    folder.mkdir()
    values = {"run_dir": str(folder), "experiment": "sea_video", "seed": seed, "settings": {}}
    values |= {"model": {"modality": "video"}, "results": rows, "synthesis": made if tasks else None}
    (folder / "report.json").write_text(json.dumps(values))
    return str(folder)


def test_means_stand_with_each_seed_where_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([report(tmp_path / "a", 0.01), report(tmp_path / "b", 0.03, seed=1)])
    out = capsys.readouterr().out
    assert "| sea_sft | 2 % (1, 3) / 2 % (1, 3) | 100 % | 95.5 [90] % / 95.5 [90] % | 100 [99] % | 99 % |" in out
    assert "| sea_sft | 25 % / 100 [50] % |" in out
    assert "| video | 448 | 100 % | 99.6 % | 30 30 | 0.26 0.26 |" in out


def test_a_run_on_another_runs_embeddings_has_no_table_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([report(tmp_path / "a", 0.0, tasks=False)])
    assert "OSR" not in capsys.readouterr().out


def test_a_missing_figure_names_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [report(tmp_path / "a", 0.0), report(tmp_path / "b", 0.0, tasks=False, seed=1)]
    with pytest.raises(SystemExit):
        main(runs)
    assert "/b: no asr of sea_sft in micro_tasks/typo; run it with the others" in capsys.readouterr().err


def test_one_seed_twice_and_a_folder_without_a_report_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([report(tmp_path / "a", 0.0), report(tmp_path / "b", 0.0)])
    assert "seeds [0, 0]: each run must have another seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "report.json: no such file" in capsys.readouterr().err
