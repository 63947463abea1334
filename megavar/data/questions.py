"""Questions from files, from Hugging Face datasets on disk, and from reasoning-gym.

Readers stream; what is kept is the list of questions alone. The first bad row ends the load with one error
that names the file, the row, the field and, where there is one, the column that was probably meant.
"""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from megavar import verifiers
from megavar.data.gym_questions import generate
from megavar.data.records import Question
from megavar.data.rows import Row, read_jsonl, read_parquet
from megavar.data.suggest import did_you_mean
from megavar.errors import UserError

if TYPE_CHECKING:
    from megavar.config.recipe import QuestionSource

FIELDS = tuple(field.name for field in dataclasses.fields(Question))
REQUIRED = ("prompt", "answer")


def load_questions(source: QuestionSource) -> list[Question]:
    """Read every question that `source` names, in file order (globs and directories sorted by name).

    A table needs columns for `prompt` and `answer`; other fields are read where a column of that name, or the
    one mapped in `source.columns`, exists. Without an id column the id is the 0-based number of the row in
    the source. `answer` may be a number, `payload` an object or its JSON text. A reasoning-gym question has
    its oracle answer as both answer and solution, and none of either where its dataset gives no oracle.

    Raises UserError: file missing or unreadable, no rows or fewer than `source.size`, column missing, wrong type,
    empty prompt, duplicate id, unknown verifier, unknown reasoning-gym dataset or option.
    """
    for field in source.columns:
        if field not in FIELDS:
            raise UserError(f"columns: {field!r} is not a question field; {did_you_mean(field, FIELDS)}")
    if source.kind == "reasoning_gym":
        if source.verifier not in ("", "reasoning_gym"):
            raise UserError(f"reasoning_gym grades by its own scorer; remove verifier={source.verifier!r}")
        assert source.size is not None, "the recipe checks that a reasoning_gym source has a size"
        return generate(source.name, source.options, size=source.size, seed=source.seed)
    rows = {"jsonl": _jsonl, "parquet": _parquet, "hf_dataset": _hf_dataset}[source.kind](source)
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for number, (where, values, names) in enumerate(islice(rows, source.size)):
        question = _question(number, where, values, names, source)
        if question.id in seen:
            raise UserError(f"{where}: duplicate id {question.id!r}, first seen in {seen[question.id]}")
        seen[question.id] = where
        questions.append(question)
    if not questions:
        raise UserError(f"{source.path}: no questions in it")
    if source.size is not None and len(questions) < source.size:
        raise UserError(
            f"{source.path}: {len(questions)} questions in it, size = {source.size} asks for more; lower it or leave "
            "it out"
        )
    return questions


def require_solutions(questions: Iterable[Question]) -> None:
    """Raise one UserError if any question lacks a reference solution (the posterior's hint, the GML
    target)."""
    _require(questions, lambda question: question.solution.strip(), "reference solution", "solution")


def require_traces(questions: Iterable[Question]) -> None:
    """Raise one UserError if any question lacks a reference trace (fits on the data set's own traces need
    them)."""
    _require(questions, lambda question: (question.trace or "").strip(), "reference trace", "trace")


def _require(questions, has, what: str, field: str) -> None:
    total, lacking = 0, []
    for question in questions:
        total += 1
        if not has(question):
            lacking.append(question.id)
    if lacking:
        first = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        raise UserError(
            f"{len(lacking)} of {total} questions have no {what} (ids {first}); fill the column or map it "
            f'with columns = {{{field} = "<column>"}}'
        )


def _question(
    number: int, where: str, values: Mapping[str, Any], names: Collection[str], source: QuestionSource
) -> Question:
    fields: dict[str, Any] = {}
    for field in FIELDS:
        column = source.columns.get(field, field)
        if column not in names:
            if field in REQUIRED or field in source.columns:
                raise UserError(
                    f"{where}: no column {column!r} for field {field!r}; {did_you_mean(column, names)} "
                    f'Map it with columns = {{{field} = "<column>"}}'
                )
            continue
        value = values.get(column)
        if value is None:
            if field in REQUIRED or field == "id":
                raise UserError(f"{where}: field {field!r} (column {column!r}) is null")
            continue
        fields[field] = _payload(where, value) if field == "payload" else _text(where, field, column, value)
    fields.setdefault("id", str(number))
    if not fields["prompt"].strip():
        raise UserError(f"{where}: field 'prompt' is empty")
    verifier = fields["verifier"] = fields.get("verifier") or source.verifier or "exact"
    if verifier not in verifiers.NAMES:
        raise UserError(f"{where}: unknown verifier {verifier!r}; {did_you_mean(verifier, verifiers.NAMES)}")
    missing = set(verifiers.PAYLOAD_KEYS.get(verifier, ())) - fields.get("payload", {}).keys()
    if missing:
        raise UserError(f"{where}: verifier {verifier!r} needs payload keys {sorted(missing)}")
    return Question(**fields)


def _text(where: str, field: str, column: str, value: Any) -> str:
    numeric = {"id": (int,), "answer": (int, float)}.get(field, ())
    if isinstance(value, numeric) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {field!r} (column {column!r}) is {type(value).__name__}, expected text"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} holds a lone surrogate at character {error.start}; the file was cut "
            "inside a character"
        ) from error
    return value


def _payload(where: str, value: Any) -> dict[str, Any]:
    try:
        payload = json.loads(value) if isinstance(value, str) else value
        if not isinstance(payload, dict):
            raise UserError(f"{where}: field 'payload' is {type(payload).__name__}, expected an object")
        json.dumps(payload)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: field 'payload' is not JSON: {error}") from error
    return payload


def _path(source: QuestionSource) -> Path:
    assert source.path is not None, "the recipe checks that a file source has a path"
    return source.path.expanduser()


def _files(source: QuestionSource, suffix: str) -> list[Path]:
    path = _path(source)
    if path.is_file():
        return [path]
    pattern = str(Path(glob.escape(str(path))) / f"*{suffix}") if path.is_dir() else str(path)
    files = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
    if not files:
        raise UserError(f"{path}: " + (f"no *{suffix} file in it" if path.is_dir() else "no such file"))
    return files


def _jsonl(source: QuestionSource) -> Iterator[Row]:
    for file in _files(source, ".jsonl"):
        yield from read_jsonl(file)


def _parquet(source: QuestionSource) -> Iterator[Row]:
    for file in _files(source, ".parquet"):
        yield from read_parquet(file, _wanted(source))


def _hf_dataset(source: QuestionSource) -> Iterator[Row]:
    import datasets

    path = _path(source)
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not a directory written by datasets.save_to_disk") from error
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path}: a damaged data set ({error}); save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise UserError(f"{path}: no split {source.split!r}; {did_you_mean(source.split, loaded)}")
        loaded = loaded[source.split]
    names = loaded.column_names
    columns = [name for name in _wanted(source) if name in names]
    # With no wanted column at all the full table keeps its length, and the first row's error names the
    # column.
    for number, row in enumerate(loaded.select_columns(columns or names).with_format(None)):
        yield f"{path} row {number}", row, names


def _wanted(source: QuestionSource) -> list[str]:
    return list(dict.fromkeys(source.columns.get(field, field) for field in FIELDS))
