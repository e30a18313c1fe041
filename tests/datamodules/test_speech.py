"""Speech from espeak-ng: real synthesis, the same every time, words where they are spoken, errors that help."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from datamodules.speech import Speech, synthesize, variants, voices

PHRASE = "forge the passport"


def test_a_phrase_is_spoken_and_every_word_has_its_time() -> None:
    speech = synthesize(PHRASE, "en+f3", 150, 50, rate=16000)
    assert speech.samples.dtype == np.float32
    assert speech.samples.ndim == 1
    assert 0.8 < speech.seconds < 2.0
    assert 0.05 < float(np.abs(speech.samples).max()) <= 1.0
    assert [w.text for w in speech.words] == PHRASE.split()
    assert speech.words[0].start < 0.05
    assert all(a.end == b.start for a, b in zip(speech.words, speech.words[1:], strict=False))
    assert speech.words[-1].end == pytest.approx(speech.seconds, abs=0.01)
    stressed, article = (speech.words[i].end - speech.words[i].start for i in (2, 1))
    assert stressed > 2 * article


def test_words_lie_where_they_sound() -> None:
    """A plosive at the start of a word is preceded by its closure, which is near silence."""
    speech = synthesize("bake cake", "en", 120)
    second = round(speech.words[1].start * speech.rate)
    energy = np.convolve(speech.samples**2, np.ones(220) / 220, mode="same")
    around = energy[second - 1500 : second + 1500]
    assert around.min() < 0.02 * energy.max()


def test_faster_is_shorter_and_higher_pitch_is_higher() -> None:
    seconds = [synthesize(PHRASE, "en", speed).seconds for speed in (100, 150, 220)]
    assert seconds[0] > 1.2 * seconds[1] > 1.4 * seconds[2]
    low, high = (fundamental(synthesize("aaaaah", "en", 100, pitch)) for pitch in (10, 90))
    assert 50 < low < 0.7 * high < 400


def fundamental(speech: Speech) -> float:
    """Hz, of the middle of the clip, by autocorrelation."""
    middle = speech.samples[len(speech.samples) // 2 - 2048 : len(speech.samples) // 2 + 2048]
    correlation = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    lags = slice(speech.rate // 500, speech.rate // 50)
    return speech.rate / (lags.start + int(np.argmax(correlation[lags])))


def test_the_same_arguments_give_the_same_samples_in_any_order_and_thread() -> None:
    jobs = [(text, f"en+{v}", 160, 50) for text in ("hack bank", PHRASE) for v in ("f2", "whisper", "klatt3", "m1")]
    first = {job: synthesize(*job).samples for job in jobs}
    assert len({samples.tobytes() for samples in first.values()}) == len(jobs)
    again: dict[tuple[str, str, int, int], np.ndarray] = {}
    shuffled = random.Random(0).sample(jobs, len(jobs))
    threads = [
        threading.Thread(target=lambda part: again.update({j: synthesize(*j).samples for j in part}), args=(part,))
        for part in (shuffled[::2], shuffled[1::2])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(first[job], again[job]) for job in jobs)


def test_another_process_speaks_the_same() -> None:
    program = (
        "import hashlib; from datamodules.speech import synthesize; "
        f"print(hashlib.sha256(synthesize({PHRASE!r}, 'en+croak', 170, 40).samples.tobytes()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65, runs[0].stderr


def test_a_signal_while_it_speaks_is_heard_and_costs_no_speech() -> None:
    """What a handler raised inside of the library's callback was lost, and the samples of that callback with it."""

    class Told(Exception):
        pass

    def told(*_: object) -> None:
        raise Told

    whole = [synthesize("paint the wooden fence", pitch=pitch).samples for pitch in range(40, 60)]
    before, heard, rng = signal.signal(signal.SIGALRM, told), 0, random.Random(0)
    try:
        for _ in range(15):
            for pitch, expected in zip(range(40, 60), whole, strict=True):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 1.5e-2))
                    found = synthesize("paint the wooden fence", pitch=pitch).samples
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Told:
                    heard += 1
                    continue
                assert np.array_equal(found, expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert heard > 30


def test_resampling_keeps_the_length_in_seconds() -> None:
    native, resampled = synthesize(PHRASE), synthesize(PHRASE, rate=16000)
    assert (native.rate, resampled.rate) == (22050, 16000)
    assert resampled.seconds == pytest.approx(native.seconds, abs=1e-3)
    assert native.words == resampled.words


def test_voices_are_languages_and_speakers() -> None:
    assert {"en", "en-us", "de", "fr"} <= voices()
    assert {"f3", "m1", "whisper"} <= variants()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"voice": "xx-nowhere"}, "no language 'xx-nowhere'"),
        ({"voice": "en+nobody"}, "no speaker 'nobody'; expected for instance"),
        ({"voice": "../../etc/passwd"}, "no language"),
        ({"voice": "en+../f3"}, "no speaker"),
        ({"speed": 20}, "speed=20: expected 80 to 450"),
        ({"pitch": 120}, "pitch=120: expected 0 to 99"),
        ({"text": " . "}, "nothing is spoken of a text of 3 characters"),
        ({"text": "a\0b"}, "NUL"),
    ],
)
def test_mistakes_are_named(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(**{"text": PHRASE, **changed})


def test_without_espeak_the_error_says_how_to_get_it() -> None:
    """In a process in which neither the package nor a library of the system can be found."""
    program = (
        "import sys, ctypes.util\n"
        "sys.modules['espeakng_loader'] = None\n"
        "ctypes.util.find_library = lambda name: 'libespeak-ng-that-is-nowhere.so'\n"
        "from datamodules.speech import synthesize\n"
        "try: synthesize('a')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install espeakng-loader" in done.stdout
    assert "apt-get install libespeak-ng1" in done.stdout
