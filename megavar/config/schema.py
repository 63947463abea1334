"""What the recipe's types say about a dotted key: its type, its default, its help text."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from megavar.config.recipe import Recipe


def optional(annotation: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True); anything else into (itself, False)."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return annotation, False


def section(annotation: Any) -> type[BaseModel] | None:
    """The section model that an annotation is, if it is one."""
    bare, _ = optional(annotation)
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def child(annotation: Any, part: str) -> Any:
    """Type one dotted part below `annotation`; None where there is no such part."""
    bare, _ = optional(annotation)
    if (model := section(bare)) is not None:
        field = model.model_fields.get(part)
        return None if field is None else field.annotation
    arguments = get_args(bare)
    if get_origin(bare) is dict:
        return arguments[1]
    if get_origin(bare) is tuple:
        return arguments[0]
    return Any if bare is Any else None


def at(parts: Sequence[str], root: Any = Recipe) -> Any:
    """Type at a dotted key, given as its parts; None where the recipe has no such key."""
    for part in parts:
        root = child(root, part)
        if root is None:
            return None
    return root


def type_name(annotation: Any) -> str:
    """A type in the words of a help text."""
    bare, can_be_none = optional(annotation)
    if get_origin(bare) is Literal:
        name = " | ".join(map(str, get_args(bare)))
    elif get_origin(bare) is tuple:
        parts = get_args(bare)
        name = f"list of {type_name(parts[0])}" + ("" if parts[-1] is Ellipsis else f" x {len(parts)}")
    elif get_origin(bare) is dict:
        name = f"table of {type_name(get_args(bare)[1])}"
    elif bare is Any:
        name = "any value"
    else:
        name = {str: "text", int: "integer", float: "number", bool: "true | false", Path: "path"}.get(
            bare, bare.__name__
        )
    return f"{name} | none" if can_be_none else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One leaf of the recipe, as help shows it."""

    dotted: str
    """`arms.N.mix` and `templates.custom.NAME.prompt` stand for every element."""
    section: type[BaseModel]
    """Model that declares the field."""
    type: str
    required: bool
    default: Any
    doc: str


def keys(model: type[BaseModel] = Recipe, prefix: str = "", defaults: Any = None) -> Iterator[Key]:
    """Every leaf below `model`, in declaration order; `defaults` is an instance that holds the defaults."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        required = defaults is None and field.is_required()
        if defaults is not None:
            default = getattr(defaults, name)
        else:
            default = None if required else field.get_default(call_default_factory=True)
        bare, _ = optional(field.annotation)
        element = get_args(bare)[-1 if get_origin(bare) is dict else 0] if get_args(bare) else None
        if (sub := section(bare)) is not None:
            yield from keys(sub, f"{dotted}.", default)
        elif get_origin(bare) in (tuple, dict) and (sub := section(element)) is not None:
            yield from keys(sub, f"{dotted}.{'N' if get_origin(bare) is tuple else 'NAME'}.")
        else:
            yield Key(
                dotted=dotted,
                section=model,
                type=type_name(field.annotation),
                required=required,
                default=default,
                doc=field.description or "",
            )
