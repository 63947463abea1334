"""Text to ids and ids to bytes, exactly, for the tokenizers of the Qwen family and other lossless ones.

Sampled ids are read as bytes, not as text: one token may hold part of a character, and only bytes
concatenate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders

from megavar.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenCodec:
    """A tokenizer without its template-side conveniences. Raises UserError for one with no fast backend."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"{type(tokenizer).__name__} has no tokenizer.json; save the model with its fast tokenizer"
            )
        self._tokenizer, self._backend = tokenizer, backend
        # `split_special_tokens=True` of transformers spares special added tokens only; Qwen3's <think> and
        # tool marks are added tokens that are not special. Inserted text must match neither, so it gets a
        # tokenizer of its own that shares the vocabulary and knows no added token.
        self._text = Tokenizer(backend.model)
        self._text.normalizer = backend.normalizer
        self._text.pre_tokenizer = backend.pre_tokenizer
        self._added = {
            index: token.content.encode() for index, token in backend.get_added_tokens_decoder().items()
        }
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._pieces: dict[int, bytes] = {}

    def encode_fixed(self, text: str) -> np.ndarray:
        """int32 ids of a template's piece; added tokens are recognised."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        return np.asarray(ids, dtype=np.int32)

    def encode_text(self, text: str, whose: str) -> np.ndarray:
        """int32 ids of inserted text; no added token is recognised in it.

        Raises UserError where a character has no id (byte-level vocabularies have them all).
        """
        ids = np.asarray(self._text.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        if not self._byte_level and self.to_bytes(ids) != self._normalised(text):
            chars = {char: np.asarray(self._text.encode(char).ids) for char in set(text)}
            missing = sorted(char for char, index in chars.items() if self.to_bytes(index) != char.encode())
            raise UserError(
                f"the tokenizer cannot represent {missing[:10]} in the text {whose}: {text[:60]!r}"
            )
        return ids

    def to_bytes(self, ids: np.ndarray) -> bytes:
        """The UTF-8 bytes the ids stand for, special tokens included; ids beyond the vocabulary stand for
        none."""
        return b"".join(self._pieces_of(ids))

    def find(self, ids: np.ndarray, marker_ids: np.ndarray, marker: str) -> tuple[int | None, bool]:
        """Number of ids up to and including the first marker, and whether it ends at a token's end.

        A marker that is one added token is looked for by id; any other by its text. (None, True) if there is
        none.
        """
        if self.is_added(marker_ids):
            places = np.flatnonzero(ids == marker_ids[0])
            return (int(places[0]) + 1, True) if len(places) else (None, True)
        pieces = self._pieces_of(ids)
        place = b"".join(pieces).find(marker.encode())
        if place < 0:
            return None, True
        ends = np.cumsum([len(piece) for piece in pieces])
        last = int(np.searchsorted(ends, place + len(marker.encode())))
        return last + 1, bool(ends[last] == place + len(marker.encode()))

    def find_byte(self, ids: np.ndarray, marker_ids: np.ndarray, marker: str, begin: int) -> int | None:
        """Byte at which the first marker that starts at or after byte `begin` starts; None if there is
        none."""
        if not self.is_added(marker_ids):
            place = self.to_bytes(ids).find(marker.encode(), begin)
            return None if place < 0 else place
        starts = np.cumsum([0, *map(len, self._pieces_of(ids))])[:-1]
        places = starts[(ids == marker_ids[0]) & (starts >= begin)]
        return int(places[0]) if len(places) else None

    def is_added(self, marker_ids: np.ndarray) -> bool:
        """Whether a marker is one added token, which no inserted text contains."""
        return len(marker_ids) == 1 and int(marker_ids[0]) in self._added

    def _normalised(self, text: str) -> bytes:
        normaliser = self._text.normalizer
        return (normaliser.normalize_str(text) if normaliser else text).encode()

    def _pieces_of(self, ids: np.ndarray) -> list[bytes]:
        known = self._pieces
        return [
            known[index] if index in known else known.setdefault(index, self._read(index))
            for index in ids.tolist()
        ]

    def _read(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index]
        token = self._backend.id_to_token(index)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF[char] for char in token)
        return self._backend.decode([index], skip_special_tokens=False).encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes byte b as itself where printable in Latin-1, else as one of U+0100, U+0101,
    ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
