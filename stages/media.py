"""What the model of a run expects of real media: its blank and its processor say it, the section `media` bounds it."""

from __future__ import annotations

from configs.schema import MODALITIES, Config
from datamodules.media_files import MediaRules
from mllm.loading import MLLM
from mllm.media import blank_medium, sampling_rate


def media_rules(cfg: Config, mllm: MLLM, fit: bool = False) -> MediaRules:
    """The rules for `mllm`.

    Args:
        fit: bring every medium to the size of the blank (pixels; silence up to its length), as embeddings need that
            are to stand in one store. An array of another modality stays: what its axes mean is not known here.
    """
    m, modality = cfg.media, mllm.spec.modality
    blank = blank_medium(cfg.model, mllm.processor)
    frames, size, samples, seconds, shape = m.frames, None, None, m.max_seconds, None
    cut = cfg.model.max_seconds if modality == "audio" and m.cut else None
    if modality == "audio" and cfg.model.max_seconds is not None and not m.cut:
        seconds = min(seconds, cfg.model.max_seconds)
    if modality == "video" and m.frames is None and m.fps is None:
        frames = len(blank)  # as many as an embedding stands for
    if fit and modality == "audio":
        samples = len(blank)
    if modality not in MODALITIES:
        shape = tuple(blank.shape)
    elif fit and modality != "audio":
        width, height = cfg.model.blank_size
        size = (width, height)
    return MediaRules(
        modality,
        size=size,
        frames=frames,
        fps=m.fps,
        sample_rate=sampling_rate(mllm.processor) if modality == "audio" else None,
        resample=m.resample,
        samples=samples,
        cut_seconds=cut,
        shape=shape,
        max_seconds=seconds,
        max_pixels=m.max_pixels,
        max_megabytes=m.max_megabytes,
    )


def media_keys(cfg: Config) -> list[str]:
    """The settings that decide what a medium is decoded to; pictures have none, so their old runs can be resumed."""
    return [] if cfg.model.modality == "image" else ["media"]
