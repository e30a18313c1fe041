"""Array files (.npy) of modalities that have no file format of their own: float32, channels first.

    numpy.save("walk.npy", array.astype(numpy.float32))

The header is read before anything is allocated: neither a shape of a thousand gigabytes nor an array of Python objects,
which would be unpickled, gets further.
"""

from __future__ import annotations

import io
import struct
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datamodules.media_files import MediaRules


def decode_array(data: bytes, name: Path, rules: MediaRules) -> np.ndarray:
    """float32 of any shape with the channels of `rules.shape`.

    Raises:
        ValueError: names the file; it is no .npy file, cut short, of another type or other axes, too large, or holds
            values that are not finite.
    """
    if len(data) > rules.max_megabytes * 1e6:
        raise ValueError(
            f"{name}: {len(data) / 1e6:.0f} MB, at most {rules.max_megabytes:g} are taken (media.max_megabytes)"
        )
    shape, dtype, begin = _header(data, name)
    mend = "numpy.save(file, array.astype(numpy.float32))"
    if dtype != np.dtype("<f4"):
        raise ValueError(f"{name}: {dtype} of shape {shape}, expected float32: {mend}")
    expected = 4 * int(np.prod(shape, dtype=object))  # Python's integers: a hostile shape overflows numpy's
    if expected != len(data) - begin:
        raise ValueError(
            f"{name}: its header promises {expected} bytes of values and {len(data) - begin} are there: fetch it again"
        )
    if rules.shape is not None:
        _check_axes(shape, rules.shape, name)
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds values that are no finite numbers; mend or leave out what was not measured")
    return np.ascontiguousarray(array)


def _check_axes(shape: tuple[int, ...], blank: tuple[int, ...], name: Path) -> None:
    if len(shape) != len(blank) or shape[0] != blank[0] or 0 in shape:
        wanted = ", ".join([str(blank[0]), *["..."] * (len(blank) - 1)])
        raise ValueError(
            f"{name}: shape {shape}, expected ({wanted}): {blank[0]} channels first, as the model's blank "
            "(model.blank_shape); turn the axes, or take the channels apart"
        )


def _header(data: bytes, name: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, type, where the values begin)."""
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except (
        ValueError, TypeError, SyntaxError, tokenize.TokenError, struct.error, MemoryError, RecursionError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: cannot be read as a .npy file ({reason}); make it with numpy.save") from error
    return shape, dtype, file.tell()
