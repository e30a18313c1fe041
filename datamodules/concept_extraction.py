"""Concepts from any causal language model, also one of 135 million parameters.

A small model cannot be trusted to answer in a format, but it is a good judge of likelihoods. So nothing is generated:
every candidate is written out and the model says how likely it is.
1. The phrase is a run of words of the question. All runs (up to `max_words`, within a sentence, not beginning or
   ending in a function word) are scored as the answer to a few-shot prompt whose examples are harmless and made up:
   log p(run, end of line | examples, question). That is exact decoding under the constraint, not a beam.
2. The kind: does the phrase fit where a verb is due ("wanted to ...") better than where a thing is due ("a photo of")?
3. The sentence and the instruction: the rules of datamodules/english.py propose, the model ranks.
docs/concept-extraction.md holds the measured quality, and what was tried and dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.continuations import ContinuationScorer
from datamodules.english import Word, activity_sentences, neutral_fillers, neutral_instruction, words_of
from datamodules.records import Concept, Kind, Record
from datamodules.text_cache import TextCache, content_key
from mllm.fingerprint import fingerprint

EXAMPLES = (
    (
        "I need the opening hours of the city library. Can you give me them please",
        "the opening hours of the city library",
    ),
    ("how do farmers get water to their fields", "get water to their fields"),
    ("Is it silly to keep a parrot just because it can talk?", "keep a parrot"),
    ("Do you know any good riddles about cats?", "good riddles about cats"),
    ("Is painting a fence in the rain a bad idea?", "painting a fence in the rain"),
    ("My neighbor is nice, and I want to throw him a party. Any ideas?", "throw him a party"),
    ("Where could someone buy a cheap telescope?", "a cheap telescope"),
    ("What kind of knife do I need to cut a pumpkin?", "cut a pumpkin"),
    ("I think I might build a kite soon. Can you help with things like this?", "build a kite"),
    ("How do I bake sourdough bread at home?", "bake sourdough bread at home"),
)
ASK = "Question: {}\nThe person wants to do or to have:"
HEAD = "Each question mentions something that a person wants to do or to have. Copy those words.\n\n" + "".join(
    f"{ASK.format(question)} {phrase}\n\n" for question, phrase in EXAMPLES
)
WORD_BONUS = 0.3
"""Nats added for each word: likelihood alone prefers phrases that are too short."""

VERB_FRAMES = ("Yesterday someone wanted to", "Yesterday someone was busy")
THING_FRAMES = ("I looked at a photo of", "Here you can see", "Here is a list of")
VERB_FILLERS = ("do this", "doing this")
THING_FILLERS = ("this thing", "item")

NOT_FIRST = frozenset(
    """
    how what why who where when which whose to i we you he she it they is are was were am be been can could would
    should will shall may might must please and or but so that just because if then than i'm i've i'd don't not there
    here as of for with in on at by from about into me us him them really also even before after during until
    while
""".split()
)
NOT_LAST = frozenset(
    """
    how what why who where when which whose to the a an and or but so that of for with at from about into my your his
    their our i is are was were be can could would should will if because than as just not do does did please
