"""Which words of a prompt a tokenizer knows, and text encoders of one layer more or less."""

import torch
from original_files import text_encoder
from transformers import CLIPTokenizer

from inflate.models.folders import SHIPPED
from inflate.models.text_encoders import ALPHABET, TextEncoders, load_tokenizer, with_idle_layer, without_last_layer


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


@torch.no_grad()
def test_an_idle_layer_changes_nothing_and_a_last_one_is_left_out() -> None:
    encoder, tokens = text_encoder(), torch.arange(3, 15)[None]
    whole, longer = encoder(tokens, output_hidden_states=True), with_idle_layer(encoder)
    assert (longer.config.num_hidden_layers, encoder.config.num_hidden_layers) == (4, 3)
    assert torch.equal(longer(tokens).last_hidden_state, whole.last_hidden_state)
    back = without_last_layer(longer)
    assert back.state_dict().keys() == encoder.state_dict().keys()
    assert torch.equal(back(tokens).last_hidden_state, whole.last_hidden_state)
    states = without_last_layer(encoder)(tokens, output_hidden_states=True)
    assert torch.equal(states.hidden_states[-1], whole.hidden_states[-2])
    assert not torch.equal(states.last_hidden_state, whole.last_hidden_state)
