"""Text that is never taken back: pieces make the whole text whatever the tokenizer, the cuts and the stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.small_tokenizers import CORPUS, KINDS, byte_level, sentencepiece_like, words
from telltale.serve.detokenise import Detokeniser, OutputText, StopStrings, output_text


def whole(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@st.composite
def cut_tokens(draw, vocabulary):
    """Tokens in pieces: any ids, special ones among them, some next to each other by design."""
    tokens = draw(st.lists(st.integers(0, vocabulary - 1), max_size=24))
    cuts = sorted(draw(st.sets(st.integers(0, len(tokens)), max_size=8)))
    return [tokens[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]


@pytest.mark.long
@pytest.mark.parametrize("kind", list(KINDS))
def test_pieces_of_any_tokens_make_the_decoded_text(kind):
    tokenizer = KINDS[kind]()

    @given(cut_tokens(len(tokenizer)))
    @settings(max_examples=300, deadline=None)
    def check(pieces):
        expected = whole(tokenizer, [token for piece in pieces for token in piece])
        stream = Detokeniser(tokenizer)
        sent = ""
        for piece in pieces:
            sent += stream.push(piece)
            assert expected.startswith(sent), "text was sent that the whole does not have"
        assert sent + stream.finish() == expected

    check()


@given(st.lists(st.integers(4, 4 + 255), min_size=1, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
@settings(max_examples=300, deadline=None)
def test_runs_of_fallback_bytes_are_never_taken_back(run, hidden):
    """A decoder reads a run of bytes all or nothing, so a good character in it may still become unreadable."""
    tokenizer = sentencepiece_like()
    tokens = [2 if hide else token for token, hide in zip(run, hidden, strict=False)]
    stream = Detokeniser(tokenizer)
    sent = "".join(stream.push([token]) for token in tokens)
    assert whole(tokenizer, tokens).startswith(sent)
    assert sent + stream.finish() == whole(tokenizer, tokens)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_characters_of_several_tokens_come_whole_and_at_once(kind):
    tokenizer = KINDS[kind]()
    text = "Grüße 你好 🙂 done"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any("�" in whole(tokenizer, [token]) for token in tokens) or kind == "sentencepiece"
    stream = Detokeniser(tokenizer)
    sent = [stream.push([token]) for token in tokens]
    assert "".join(sent) + stream.finish() == text
    assert not any("�" in piece for piece in sent)
    assert sum(map(bool, sent)) > 5, "nothing was sent before the end"


def test_words_keep_the_spaces_between_them():
    tokenizer = sentencepiece_like()
    tokens = tokenizer(CORPUS[2], add_special_tokens=False)["input_ids"]
    stream = Detokeniser(tokenizer)
    assert "".join(stream.push([token]) for token in tokens) == CORPUS[2]
    tokens = words()("one two three", add_special_tokens=False)["input_ids"]
    stream = Detokeniser(words())
    assert [stream.push([token]) for token in tokens] == ["one", " two", " three"]


def test_a_continuation_keeps_the_space_that_the_decoder_drops():
    tokenizer = sentencepiece_like()
    tokens = tokenizer("two three", add_special_tokens=False)["input_ids"]
    assert output_text(tokenizer, tokens) == "two three"
    assert output_text(tokenizer, tokens, continues=True) == " two three"
    assert output_text(tokenizer, [2, *tokens], continues=True) == " two three"
    inner = tokenizer.convert_tokens_to_ids("e")
    assert output_text(tokenizer, [inner, *tokens], continues=True) == "e two three"
    assert output_text(byte_level(), byte_level()(" two")["input_ids"], continues=True) == " two"
    assert output_text(words(), words()("two three")["input_ids"], continues=True) == "two three"


def test_special_tokens_are_hidden():
    tokenizer = byte_level()
    tokens = [3, *tokenizer("two")["input_ids"], 3, *tokenizer(" three")["input_ids"], 2]
    stream = Detokeniser(tokenizer)
    assert "".join(stream.push([token]) for token in tokens) + stream.finish() == "two three"


texts = st.text(alphabet="abc", max_size=14)


@given(texts, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
@settings(max_examples=500, deadline=None)
def test_text_is_cut_before_the_first_stop_string_and_nothing_of_it_is_sent(text, stops, data):
    """Character by character, so that the cut is that of the stop string which is complete first."""
    stream = StopStrings(stops)
    sent = ""
    for place, character in enumerate(text):
        sent += stream.push(character)
        seen = text[: place + 1]
        if any(stop in seen for stop in stops):
            cut = min(seen.find(stop) for stop in stops if stop in seen)
            assert stream.found
            assert sent == text[:cut]
            assert stream.push("abc") == stream.finish() == ""
            return
        assert not stream.found
        held = seen[len(sent) :]
        assert held == "" or any(stop.startswith(held[:1]) for stop in stops)
    assert sent + stream.finish() == text


def test_a_stop_string_across_tokens_and_pieces():
    tokenizer = byte_level()
    tokens = tokenizer("one two three four")["input_ids"]
    stream = OutputText(tokenizer, stops=["o thr", "zzz"])
    sent = ""
    for token in tokens:
        sent += stream.push([token])
        if stream.stopped:
            break
    assert sent + stream.finish() == "one tw"
    assert output_text(tokenizer, tokens, stops=["o thr"]) == "one tw"
    assert output_text(tokenizer, tokens, stops=["four!"]) == "one two three four"
