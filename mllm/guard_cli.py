"""The command line of the guard: `python -m mllm.guard score|detoxify|serve`.

    score     --detector DIR IN.jsonl > OUT.jsonl                       adds harmless_score and harmful to each row
    detoxify  --detector DIR [--detoxifier DIR] IN.jsonl > OUT.jsonl    adds guarded_answer, action, reason, both scores
    serve     --detector DIR [--detoxifier DIR] --upstream URL | --model NAME

Rows have `question` and `answer`; other fields are kept. `-` reads standard input. Exit codes as train.py: 0 done,
1 failed, 2 mistaken command, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mllm.guard import REFUSAL, Guard

if TYPE_CHECKING:  # torch and transformers wait until the command line is found to be in order
    from mllm.detector import Detector

BLOCK = 512  # rows sorted by length together


class Mistake(ValueError):
    """A command or input that cannot be served; exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    import torch

    torch.set_num_threads(args.threads or torch.get_num_threads())
    try:
        {"score": _score, "detoxify": _detoxify, "serve": _serve}[args.command](args)
    except Mistake as error:
        logging.error("error: %s", error)
        return 2
    except BrokenPipeError:  # the reader stopped early (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        logging.error("failed: %s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def rows_of(file: TextIO, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; blank lines are passed over.

    Raises:
        Mistake: no JSON object, or `question` or `answer` is no text; names file and line, quotes nothing.
    """
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise Mistake(f"{name}:{number}: no JSON; expected one object a line") from None
        if not isinstance(row, dict):
            raise Mistake(f"{name}:{number}: got a {type(row).__name__}, expected an object")
        for key in ("question", "answer"):
            if not isinstance(row.get(key), str):
                raise Mistake(f"{name}:{number}: {key!r} is missing or no text")
            if any("\ud800" <= char <= "\udfff" for char in row[key]):
                raise Mistake(f"{name}:{number}: {key!r} holds half a surrogate pair, which is no text")
        yield row


def _score(args: argparse.Namespace) -> None:
    detector = _detector(args)
    for block in _blocks(args.input):
        scores = detector.score([r["question"] for r in block], [r["answer"] for r in block], args.batch_size)
        flags = detector.harmful(scores).tolist()
        for row, score, harmful in zip(block, scores.tolist(), flags, strict=True):
            _write({**row, "harmless_score": score if math.isfinite(score) else None, "harmful": harmful})


def _detoxify(args: argparse.Namespace) -> None:
    guard = _guard(args)
    for block in _blocks(args.input):
        for row, g in zip(
            block, guard.check([r["question"] for r in block], [r["answer"] for r in block]), strict=True
        ):
            added = {
                "guarded_answer": g.answer,
                "action": g.action,
                "reason": g.reason,
                "harmless_score": g.score,
                "harmless_score_after": g.score_after,
            }
            _write({**row, **added})


def _serve(args: argparse.Namespace) -> None:
    try:
        from mllm.guard_metrics import Metrics
        from mllm.guard_server import make_app, make_server
    except ModuleNotFoundError as error:
        raise Mistake(f"{error.name} is missing; serve needs: pip install -e '.[serve]'") from None
    try:
        backend, settings = _behind(args)
    except ValueError as error:
        raise Mistake(str(error)) from error
    metrics = Metrics()
    app = make_app(_guard(args, metrics.model_call), backend, settings, metrics)
    make_server(app, settings, args.host, args.port).run()  # until SIGTERM or Ctrl-C


def _behind(args: argparse.Namespace) -> tuple[Any, Any]:
    """Backend and settings; a mistake is found before the guard's models are loaded. Raises ValueError."""
    from mllm.guard_backends import Upstream
    from mllm.guard_queue import Settings
    from mllm.guard_server import check_address

    settings = Settings(
        api_key=os.environ.get(args.api_key_env) or None,
        max_body=args.max_body,
        max_active=args.max_active,
        max_waiting=args.max_waiting,
        timeout=args.timeout,
        grace=args.grace,
    )
    check_address(args.host, settings.api_key)
    if not args.upstream:
        return _local(args), settings
    key = os.environ.get(args.upstream_key_env) if args.upstream_key_env else None
    if args.upstream_key_env and not key:
        raise ValueError(f"the environment variable {args.upstream_key_env} (--upstream-key-env) is not set")
    upstream = Upstream(
        args.upstream, key, args.connect_timeout, args.idle_timeout, args.max_answer, connections=args.max_active + 8
    )
    return upstream, settings


def _local(args: argparse.Namespace) -> Any:
    from configs.compose import compose
    from mllm.backbones import merge_adapter
    from mllm.guard_local import Local
    from mllm.loading import assemble, load

    mllm = load(compose(["experiment=sea_image", f"model={args.model}"]).config.model, args.device)
    if args.adapter:
        mllm = assemble(merge_adapter(mllm.model, args.adapter), mllm.processor, mllm.spec)
    return Local(mllm, args.max_new_tokens, args.batch_size)


