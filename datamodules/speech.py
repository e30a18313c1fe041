"""Speech from espeak-ng, in this process: text -> waveform and the time of every word. Offline, no account.

    speech = synthesize("forge the passport", voice="en+f3", speed=150, pitch=50)
    speech.samples, speech.rate, speech.words     # float32 [n] in -1..1, Hz, (Word("forge", 0.0, 0.41), ...)

The library and its data come with the package `espeakng-loader` (extra `media`); where that is missing, a libespeak-ng
of the system is taken (Debian: libespeak-ng1 and espeak-ng-data). Versions 1.51 and 1.52 speak alike, not bit by bit.
espeak-ng is GPL-3.0: it is called as a library of its own, none of it is part of this project.

The library has one global state for a process, and what was spoken before changes what comes next (flutter, breath). So
every call loads the library anew, under a lock, and seeds its noise: the same arguments give the same samples, in any
order and from any thread. That costs 5 ms beside 1 ms of speech; spread work over processes, not threads.
"""

from __future__ import annotations

import _ctypes
import ctypes
import ctypes.util
import difflib
import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import soxr

SPEEDS, PITCHES = (80, 450), (0, 99)
"""What espeak-ng takes: words/minute, and its own scale of pitch (50 is the voice's usual one)."""

_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 0x02, 0x8000, 1  # espeak_AUDIO_OUTPUT, espeakINITIALIZE_*, espeakCHARS_*
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_WORD = 1  # espeak_EVENT_TYPE
_SILENT = 2e-3  # largest sample of what is cut off at both ends


@dataclass(frozen=True)
class Utterance:
    """What is to be said; the arguments of `synthesize`."""

    text: str
    voice: str = "en"
    speed: int = 160
    pitch: int = 50


