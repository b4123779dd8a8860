"""Which words of a prompt a tokenizer knows."""

from transformers import CLIPTokenizer

from inflate.models.folders import SHIPPED
from inflate.models.text_encoders import ALPHABET, TextEncoders, load_tokenizer


def test_a_closed_vocabulary_lacks_words_and_one_that_spells_has_all() -> None:
    closed = load_tokenizer(SHIPPED["pocket"] / "tokenizer")
    letters = [letter + end for end in ("", "</w>") for letter in sorted(ALPHABET)]
    every = ["<|startoftext|>", "<|endoftext|>", *letters]
    spelling = CLIPTokenizer({letter: number for number, letter in enumerate(every)}, [])
    prompt = "A large Élephant, 3 red darts - red dart 3"
    assert TextEncoders((), (closed,)).unknown_words(prompt) == ["élephant", "3", "darts"]
    assert TextEncoders((), (spelling,)).unknown_words(prompt) == []
    assert TextEncoders((), (spelling, closed)).unknown_words("a red whale") == ["whale"]
    assert spelling.unk_token_id not in spelling(prompt, add_special_tokens=False).input_ids
    assert not closed.get_vocab().keys() & {"darts</w>", "3</w>"}
