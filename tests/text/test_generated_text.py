"""Generated text: repeatable, indexable, and not noise."""

from collections import Counter
from itertools import islice, pairwise

from unbraid.activations.random_model import word_tokenizer
from unbraid.config import TextConfig
from unbraid.text import open_source
from unbraid.text.generated import N_SUCCESSORS, WORDS, GeneratedSource


def test_document_numbers_name_documents_whatever_was_read_before() -> None:
    first = list(islice(GeneratedSource(3).documents(), 20))
    assert list(islice(GeneratedSource(3).documents(7), 13)) == first[7:]
    assert [document.index for document in first] == list(range(20))


def test_another_seed_is_another_text() -> None:
    assert GeneratedSource(0).text(0) != GeneratedSource(1).text(0)


def test_the_setting_opens_it() -> None:
    source = open_source(TextConfig(source="generated", shuffle_seed=3))
    assert source.identity == {"source": "generated", "seed": 3}
    assert next(source.documents(5)).text == GeneratedSource(3).text(5)


def test_words_are_zipfian_and_predict_each_other() -> None:
    words = [word.strip(".") for index in range(50) for word in GeneratedSource(0).text(index).split()]
    counts = Counter(words).most_common()
    assert counts[0][1] > 10 * counts[len(counts) // 2][1]
    followers = Counter(following for word, following in pairwise(words) if word == counts[0][0])
    assert sum(number for _, number in followers.most_common(N_SUCCESSORS)) > 0.5 * counts[0][1]


def test_each_word_is_one_token_of_the_random_models_tokenizer() -> None:
    tokenizer = word_tokenizer()
    assert len(tokenizer.encode(" ".join(WORDS), add_special_tokens=False)) == len(WORDS)
    text = GeneratedSource(0).text(0)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
