"""How a run ends: exit codes, one message, the traceback in the log; with real signals in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(body: str, place: Path, **env: str) -> subprocess.Popen[str]:
    """A process whose action is `body`, inside an open run with a stage begun."""
    program = f"""
import sys, time
from configs.schema import Config
from stages.outcome import exit_code_of
from stages.runs import Run

def action():
    cfg = Config(experiment="test", run_dir={str(place)!r})
    with Run(cfg, command=["experiment=test", {f"run_dir={place}"!r}]) as run:
        stage = run.stage("synthesize", run.settings("seed"))
        (stage.folder / "open").touch()
{textwrap.indent(textwrap.dedent(body), "        ")}

sys.exit(exit_code_of(action))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_signal_ends_with_its_code_and_the_command_that_resumes(
    sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = start("time.sleep(60)", tmp_path)
    while not (tmp_path / "synthesize" / "open").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"to go on where it stopped: python train.py experiment=test run_dir={tmp_path}" in err
    assert "Traceback" not in err


def test_error_is_one_message_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    program = f"""
        import sys
        from pathlib import Path
        from configs.schema import Config
        from stages.outcome import exit_code_of
        from stages.runs import Run

        def fail(number):
            with Run(Config(experiment="test", run_dir={str(tmp_path)!r} + f"/{{number}}")):
                if number == 0:
                    raise ValueError("clip.wav: 44100 Hz, expected 16000")
                if number == 1:
                    open("/does/not/exist")
                if number == 2:
                    {{}}["key"]
                if number == 3:
                    raise RuntimeError("I/O error: No space left on device (os error 28)")
                sys.exit(3)

        print([exit_code_of(lambda: fail(number)) for number in range(5)])
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "[1, 1, 1, 1, 3]", done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told[:3] == [
        "error: clip.wav: 44100 Hz, expected 16000",
        "error: [Errno 2] No such file or directory: '/does/not/exist'",
        "error: KeyError: 'key'",
    ]
    assert told[3].startswith("error: the disk is full: ")
    assert "Traceback" not in done.stderr
    assert [("Traceback" in (tmp_path / str(n) / "run.log").read_text()) for n in range(5)] == [True] * 4 + [False]


def test_traceback_is_shown_on_request(tmp_path: Path) -> None:
    process = start("raise ValueError('mine')", tmp_path, SEAWALL_TRACEBACK="1")
    _, err = process.communicate(timeout=60)
    assert "Traceback" in err
    assert process.returncode == 1


def test_lightning_stops_at_a_batch_and_the_code_is_still_143_or_130(tmp_path: Path) -> None:
    """By itself Lightning exits with 0 after SIGTERM (a requeued job would count as completed) and 1 after Ctrl-C."""
    program = """
        import os, signal, torch, lightning as L
        from stages.outcome import exit_code_of

        class Net(L.LightningModule):
            def __init__(self, sent):
                super().__init__()
                self.layer, self.sent = torch.nn.Linear(1, 1), sent
            def training_step(self, batch, index):
                os.kill(os.getpid(), self.sent)
                return self.layer(batch).sum()
            def on_train_batch_end(self, *_):
                print("whole batch", flush=True)
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        data = torch.utils.data.DataLoader(torch.ones(64, 1))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        for sent in (signal.SIGTERM, signal.SIGINT):
            trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
            print(exit_code_of(lambda: trainer.fit(Net(sent), data)), flush=True)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
    assert done.stdout.split("\n")[:3] == ["whole batch", "143", "130"], done.stderr
