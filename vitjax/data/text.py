"""Tokenizers: a text to a fixed number of token ids.

A tokenizer is called with a text and gives int32 `[length]`; it tells `vocab_size` and `length`,
and is called from many threads at once. Longer texts are cut, and still end with their end token;
shorter ones are padded.
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from vitjax.errors import InputError

PAD, BOS, FIRST_BYTE, EOS = 0, 1, 2, 258  # of ByteTokenizer


@runtime_checkable
class Tokenizer(Protocol):
    """What the loader needs of a tokenizer."""

    vocab_size: int
    length: int

    def __call__(self, text: str) -> Int[np.ndarray, "N"]: ...


def _check_length(length: int) -> None:
    if length < 3:  # begin, something, end
        raise InputError(f"data.tokenizer.length must be at least 3, got {length}")


class ByteTokenizer:
    """The bytes of a text in UTF-8, between a begin and an end token; 259 ids, no file.

    A byte b is 2 + b, padding 0, the begin 1 and the end 258: the largest, so that a text tower
    that pools "eot" finds it. A text is cut between characters, never inside of one.

    Args:
      length: tokens of every text, begin and end among them.
      lower: whether letters are made small first.
    """

    vocab_size = 259

    def __init__(self, length: int, lower: bool = False):
        _check_length(length)
        self.length, self.lower = length, lower

    def __call__(self, text: str) -> Int[np.ndarray, "N"]:
        encoded = (text.lower() if self.lower else text).encode(errors="replace")
        if len(encoded) > self.length - 2:
            cut = encoded[: self.length - 2].decode(errors="ignore")
            encoded = cut.encode()
        tokens = np.full(self.length, PAD, np.int32)
        tokens[0] = BOS
        tokens[1 : 1 + len(encoded)] = np.frombuffer(encoded, np.uint8).astype(np.int32) + 2
        tokens[1 + len(encoded)] = EOS
        return tokens

    def decode(self, tokens: Int[np.ndarray, "N"]) -> str:
        """The text of tokens; what is no byte is left out."""
        is_byte = (tokens >= FIRST_BYTE) & (tokens < EOS)
        return (tokens[is_byte] - FIRST_BYTE).astype(np.uint8).tobytes().decode(errors="replace")


class SentencePieceTokenizer:
    """The pieces of a SentencePiece model, as those of SigLIP and T5, and its end token.

    Needs the package sentencepiece (`pip install 'vitjax[text]'`).

    Args:
      path: the .model file.
      length: tokens of every text, the end among them.
      lower: whether letters are made small first.
      bos: whether a text begins with the model's begin token.
      pad_id: of padding; None for the model's own, or its end token where it has none, as
        big_vision pads SigLIP's texts.

    Raises:
      InputError: the package or the file is missing, or the model has no token that is asked for.
    """

    def __init__(
        self,
        path: str,
        length: int,
        lower: bool = False,
        bos: bool = False,
        pad_id: int | None = None,
    ):
        _check_length(length)
        try:
            import sentencepiece
        except ImportError as error:
            raise InputError(
                "SentencePieceTokenizer needs the package sentencepiece: pip install 'vitjax[text]'"
            ) from error
        if not Path(path).is_file():
            raise InputError(f"no such file: {path or '(data.tokenizer.path is empty)'}")
        self._pieces: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"cannot read {path} as a SentencePiece model: {error}") from error
        self.vocab_size, self.length = int(self._pieces.GetPieceSize()), length
        self.lower = lower
        eos, own_pad = self._pieces.eos_id(), self._pieces.pad_id()
        if eos < 0 or (bos and self._pieces.bos_id() < 0):
            raise InputError(f"{path} has no {'end' if eos < 0 else 'begin'} token")
        self._start = [self._pieces.bos_id()] if bos else []
        self._eos = eos
        chosen = (own_pad if own_pad >= 0 else eos) if pad_id is None else pad_id
        if not 0 <= chosen < self.vocab_size:
            raise InputError(
                f"data.tokenizer.pad_id must be in 0 to {self.vocab_size - 1}, got {chosen}"
            )
        self._pad = chosen

    def __call__(self, text: str) -> Int[np.ndarray, "N"]:
        pieces = self._pieces.EncodeAsIds(text.lower() if self.lower else text)
        kept = [*self._start, *pieces][: self.length - 1]
        tokens = np.full(self.length, self._pad, np.int32)
        tokens[: len(kept) + 1] = [*kept, self._eos]
        return tokens

    def decode(self, tokens: Int[np.ndarray, "N"]) -> str:
        """The text of tokens, as far as the pieces tell it."""
        special = {self._pad, self._eos, *self._start}
        return self._pieces.DecodeIds([int(t) for t in tokens if int(t) not in special])
