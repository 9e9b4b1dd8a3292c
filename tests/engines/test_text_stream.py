"""Streaming: the pieces are the text, and no piece holds half a character."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from vflow.engines.text_stream import StopStrings, TextStream

BYTES = [f"<0x{value:02X}>" for value in range(256)]


def byte_fallback() -> Tokenizer:
    """Every byte a token, and two words with a leading space, as SentencePiece models have them."""
    vocabulary = {token: number for number, token in enumerate([*BYTES, "▁red", "▁circle"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0x00>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(lambda some: tokenizer.decode(list(some)))
    return [*(stream.push(token) for token in tokens), stream.finish()]


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=12))
def test_pieces_of_a_byte_level_text_are_that_text(tokenizer: Tokenizer, text: str) -> None:
    parts = pieces(tokenizer, tokenizer.encode(text).ids)
    assert "".join(parts) == text
    assert all("�" not in part for part in parts) or "�" in text


def test_a_character_of_four_tokens_comes_in_one_piece(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, tokenizer.encode("a😀b").ids) == ["a", "", "", "", "😀", "b", ""]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=12))
def test_any_bytes_come_out_as_the_tokenizer_decodes_them(tokenizer: Tokenizer, tokens: list[int]) -> None:
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_an_answer_cut_within_a_character_shows_what_is_there_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("aé").ids[:-1]
    assert pieces(tokenizer, tokens) == ["a", "", "�"]


def test_word_tokens_keep_their_spaces_but_the_first() -> None:
    assert pieces(byte_fallback(), [256, 257, 256]) == ["red", " circle", " red", ""]


def test_words_without_a_decoder_are_joined_by_spaces() -> None:
    tokenizer = Tokenizer(models.WordLevel({"red": 0, "circle": 1}, unk_token="red"))
    assert pieces(tokenizer, [0, 1, 1]) == ["red", " circle", " circle", ""]


def test_special_tokens_in_between_say_nothing(tokenizer: Tokenizer) -> None:
    special = tokenizer.token_to_id("<|box_start|>")
    assert "".join(pieces(tokenizer, [special, *tokenizer.encode("ab").ids, special, *tokenizer.encode("c").ids])) == "abc"


def test_long_answers_cost_the_same_for_each_token() -> None:
    lengths: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        lengths.append(len(tokens))
        return "x" * len(tokens)

    stream = TextStream(decode)
    assert all(stream.push(token) == "x" for token in range(200))
    assert max(lengths) <= 2


@given(st.text("ab.", max_size=12), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_in_pieces_is_cut_where_the_whole_would_be(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stream, shown = StopStrings(stops), ""
    for number, piece in enumerate(pieces):
        shown += stream.push(piece, last=number == len(pieces) - 1)
        if stream.found:
            break
    places = [text.find(stop) for stop in stops if stop in text]
    assert stream.found == bool(places)
    assert shown in ([text[:place] for place in places] or [text])  # of two that overlap, the one that is complete first


def test_what_may_begin_a_stop_is_held_back_no_longer_than_needed() -> None:
    stream = StopStrings(["end."])
    assert [stream.push(piece, last=False) for piece in ("an e", "nd", " en", "d.x")] == ["an ", "", "end ", ""]
    assert stream.found


def test_the_stop_that_comes_first_in_the_text_counts() -> None:
    stops = StopStrings(["cd", "b"])
    assert stops.push("abcd", last=False) == "a"
    assert stops.found
