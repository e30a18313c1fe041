"""Pictures and recordings of a chat for a local checkpoint: only what came with the request, checked before decoding.

A remote address is refused: fetching it would let a client make this machine ask others (server-side request forgery).
A picture is opened by its declared format alone, and its size in pixels is read from the header before any pixel is.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any

import numpy as np
from PIL import Image

from mllm.guard_protocol import RequestError

FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
MAX_BYTES = 10 << 20
MAX_PIXELS = 32_000_000
SOUNDS = {"wav": "WAV", "mp3": "MP3", "flac": "FLAC", "ogg": "OGG"}
MAX_SECONDS = 600
MAX_SAMPLES = 20_000_000  # over all channels: 80 MB once decoded


def decode_image(part: dict[str, Any], max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of an `image_url` part as RGB; of an animation the first frame.

    Raises:
        RequestError: 400: not a `data:` URL, of another format, too large, or broken.
    """
    holder = part.get("image_url")
    url = holder.get("url") if isinstance(holder, dict) else holder
    if not isinstance(url, str) or not url.startswith("data:"):
        raise _bad("a local model takes images as data:image/png;base64,... only, no addresses")
    head = re.match(r"data:image/([a-z]{3,4});base64,", url)
    if head is None or head[1] not in FORMATS:
        raise _bad(f"expected data:image/FORMAT;base64, with FORMAT one of {', '.join(FORMATS)}")
    if (len(url) - head.end()) * 3 // 4 > max_bytes:
        raise RequestError(413, f"an image has more than {max_bytes} bytes", "messages")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
        image = Image.open(io.BytesIO(data), formats=[FORMATS[head[1]]])
        if image.width * image.height > max_pixels:
            raise RequestError(413, f"an image has more than {max_pixels} pixels", "messages")
        return image.convert("RGB")
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _bad(f"an image cannot be read ({type(error).__name__})") from None


def decode_audio(part: dict[str, Any], rate: int, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """The recording of an `input_audio` part: float32 [n], mono, at `rate` (Hz).

    Raises:
        RequestError: 400: of another format, too long, or broken; 413: too large.
    """
    try:
        import soundfile
        import soxr
    except ImportError:
        raise _bad("recordings need pip install -e '.[media]' on the server") from None
    holder = part.get("input_audio")
    holder = holder if isinstance(holder, dict) else {}
    text, form = holder.get("data"), holder.get("format")
    if not isinstance(text, str) or form not in SOUNDS:
        raise _bad(f"expected input_audio with data (base64) and format, one of {', '.join(SOUNDS)}")
    if len(text) * 3 // 4 > max_bytes:
        raise RequestError(413, f"a recording has more than {max_bytes} bytes", "messages")
    try:
        with soundfile.SoundFile(io.BytesIO(base64.b64decode(text, validate=True))) as file:
            if file.format != SOUNDS[form]:
                raise _bad(f"a recording is {file.format}, its format says {form}")
            if not 4000 <= file.samplerate <= 192_000:
                raise _bad(f"a recording has {file.samplerate} samples a second, expected 4000 to 192000")
            if file.frames > MAX_SECONDS * file.samplerate or file.frames * file.channels > MAX_SAMPLES:
                told = f"longer than {MAX_SECONDS} s, or has more than {MAX_SAMPLES} samples"
                raise RequestError(413, f"a recording is {told}", "messages")
            samples, own = file.read(dtype="float32", always_2d=True).mean(1), file.samplerate
    except (binascii.Error, ValueError, OSError, RuntimeError) as error:
        raise _bad(f"a recording cannot be read ({type(error).__name__})") from None
    if len(samples) and np.isfinite(samples).all() and np.abs(samples).max() < 1e3:
        samples = samples if own == rate else soxr.resample(samples, own, rate)
        if len(samples):
            return samples
    raise _bad("a recording is empty or holds no numbers")


def _bad(message: str) -> RequestError:
    return RequestError(400, message, "messages")