def _guard(args: argparse.Namespace, observe: Any = lambda kind, seconds, size: None) -> Guard:
    detoxifier = None
    if args.detoxifier:
        from mllm.detoxifier import Detoxifier

        detoxifier = _load(Detoxifier, args.detoxifier, args)
    return Guard(
        _detector(args), detoxifier, args.refusal, args.batch_size, args.detector_timeout, args.rewrite_timeout,
        args.max_rewrite_tokens, attempts=args.attempts, observe=observe,
    )  # fmt: skip


def _detector(args: argparse.Namespace) -> Detector:
    from mllm.detector import Detector

    return _load(Detector, args.detector, args)


def _load(kind: Any, path: str, args: argparse.Namespace) -> Any:
    import torch

    try:
        return kind.load(path, args.device, getattr(torch, args.dtype))
    except ValueError as error:
        raise Mistake(str(error)) from error


def _blocks(path: str) -> Iterator[list[dict[str, Any]]]:
    with contextlib.ExitStack() as stack:
        try:
            file = sys.stdin if path == "-" else stack.enter_context(Path(path).open(encoding="utf-8"))
        except OSError as error:
            raise Mistake(f"{path}: {error.strerror}") from None
        rows: Iterable[dict[str, Any]] = rows_of(file, path)
        iterator = iter(rows)
        while block := list(itertools.islice(iterator, BLOCK)):
            yield block


def _write(row: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")  # ASCII: half a surrogate pair in a row must not stop the others


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Says what an option is if it is not given, unless that is nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default is not None else action.help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mllm.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument("--detector", required=True, metavar="DIR", help="made by experiment=harm_detector")
    models.add_argument("--device", default="cpu", help="where the models run")
    models.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of weights")
    models.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0: its own choice")
    models.add_argument("--batch-size", type=int, default=16, help="texts in one forward")
    guard = argparse.ArgumentParser(add_help=False)
    guard.add_argument("--detoxifier", metavar="DIR", help="made by experiment=detoxifier; without it: refusal")
    guard.add_argument("--refusal", default=REFUSAL, help="what is said in place of a flagged answer")
    guard.add_argument("--detector-timeout", type=float, default=30.0, metavar="S", help="seconds; then: refused")
    guard.add_argument("--rewrite-timeout", type=float, default=120.0, metavar="S", help="seconds; then: refused")
    guard.add_argument("--attempts", type=int, default=4, metavar="N", help="rewrites tried while they are harmful")
    guard.add_argument("--max-rewrite-tokens", type=int, default=256, metavar="N", help="longest rewrite")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, parents, text in (
        ("score", [models], "score the answers of a JSONL file"),
        ("detoxify", [models, guard], "guard the answers of a JSONL file"),
    ):
        command = commands.add_parser(name, parents=parents, help=text, formatter_class=_Defaults)
        command.add_argument("input", metavar="IN.jsonl", help="rows with question and answer; - for standard input")
    text = "a guarded OpenAI-compatible chat server"
    server = commands.add_parser("serve", parents=[models, guard], help=text, formatter_class=_Defaults)
    behind = server.add_mutually_exclusive_group(required=True)
    behind.add_argument("--upstream", metavar="URL", help="an OpenAI-compatible server, up to and with /v1")
    behind.add_argument("--model", metavar="NAME", help="a local checkpoint: a file of configs/model, e.g. micro_llava")
    server.add_argument("--adapter", metavar="DIR", help="--model: a LoRA adapter, e.g. of experiment=sea_image")
    server.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="--model: longest answer")
    server.add_argument("--host", default="127.0.0.1", help="any but a loopback address needs an API key")
    server.add_argument("--port", type=int, default=8001, help="0: any free one")
    server.add_argument("--api-key-env", default="SEAWALL_GUARD_KEY", metavar="NAME", help="holds the clients' key")
    server.add_argument("--upstream-key-env", metavar="NAME", help="holds the upstream's key")
    server.add_argument("--connect-timeout", type=float, default=10.0, metavar="S", help="seconds, to the upstream")
    server.add_argument("--idle-timeout", type=float, default=60.0, metavar="S", help="seconds between parts")
    server.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for a whole request")
    server.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds for answers at shutdown")
    server.add_argument("--max-body", type=int, default=20 << 20, metavar="BYTES", help="largest request")
    server.add_argument("--max-answer", type=int, default=100_000, metavar="CHARS", help="--upstream: longest answer")
    server.add_argument("--max-active", type=int, default=64, metavar="N", help="requests answered at once")
    server.add_argument("--max-waiting", type=int, default=256, metavar="N", help="in the queue; more get a 429")
    return parser
