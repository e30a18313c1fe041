"""The tokenizer and the chat template that all embedded models share: one token a word of the closed world."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def words_of(texts: Iterable[str]) -> list[str]:
    """The lower-case words and punctuation marks of the texts, sorted: the vocabulary the tokenizer will know."""
    normalize, split = normalizers.Lowercase().normalize_str, pre_tokenizers.Whitespace().pre_tokenize_str
    return sorted({word for text in texts for word, _ in split(normalize(text))})


def word_tokenizer(
    special: Sequence[str], vocabulary: Iterable[str], named: Mapping[str, str]
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer.

    Args:
        special: special tokens, which get the first ids; <pad>, <bos>, <eos>, <unk> are among them.
        named: attribute -> token, for what the family's processor asks the tokenizer for ({"image_token": "<image>"}).
    """
    ids = {word: i for i, word in enumerate([*special, *vocabulary])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, none before punctuation
    backend.add_special_tokens([AddedToken(t, special=True, lstrip=True, rstrip=True) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens=dict(named),
    )


def chat_template(modality: str, placeholder: str) -> str:
    """Turns of <user> and <assistant>; a part of type `modality` becomes the placeholder, others their text."""
    return (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }} "
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == '" + modality + "' %}" + placeholder + " {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