@dataclass(frozen=True)
class Word:
    """A word and when it is spoken: start <= t < end (s)."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Speech:
    """samples: float32 [n] in -1..1, mono, without silence at the ends; rate (Hz)."""

    samples: np.ndarray
    rate: int
    words: tuple[Word, ...]

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


class _Name(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),  # characters
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    ]


class _Voice(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_void_p),  # as often as there are languages: a byte of priority, a code, NUL; then NUL
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Engine:
    """A fresh copy of the library, for one call: `with _Engine() as engine`."""

    def __init__(self) -> None:
        self.lib, data = _library()
        self.rate = int(self.lib.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT))
        if self.rate <= 0:
            raise ValueError(f"espeak-ng finds no data ({data!r}); install it anew: pip install espeakng-loader")
        ctypes.CDLL(None).srand(1)  # noise of breath and whisper: version 1.51 draws from C, 1.52 has a seed of its own
        if seed := getattr(self.lib, "espeak_ng_SetRandSeed", None):
            seed(ctypes.c_long(1))
        self.lib.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
        self.chunks: list[np.ndarray] = []
        self.marks: list[tuple[int, int, int]] = []
        self._receive = _CALLBACK(self._received)  # kept: ctypes would free it
        self.lib.espeak_SetSynthCallback(self._receive)

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.lib.espeak_Terminate()
        _ctypes.dlclose(self.lib._handle)  # the next one begins with the library's variables as they are in the file

    def _received(self, samples: object, n: int, events: object) -> int:
        if samples and n > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (n,)).copy())  # type: ignore[call-overload]
        at = 0
        while events[at].type:  # type: ignore[index]
            event = events[at]  # type: ignore[index]
            if event.type == _WORD:
                self.marks.append((event.audio_position, event.text_position - 1, event.length))
            at += 1
        return 0

    def languages(self) -> Iterator[str]:
        for voice in self._voices(None):
            place = voice.languages
            while ctypes.string_at(place, 1) != b"\0":
                code = ctypes.string_at(place + 1)
                yield code.decode()
                place += len(code) + 2

    def variants(self) -> Iterator[str]:
        kind = ctypes.create_string_buffer(b"variant")
        for voice in self._voices(ctypes.byref(_Voice(languages=ctypes.addressof(kind)))):
            yield voice.identifier.decode().rpartition("/")[2]

    def _voices(self, wanted: object) -> Iterator[_Voice]:
        found = self.lib.espeak_ListVoices(wanted)
        at = 0
        while found[at]:
            yield found[at].contents
            at += 1

    def speak(self, text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """Samples, and for every word (ms, its first character, characters)."""
        self.chunks, self.marks = [], []
        if self.lib.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"voice={voice!r}: espeak-ng cannot load it")
        for parameter, value in ((_RATE, speed), (_VOLUME, 100), (_PITCH, pitch), (_RANGE, 50)):
            self.lib.espeak_SetParameter(parameter, value, 0)
        data = text.encode()
        if self.lib.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, _UTF8, None, None):
            raise ValueError(f"espeak-ng failed on a text of {len(text)} characters")
        self.lib.espeak_Synchronize()
        wave = np.concatenate(self.chunks).astype(np.float32) / 32768 if self.chunks else np.zeros(0, np.float32)
        return wave, self.marks


_lock = threading.Lock()


@functools.cache
def voices() -> frozenset[str]:
    """Language codes that can be spoken ("en", "en-us", "de", ...)."""
    with _lock, _Engine() as engine:
        return frozenset(engine.languages())


@functools.cache
def variants() -> frozenset[str]:
    """Speakers that any language can be spoken by: "en+f3"."""
    with _lock, _Engine() as engine:
        return frozenset(engine.variants())


def synthesize(text: str, voice: str = "en", speed: int = 160, pitch: int = 50, rate: int | None = None) -> Speech:
    """The text as speech.

    Args:
        voice: a language code of `voices()`, with "+" and one of `variants()` if another speaker is wanted.
        speed: words/minute, 80 to 450.
        pitch: 0 to 99; 50 is the voice's usual one.
        rate: of the result (Hz), resampled; None keeps espeak-ng's 22050.

    Raises:
        ValueError: no espeak-ng, an unknown voice, a number out of range, or a text of which nothing is spoken.
    """
    return synthesize_all([Utterance(text, voice, speed, pitch)], rate)[0]


def synthesize_all(utterances: Sequence[Utterance], rate: int | None = None) -> list[Speech]:
    """All of them by one copy of the library, 1 ms each: a function of the whole sequence, not of each utterance alone.

    Raises:
        ValueError: as `synthesize`, before anything is spoken except where a text has no sound.
    """
    for utterance in utterances:
        _check(utterance)

    def speak() -> list[Speech]:
        with _lock, _Engine() as engine:
            return [_speech(u, *engine.speak(u.text, u.voice, u.speed, u.pitch), engine.rate, rate) for u in utterances]

    # In a thread of its own: Python runs signal handlers in the main thread alone. What a handler raises (Ctrl-C, the
    # end of a job) inside of the library's callback would be lost, and 60 ms of speech with it.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(speak).result()


def _speech(
    utterance: Utterance, wave: np.ndarray, marks: Sequence[tuple[int, int, int]], native: int, rate: int | None
) -> Speech:
    """Trims the silence at both ends, times the words, resamples."""
    text, loud = utterance.text, np.flatnonzero(np.abs(wave) > _SILENT)
    if not len(loud):
        raise ValueError(
            f"nothing is spoken of a text of {len(text)} characters: it has no word of the voice {utterance.voice!r}"
        )
    first, last = max(int(loud[0]) - 200, 0), min(int(loud[-1]) + 200, len(wave))  # 9 ms of margin
    wave = wave[first:last]
    starts = [min(max(ms / 1000 - first / native, 0.0), len(wave) / native) for ms, _, _ in marks]
    ends = [*starts[1:], len(wave) / native]
    words = tuple(
        Word(text[at : at + n], start, end) for (_, at, n), start, end in zip(marks, starts, ends, strict=True)
    )
    if rate is not None and rate != native:
        wave = soxr.resample(wave, native, rate).astype(np.float32)
    return Speech(wave.clip(-1, 1), rate or native, words)


def _check(utterance: Utterance) -> None:
    """espeak-ng takes an unknown speaker without a word, and a name with slashes for a file."""
    for key, value, (low, high) in (("speed", utterance.speed, SPEEDS), ("pitch", utterance.pitch, PITCHES)):
        if not low <= value <= high:
            raise ValueError(f"{key}={value}: expected {low} to {high}")
    if "\0" in utterance.text:
        raise ValueError("text: has a character NUL, which ends a text for espeak-ng; take it out")
    voice = utterance.voice
    language, plus, variant = voice.partition("+")
    kinds = [("language", language, voices())] + ([("speaker", variant, variants())] if plus else [])
    for kind, name, known in kinds:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 6, 0.3) or sorted(known)[:6]
            raise ValueError(f"voice={voice!r}: no {kind} {name!r}; expected for instance {', '.join(near)}")


def _library() -> tuple[ctypes.CDLL, bytes | None]:
    """The library and its data folder; None: where the system has it.

    Raises:
        ValueError: there is neither the package nor a library of the system, or neither can be loaded.
    """
    try:
        import espeakng_loader

        return ctypes.CDLL(espeakng_loader.get_library_path()), espeakng_loader.get_data_path().encode()
    except (ImportError, OSError, RuntimeError) as error:  # no package, a library of another machine, no data
        package = error
    name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
    try:
        return ctypes.CDLL(name), None
    except OSError as error:
        raise ValueError(
            f"speech needs espeak-ng: pip install espeakng-loader ({package}), or on Debian and Ubuntu apt-get install "
            f"libespeak-ng1 espeak-ng-data ({error})"
        ) from error
