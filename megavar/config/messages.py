"""One clear line for each thing that validation finds wrong with a recipe."""

from __future__ import annotations

import difflib
import json
from typing import Any, Literal, get_args, get_origin

from megavar.config import schema
from megavar.config.recipe import Recipe


def explain(error: Any, origin: str) -> str:
    """Turn one pydantic error into `origin: dotted.key: what is wrong; nearest valid name`.

    origin: the file or `--option` the value came from.
    """
    parts = [str(p) for p in error["loc"]]
    dotted = ".".join(parts)
    where = origin if origin == f"--{dotted}" or not dotted else f"{origin}: {dotted}"
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {_nearest_key(parts)}"
    if kind == "missing":
        return f"{where}: missing; {_needs(parts)}"
    if kind == "literal_error":
        return f"{where}: {_show(error['input'])} is not one of {_choices(parts, error['input'])}"
    if kind == "value_error":
        return f"{where}: {error['ctx']['error']}"
    message = error["msg"].replace("Input should be", "must be").replace("String should", "must")
    message = message[:1].lower() + message[1:]
    return f"{where}: {message}, got {_show(error['input'])}"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest_key(parts: list[str]) -> str:
    """The nearest name in the same section, else the name in other sections, else the section's names."""
    *parents, name = parts
    model = schema.section(schema.at(parents))
    assert model is not None  # only a section forbids extra keys
    prefix = "".join(f"{p}." for p in parents)
    names = list(model.model_fields)
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {prefix}{near[0]}?"
    every = [key.dotted for key in schema.keys()]
    elsewhere = [dotted for dotted in every if dotted.rsplit(".", 1)[-1] == name]
    if not elsewhere:
        elsewhere = difflib.get_close_matches(".".join(parts), every, n=1, cutoff=0.8)
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"{prefix[:-1] or 'the recipe'} has: {', '.join(names)}"


def _needs(parts: list[str]) -> str:
    annotation = schema.at(parts)
    model = schema.section(annotation)
    if model is not None:
        needed = [key.dotted for key in schema.keys(model, f"{'.'.join(parts)}.") if key.required]
        return f"add the section with {', '.join(needed)}"
    owner = schema.section(schema.at(parts[:-1], Recipe))
    doc = owner.model_fields[parts[-1]].description if owner else None
    return f"{schema.type_name(annotation)}{': ' + ' '.join(doc.split()) if doc else ''}"


def _choices(parts: list[str], value: Any) -> str:
    bare, _ = schema.optional(schema.at(parts))
    assert get_origin(bare) is Literal
    choices = list(get_args(bare))
    near = difflib.get_close_matches(str(value), choices, n=1)
    return ", ".join(choices) + (f"; did you mean {near[0]}?" if near else "")
