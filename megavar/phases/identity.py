"""Names for what phases read from outside the run directory; a phase's hash holds them, so a change redoes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megavar.data.records import Question
from megavar.files import sha256_of, write_atomically
from megavar.models.companions import COMPANIONS


def digest_questions(questions: Sequence[Question]) -> str:
    """Of all that the questions say, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for q in questions:
        said = (q.id, q.prompt, q.answer, q.solution, q.trace, q.verifier, q.payload)
        digest.update(json.dumps(said, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def digest_model(directory: Path, cache: Path) -> str:
    """Of the bytes of a Hugging Face directory's weights, config and tokenizer, wherever it lies.

    A file is read again only where its size or time of change is not what `cache` remembers.
    """
    known = json.loads(cache.read_text()) if cache.exists() else {}
    found = {p for pattern in ("config.json", "*.safetensors*", *COMPANIONS) for p in directory.glob(pattern)}
    found |= {p for folder in found if folder.is_dir() for p in folder.rglob("*")}
    files = {p.relative_to(directory).as_posix(): p for p in sorted(found) if p.is_file()}
    stamps = {name: [str(p), (s := p.stat()).st_size, s.st_mtime_ns] for name, p in files.items()}
    changed = [name for name, stamp in stamps.items() if known.get(name, [])[:3] != stamp]
    digests = dict(zip(changed, sha256_of(files[name] for name in changed), strict=True))
    entries = {name: [*s, digests[name]] if name in digests else known[name] for name, s in stamps.items()}
    if entries != known:
        write_atomically(cache, json.dumps(entries, indent=1) + "\n")
    contents = [(name, values[-1]) for name, values in entries.items()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:32]
