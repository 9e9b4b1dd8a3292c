"""Text out of tokens one by one: no character is shown before all its tokens are there, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["MAX_STOPS", "MAX_STOP_CHARACTERS", "StopStrings", "TextStream"]

MAX_STOPS = 4  # strings that a request over a network may name, as at OpenAI
MAX_STOP_CHARACTERS = 1000  # of each; as much text may be held back, and is compared at every token
INCOMPLETE = "�"  # what decoders write for bytes that are not (yet) a character


class TextStream:
    """Turns token ids into text deltas whose concatenation is the text of all tokens.

    A byte-level token may end inside a character, and some decoders put a space before a token only if another one precedes it.
    So each delta is the difference between two decodings that start at the last token shown before (the constant-cost scheme of
    text-generation-inference), and text that ends in U+FFFD is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._window = 0  # first token of both decodings
        self._shown = 0  # tokens before this one have been shown

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, often nothing."""
        self._tokens.append(token)
        return self._advance(hold_back=True)

    def finish(self) -> str:
        """The text that was held back: characters that never became complete."""
        return self._advance(hold_back=False)

    def _advance(self, *, hold_back: bool) -> str:
        before = self._decode(self._tokens[self._window : self._shown])
        after = self._decode(self._tokens[self._window :])
        if len(after) <= len(before) or (hold_back and after.endswith(INCOMPLETE)):
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]


class StopStrings:
    """Cuts a text that arrives in pieces before the first of some strings; what may be the beginning of one is held back.

    ``found`` says whether one has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def push(self, piece: str, *, last: bool) -> str:
        """Add a piece; returns the text that is certain to stay. With the ``last``, nothing is held back."""
        text = self._held + piece
        if places := [place for stop in self._stops if (place := text.find(stop)) >= 0]:
            self.found, self._held = True, ""
            return text[: min(places)]
        longest = 0 if last else max((len(stop) - 1 for stop in self._stops), default=0)
        begun = next((n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]