""".split()
)
AUXILIARIES = frozenset("do does did have has".split())
BEHIND_AUXILIARIES = frozenset("i you we they he she it people anyone someone not the that".split())
ASKING = frozenset("give tell show help provide let".split())


class LocalExtractor:
    """The extractor `local`.

    Args:
        model: a folder or hub id of a causal language model (safetensors), or a loaded (model, tokenizer).
        cache_dir: finished concepts are kept here, by the question and the model's weights; None keeps none.
        max_words: longest phrase, in words.
        max_rows: candidate rows in one forward.
        device: where a model named by path is put.
    """

    def __init__(
        self,
        model: str | Path | tuple[Any, Any],
        cache_dir: str | Path | None = None,
        max_words: int = 16,
        max_rows: int = 32,
        device: str = "cpu",
    ):
        if isinstance(model, tuple):
            self.model, self.tokenizer = model
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True).to(device)
        self.max_words = max_words
        self._scorer = ContinuationScorer(self.model, self.tokenizer, HEAD, max_rows)
        self._cache = TextCache(Path(cache_dir)) if cache_dir is not None else None
        self._fingerprint = fingerprint(self.model) if cache_dir is not None else ""

    def __call__(self, records: Sequence[Record]) -> Iterator[Concept | str]:
        for record in records:
            yield self.extract(record.question)

    def extract(self, question: str) -> Concept | str:
        """The concept of a question, or the reason why there is none."""
        frames = [VERB_FRAMES, THING_FRAMES, VERB_FILLERS, THING_FILLERS]
        key = content_key([self._fingerprint, HEAD, WORD_BONUS, frames, self.max_words, question])
        if self._cache is not None and (text := self._cache.read(key)) is not None:
            return Concept(**json.loads(text))
        spans = candidate_spans(question, self.max_words)
        if not spans:
            return "no run of words in the question can be its phrase"
        try:
            start, end = self.phrase(question, spans)
        except ValueError as error:
            return str(error)
        kind = self.kind(question, start, end)
        concept = Concept(
            question[start:end],
            kind,
            self.sentence(question[start:end], kind),
            self.instruction(question, start, end, kind),
        )
        if self._cache is not None:
            self._cache.write(key, json.dumps(asdict(concept)))
        return concept

    def phrase(self, question: str, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The likeliest of the character spans."""
        texts = [" ".join(question[start:end].split()) for start, end in spans]
        context = ASK.format(" ".join(question.split()))
        scores = self._scorer.score(context, [f" {text}" for text in texts], end="\n")
        bonus = torch.tensor([WORD_BONUS * len(text.split()) for text in texts])
        return spans[int((scores + bonus).argmax())]

    def kind(self, question: str, start: int, end: int) -> Kind:
        """Whether characters [start, end) of the question are something one does or a thing.

        Two questions to the model, added: does the phrase follow "wanted to" better than "a photo of", and does
        "do this" stand better in its place than "this thing"?
        """
        phrase, before = " ".join(question[start:end].split()), " ".join(question[:start].split())
        frames = [(frame, f" {phrase}") for frame in VERB_FRAMES + THING_FRAMES]
        place = ("\n" + before, " ") if before else ("\n", "")
        fillers = [(place[0], place[1] + filler) for filler in VERB_FILLERS + THING_FILLERS]
        fit = self._scorer.score_pairs(frames, end=".")
        fill = self._scorer.score_pairs(fillers)
        verb = fit[: len(VERB_FRAMES)].max() + fill[: len(VERB_FILLERS)].max()
        thing = fit[len(VERB_FRAMES) :].max() + fill[len(VERB_FILLERS) :].max()
        return "activity" if verb > thing else "product"

    def sentence(self, phrase: str, kind: Kind) -> str:
        """The likeliest "a person is ...ing ..."; a product is its own sentence."""
        return phrase if kind == "product" else self._likeliest("\n", "", activity_sentences(phrase), end="\n")

    def instruction(self, question: str, start: int, end: int, kind: Kind) -> str:
        """The question with the phrase made neutral, in the wording that is likeliest behind what stands before it."""
        fillers = neutral_fillers(question, start, end, kind)
        before = " ".join(question[:start].split())
        filler = self._likeliest("\n" + before, " ", fillers) if before else fillers[0]
        return neutral_instruction(question, start, end, filler)

    def _likeliest(self, context: str, lead: str, texts: list[str], end: str = "") -> str:
        if len(texts) == 1:
            return texts[0]
        return texts[int(self._scorer.score_pairs([(context, lead + text) for text in texts], end).argmax())]


def candidate_spans(question: str, max_words: int) -> list[tuple[int, int]]:
    """Character spans that may be the phrase: runs of words within a sentence, without function words at the edges."""
    words = words_of(question)
    spans = []
    for first in range(len(words)):
        for last in range(first, min(first + max_words, len(words))):
            if last > first and words[last - 1].stop:
                break
            if _may_be_phrase(words, first, last):
                spans.append((words[first].start, words[last].end))
    return spans


def _may_be_phrase(words: Sequence[Word], first: int, last: int) -> bool:
    one, end = words[first].lower, words[last].lower
    if not one or not end or one in NOT_FIRST or end in NOT_LAST:
        return False
    second = words[first + 1].lower if last > first else ""
    if one in ASKING and second in ("me", "us", "with", ""):
        return False
    return not (one in AUXILIARIES and second in BEHIND_AUXILIARIES | {""})
