"""Find, token by token, where a stop text is completed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megavar.errors import UserError

_REPLACEMENT = "\ufffd"


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a Hugging Face directory, None without its files (transformers would make up an empty
    tokenizer of the family)."""
    if not any(directory.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


class StopTexts:
    """Says whether the newest token of a row completes one of the stop texts.

    A token can complete a text only if it holds the text's last character or ends a character that several
    tokens spell (which decodes to U+FFFD alone). Those tokens are found once, so that almost all sampled
    tokens cost nothing; for the others a short tail of the row is decoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], vocabulary: int) -> None:
        """vocabulary: number of logits of the model; ids that the tokenizer lacks decode to nothing."""
        self._tokenizer = tokenizer
        self._texts = tuple(texts)
        self._longest = max(len(text) for text in texts)
        last = {text[-1] for text in texts} | {_REPLACEMENT}
        known = min(vocabulary, len(tokenizer))
        pieces = tokenizer.batch_decode(
            [[token] for token in range(known)], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self.may_complete = np.zeros(vocabulary, dtype=bool)
        """bool [V]: whether `completed` needs to be asked after this id."""
        self.may_complete[:known] = [not last.isdisjoint(piece) for piece in pieces]

    @classmethod
    def load(cls, directory: Path, texts: Sequence[str], vocabulary: int) -> StopTexts:
        """With the tokenizer of `directory`. Raises UserError for an empty text or where there is none."""
        if "" in texts:
            raise UserError("an empty stop text would end every completion at once; remove it from `stop`")
        tokenizer = load_tokenizer(directory)
        if tokenizer is None:
            raise UserError(
                f"{directory}: stop texts need a tokenizer and there is none; "
                "put its files there or stop on token ids"
            )
        return cls(tokenizer, texts, max(vocabulary, len(tokenizer)))

    def first(self, ids: np.ndarray) -> int | None:
        """Length of the shortest prefix of int [N] `ids` whose text holds a stop text, None without one."""
        for position in np.flatnonzero(self.may_complete[ids]):
            if self.completed(ids[: position + 1]):
                return int(position) + 1
        return None

    def completed(self, ids: np.ndarray) -> bool:
        """Whether the text of int [N] `ids` holds a stop text, given that ids[:-1] does not."""
        # The head of a tail may lose a space or show up to three U+FFFD of a broken character: four spare.
        needed = self._longest + 4
        tail = needed
        while True:
            text = self._tokenizer.decode(
                ids[-tail:], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if len(text) >= needed or tail >= len(ids):
                return any(stop in text for stop in self._texts)
            tail *= 2
