"""Speech from Microsoft's online voices through the package edge-tts: an extra, `pip install -e '.[edge]'`.

The texts leave the machine. The voices change on the server, so what they say is not reproducible to the bit; the
default is espeak-ng (datamodules/speech.py), which needs no network.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from datamodules.audio_files import AudioClip, decode_audio
from datamodules.media_files import MediaRules

USUAL_SPEED = 180
"""Words a minute of these voices; the service wants a change in per cent."""
USUAL_PITCH = 50
"""espeak's middle on its scale of 0 to 99; the service wants a change in Hz, here one for each step."""


def synthesize_online(text: str, voice: str, speed: int, pitch: int) -> AudioClip:
    """The text spoken by `voice` (`edge-tts --list-voices` names them), at the service's own rate (24 kHz).

    Args:
        speed: words a minute.
        pitch: 0 to 99, 50 is the voice's own.

    Raises:
        ValueError: the package is missing, the service cannot be reached or gives no sound.
    """
    try:
        import edge_tts
    except ImportError as error:
        raise ValueError("build.speech=edge needs edge-tts: pip install -e '.[edge]'") from error
    rate, shift = f"{round(100 * (speed / USUAL_SPEED - 1)):+d}%", f"{pitch - USUAL_PITCH:+d}Hz"

    async def receive() -> bytes:
        parts = [
            part["data"]
            async for part in edge_tts.Communicate(text, voice, rate=rate, pitch=shift).stream()
            if part["type"] == "audio"
        ]
        return b"".join(parts)

    try:
        data = asyncio.run(receive())
    except Exception as error:  # the package passes on whatever its HTTP client raises
        raise ValueError(f"edge-tts, voice {voice}: {type(error).__name__}: {error}") from error
    return decode_audio(data, Path(f"edge-tts, voice {voice}"), MediaRules("audio"))
