"""Every key of the recipe as a help text."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megavar.config import schema


def describe_keys(width: int = 100) -> str:
    """One block per section: key, type, default, docstring. A type met before is told by its defaults."""
    lines = ["keys of the recipe, in TOML sections and as --section.key VALUE:"]
    told: dict[type[BaseModel], tuple[str, dict[str, Any]]] = {}
    sections: dict[str, list[schema.Key]] = {}
    for key in schema.keys():
        sections.setdefault(key.dotted.rpartition(".")[0], []).append(key)
    for title, members in sections.items():
        model = members[0].section
        defaults = {_leaf(key): key.default for key in members}
        lines += ["", f"[{title}]" if title else "(top level)"]
        if model in told:
            first, other = told[model]
            changed = [f"{leaf} = {_show(value)}" for leaf, value in defaults.items() if value != other[leaf]]
            lines.append(f"  as [{first}]" + (f", but {', '.join(changed)} by default" if changed else ""))
            continue
        told[model] = (title, defaults)
        for key in members:
            default = "required" if key.required else f"default {_show(key.default)}"
            lines.append(f"  {key.dotted}  ({key.type}; {default})")
            doc = " ".join(key.doc.split())
            lines += textwrap.wrap(doc, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _leaf(key: schema.Key) -> str:
    return key.dotted.rpartition(".")[2]


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return json.dumps(str(value) if isinstance(value, Path) else value)
