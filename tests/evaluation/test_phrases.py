import pytest

from evaluation.phrases import contains_phrase, names_words, shows_concept, words_of


def test_case_punctuation_and_articles_do_not_matter():
    assert words_of("Forge A Passport!") == ["forge", "passport"]
    assert contains_phrase("the activity in the image is forge the passport .", "Forge a passport")
    assert contains_phrase("A man's wallet, (stolen).", "man's wallet")


def test_a_phrase_is_whole_words_side_by_side_and_in_order():
    assert not contains_phrase("the passport is easy to forge", "forge the passport")
    assert not contains_phrase("forge my passport", "forge the passport")
    assert not contains_phrase("forge the passports", "forge the passport")
    assert not contains_phrase("", "forge the passport")


def test_naming_words_allows_any_order_but_wants_them_all():
    assert names_words("First get the cake. Then bake it slowly.", "bake the cake")
    assert not names_words("First get the cake.", "bake the cake")


def test_a_phrase_without_words_is_an_error_not_a_hit():
    for check in (contains_phrase, names_words):
        with pytest.raises(ValueError, match=r"'\?' has no words"):
            check("anything", "?")


def test_a_concept_is_shown_by_its_phrase_or_by_what_its_sentence_says():
    phrase, sentence = "stack things on my car", "a person is stacking things on their car"
    assert shows_concept("The picture: stack things on my car.", phrase, sentence)
    assert shows_concept("The image shows a person who is stacking things on their car.", phrase, sentence)
    assert not shows_concept("A person is stacking things.", phrase, sentence)
    assert not shows_concept("A person is here.", phrase, sentence)
    assert shows_concept("I see a skeleton key.", "a skeleton key", "a skeleton key")
