"""What travels with the weights of a Hugging Face directory. Torch-free."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavar.models.architecture import Dtype, read_architecture

COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
)
"""Files (and one directory) that travel with the weights byte for byte, as glob patterns."""


def copy_companions(source: Path, target: Path) -> None:
    """Copy them and the config byte for byte into `target`, made where missing."""
    target.mkdir(exist_ok=True)
    for pattern in ("config.json", *COMPANIONS):
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


def set_dtype(directory: Path, dtype: Dtype) -> None:
    """Make config.json name the type of weights; it stays byte for byte where it does."""
    path = directory / "config.json"
    if read_architecture(directory).dtype == dtype:
        return
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # transformers 4 says torch_dtype and 5 says dtype; both read the older name
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    add_to_config(directory, dict.fromkeys(names, dtype))


def add_to_config(directory: Path, keys: Mapping[str, Any]) -> None:
    """Write config.json anew with these top-level keys."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | keys
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
