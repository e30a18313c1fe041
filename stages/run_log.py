"""Where messages go: everything to `run.log`, the project's own to the terminal, above a running progress bar.

Modules say `log = logging.getLogger(__name__)` and `log.info(...)`. Warnings of the libraries go to the file alone.
"""

from __future__ import annotations

import logging
from pathlib import Path

from callbacks.progress import console
from configs.check import PROJECT

log = logging.getLogger("seawall")

file_only = logging.getLogger("file_only")
"""For `run.log` alone: tracebacks."""

OURS = ("seawall", "mllm", "datamodules", "lightning_modules", "evaluation", "callbacks", "stages", "assets", "scripts")


class RunLog:
    """Handlers on the root logger from construction to `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = logging.FileHandler(path, encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._terminal = _Terminal()
        self._terminal.addFilter(_is_ours)
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        root.addHandler(self._file)
        root.addHandler(self._terminal)
        logging.captureWarnings(True)

    def close(self) -> None:
        """Take the handlers away again."""
        logging.captureWarnings(False)
        root = logging.getLogger()
        root.removeHandler(self._terminal)
        root.removeHandler(self._file)
        root.setLevel(self._level)
        self._file.close()


def _is_ours(record: logging.LogRecord) -> bool:
    if record.name == "py.warnings":  # its message begins with the path of the module that warned
        path = record.getMessage().split(":", 1)[0]
        return path.startswith(str(PROJECT)) and "site-packages" not in path
    return record.name.split(".")[0] in OURS


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print the message as it is, levels above INFO by name."""
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        console.print(prefix + record.getMessage(), markup=False, soft_wrap=True)
