"""Questions named on a command line."""

from __future__ import annotations

from pathlib import Path

from megavar.config.recipe import QuestionSource
from megavar.errors import UserError

GYM_PREFIX = "gym:"


def question_source(spec: str, *, size: int | None, seed: int, verifier: str) -> QuestionSource:
    """`gym:NAME` (a reasoning-gym data set), a .jsonl or .parquet file, or a directory of `save_to_disk`.

    Raises UserError for anything else, for a path that is not there and for `gym:` without a size.
    """
    if spec.startswith(GYM_PREFIX):
        if size is None:
            raise UserError(f"{spec}: a reasoning-gym data set needs a size; add --size")
        name = spec.removeprefix(GYM_PREFIX)
        return QuestionSource(kind="reasoning_gym", name=name, size=size, seed=seed, verifier=verifier)
    path = Path(spec).absolute()
    if not path.exists():
        raise UserError(f"{spec}: no such file or directory; for reasoning-gym write {GYM_PREFIX}NAME")
    if path.is_dir():
        return QuestionSource(kind="hf_dataset", path=path, size=size, verifier=verifier)
    if path.suffix == ".jsonl":
        return QuestionSource(kind="jsonl", path=path, size=size, verifier=verifier)
    if path.suffix == ".parquet":
        return QuestionSource(kind="parquet", path=path, size=size, verifier=verifier)
    raise UserError(f"{spec}: not a .jsonl or .parquet file, nor a data set directory")
