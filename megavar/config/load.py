"""Recipe files: TOML to a typed recipe and back.

A recipe is built in layers, each merged key by key over the one before (lists are replaced whole):
the defaults, then the file named by a top-level `base = "other.toml"` (relative to the file that names it; it
may have a base of its own), then the file, then the command line's `--section.key value`.

Relative paths mean what a reader of each layer expects: in a file they are relative to that file, on the
command line to the current directory. The loaded recipe holds absolute paths.
"""

from __future__ import annotations

import datetime
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from megavar.config import schema
from megavar.config.messages import explain
from megavar.config.recipe import Recipe
from megavar.errors import UserError

Layer = tuple[str, dict[str, Any]]


def load_recipe(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Load a recipe file, apply dotted overrides, validate.

    An override's text is read as a TOML value where the key is not text and it parses, and as plain text
    otherwise; `none` unsets a key that may be unset. An element of `arms` is named by position or by name.

    Raises UserError with one line per mistake: file or option, dotted key, what is wrong, nearest valid name.
    """
    layers = list(_layers(Path(path), ()))
    merged = _defaults()
    for _, raw in layers:
        merged = _merge(merged, raw)
    touched: dict[tuple[str, ...], str] = {}
    for key, text in overrides:
        touched[_override(merged, key, text)] = f"--{key}"
    try:
        return Recipe.model_validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        lines = [explain(e, _origin(e, layers, touched, str(path))) for e in error.errors()]
        raise UserError("\n".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """TOML that loads back to an equal recipe. Keys that are None are left out: None is their default."""
    return tomli_w.dumps(_plain(recipe, ""))


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, BaseModel):
        items = ((name, getattr(value, name)) for name in type(value).model_fields)
        return {name: _plain(v, f"{where}{name}.") for name, v in items if v is not None}
    if isinstance(value, Mapping):
        return {name: _plain(v, f"{where}{name}.") for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v, f"{where}{i}.") for i, v in enumerate(value)]
    if value is None:
        raise UserError(f"{where[:-1]}: None cannot be written as TOML; leave the key out")
    return str(value) if isinstance(value, Path) else value


def _defaults() -> dict[str, Any]:
    """The recipe's defaults as plain data: a file that sets one key of a section keeps the rest of them."""
    plain = {
        name: to_jsonable_python(field.get_default(call_default_factory=True))
        for name, field in Recipe.model_fields.items()
        if not field.is_required()
    }
    return _resolve_paths(plain, Recipe, Path.cwd())


def _layers(path: Path, chain: tuple[Path, ...]) -> Iterator[Layer]:
    """(label, content) of a file's bases, outermost base first, then of the file itself."""
    real = path.resolve()
    if real in chain:
        raise UserError(f"{chain[-1]}: base: {path} is already in this chain of bases")
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        named_by = f"{chain[-1]}: base: " if chain else ""
        raise UserError(f"{named_by}{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    base = raw.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: must be the path of one recipe file, got {base!r}")
        yield from _layers(path.parent / base, (*chain, real))
    _reject_dates(raw, path, "")
    yield str(path), _resolve_paths(raw, Recipe, path.parent)


def _reject_dates(value: Any, path: Path, dotted: str) -> None:
    if isinstance(value, (datetime.date, datetime.time)):
        raise UserError(f"{path}: {dotted[:-1]}: dates and times have no use in a recipe; quote the value")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, element in items:
        _reject_dates(element, path, f"{dotted}{key}.")


def _resolve_paths(value: Any, annotation: Any, directory: Path) -> Any:
    """Make every text whose declared type is a path absolute; all else is left for validation to judge."""
    bare, _ = schema.optional(annotation)
    if bare is Path:
        return _absolute(value, directory) if isinstance(value, str) else value
    if isinstance(value, dict):
        return {k: _resolve_paths(v, schema.child(bare, k), directory) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve_paths(v, schema.child(bare, "0"), directory) for v in value]
    return value


def _absolute(text: str, directory: Path) -> str:
    return os.path.abspath(directory / Path(text).expanduser())


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(merged: dict[str, Any], key: str, text: str) -> tuple[str, ...]:
    """Set one dotted key in place; returns its parts with list elements as indices."""
    parts: list[str] = []
    node: Any = merged
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            part = _index(node, part, key)
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:  # a section that may be left out
                node[part] = {}
            node = node[part]
        else:
            raise UserError(f"--{key}: {'.'.join(parts)} is a value, not a section")
        parts.append(part)
    if isinstance(node, list):
        last = _index(node, last, key)
    elif not isinstance(node, dict):
        raise UserError(f"--{key}: {'.'.join(parts)} is a value, not a section")
    parts.append(last)
    annotation = schema.at(parts)
    node[int(last) if isinstance(node, list) else last] = _override_value(text, annotation, key)
    return tuple(parts)


def _index(elements: list[Any], part: str, key: str) -> str:
    names = [e.get("name") if isinstance(e, dict) else None for e in elements]
    if part in names:
        return str(names.index(part))
    if part.isdecimal() and int(part) < len(elements):
        return str(int(part))
    known = ", ".join(f"{i} ({n})" if n else str(i) for i, n in enumerate(names)) or "none"
    raise UserError(f"--{key}: no element {part!r}; there are: {known}")


def _override_value(text: str, annotation: Any, key: str) -> Any:
    bare, can_be_none = schema.optional(annotation)
    if can_be_none and text == "none":
        return None
    try:
        document = tomllib.loads(f"v = {text}")
        value = document["v"] if len(document) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text
    is_text = bare in (str, Path) or get_origin(bare) is Literal
    if is_text and not isinstance(value, str):
        value = text
    if isinstance(value, (datetime.date, datetime.time)):
        value = text
    elif not isinstance(value, str):
        _reject_dates(value, Path(f"--{key}"), f"{key}.")
    return _resolve_paths(value, annotation, Path.cwd())


def _origin(error: Any, layers: list[Layer], touched: Mapping[tuple[str, ...], str], path: str) -> str:
    """Which option or file a mistake came from: the topmost layer that holds the key, else the recipe."""
    loc = tuple(map(str, error["loc"]))
    # A key that nobody wrote is the file's fault; a list that is too short is of whoever wrote the list.
    unwritten = error["type"] == "missing" and not isinstance(error["loc"][-1], int)
    for parts, option in reversed(list(touched.items())):
        shared = min(len(parts), len(loc))
        # A check across a whole section is blamed on an option only where the option set something in it.
        if parts[:shared] == loc[:shared] and not unwritten:
            return option
    for label, raw in reversed(layers):
        node: Any = raw
        for part in loc[:-1] if error["type"] == "missing" else loc:
            if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                break
        else:
            return label
    return path
