"""Arrays from files: what a processor would misread, or a hostile file would do, is an error that names it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.array_files import decode_array
from datamodules.media_files import MediaRules, described, model_input, open_medium

RULES = MediaRules("scent", shape=(3, 8), max_megabytes=0.01)
NAME = Path("x.npy")


def saved(array: Any, **how: Any) -> bytes:
    np.save(buffer := io.BytesIO(), array, **how)
    return buffer.getvalue()


def test_a_file_of_any_length_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    np.save(tmp_path / "a.npy", array)
    medium = open_medium(tmp_path / "a.npy", RULES)
    assert np.array_equal(model_input(medium), array)  # type: ignore[arg-type]
    assert described(medium) == "float32 of shape (3, 5)"
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    assert np.array_equal(open_medium(tmp_path / "f.npy", RULES), array)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "cannot be read as a .npy file"),
        (b"RIFF....WAVE", "cannot be read as a .npy file .*make it with numpy.save"),
        (saved(np.zeros((3, 8), np.float64)), r"float64 of shape \(3, 8\), expected float32: numpy.save"),
        (saved(np.zeros((3, 8), ">f4")), "expected float32"),
        (saved(np.zeros((3, 8), np.float32))[:-4], "promises 96 bytes of values and 92 are there: fetch it again"),
        (saved(np.zeros((3, 8), np.float32)) + b"more", "promises 96 bytes of values and 100 are there"),
        (saved(np.zeros((8, 3), np.float32)), r"shape \(8, 3\), expected \(3, ...\): 3 channels first"),
        (saved(np.zeros(8, np.float32)), r"shape \(8,\), expected \(3, ...\)"),
        (saved(np.zeros((3, 0), np.float32)), r"shape \(3, 0\)"),
        (saved(np.full((3, 8), np.nan, np.float32)), "no finite numbers"),
        (saved(np.zeros((3, 8000), np.float32)), r"0 MB, at most 0.01 are taken \(media.max_megabytes\)"),
    ],
)
def test_other_files_are_refused_with_what_is_wrong(data: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^x\.npy: .*{told}"):
        decode_array(data, NAME, RULES)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("touched").touch, ())

    with pytest.raises(ValueError, match="object"):
        decode_array(saved(np.array([Evil()], dtype=object), allow_pickle=True), NAME, RULES)
    assert not (tmp_path / "touched").exists()


def test_a_shape_of_a_thousand_terabytes_costs_no_memory() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 99999999999999), }"
    header += b" " * (117 - len(header)) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 96
    with pytest.raises(ValueError, match="promises 1199999999999988 bytes of values and 96 are there"):
        decode_array(data, NAME, RULES)
