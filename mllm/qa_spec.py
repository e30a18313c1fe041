"""What is kept beside the weights of a detector or detoxifier: a frozen dataclass as one JSON (or YAML) object.

Everything that decides a score or a rewriting stands in it, so that nobody has to know how a checkpoint was trained.
Published adapters, which bring no such file, are described by one of ours: `configs/detector/published/*.yaml` and
`configs/detoxifier/published/*.yaml`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

S = TypeVar("S", bound="Spec")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What both models have.

    Attributes:
        template: text with {question} and {answer} (mllm/qa_text.py).
        max_length, max_question: limits in tokens; max_length bounds the prompt, never what is generated.
        base: what an adapter lies on: `smollm2`, `minilm`, `micro` (mllm/backbones.py), a folder or a hub id; None: the
            folder holds all weights.
        base_revision: of a hub id.
        weights, weights_revision: in a YAML file only: the adapter's folder or hub id.
        versions: of the libraries that trained it. trained_on: data, split and seed. metrics: what was measured.
    """

    FILE: ClassVar[str]

    template: str
    max_length: int = 512
    max_question: int = 256
    base: str | None = None
    base_revision: str | None = None
    weights: str | None = None
    weights_revision: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trained_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Written as `FILE` in the folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / self.FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls: type[S], path: str | Path) -> tuple[S, str]:
        """The spec of a folder of ours, or of a YAML file, and where the weights are (folder or hub id).

        Raises:
            ValueError: nothing is there, an unknown or missing key, or a value that cannot be; names the file.
        """
        place = Path(path).expanduser()
        file = place / cls.FILE if place.is_dir() else place
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; give a folder that holds {cls.FILE}, or a YAML file like those of "
                "configs/detector/published for weights that were not made here"
            )
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: neither JSON nor YAML ({str(error).splitlines()[0]})") from None
        if not isinstance(loaded, Mapping):
            raise ValueError(
                f"{file}: got a {type(loaded).__name__}, expected an object with the keys of a {cls.__name__}"
            )
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := [key for key in loaded if key not in known]:
            raise ValueError(f"{file}: key {unknown[0]!r} is unknown; there are {', '.join(known)}")
        try:
            spec = cls(**loaded)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None
        if place.is_dir():
            return spec, str(place)
        if spec.weights is None:
            raise ValueError(f"{file}: key 'weights' is missing: the folder or hub id of the adapter")
        return spec, str(Path(spec.weights).expanduser())
