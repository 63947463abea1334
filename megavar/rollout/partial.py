"""What a completion has so far: SGLang's answers put together, over however many calls it takes."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megavar.data.records import VersionSpan
from megavar.data.routes import Routes, RouteShape
from megavar.rollout.control import NO_EXPERTS, EngineError


@dataclass(slots=True)
class Partial:
    """One completion."""

    prompt: int
    """Its prompt's length."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)
    """Of prompt and sampled tokens, in order: each token's from the first call that told of it, in which it was
    sampled unless the server had taken it back before."""

    @property
    def routed(self) -> int:
        return sum(map(len, self.routes))

    def extend(self, answer: dict[str, Any]) -> None:
        meta, start = answer["meta_info"], len(self.ids)
        for logprob, token, _ in meta.get("output_token_logprobs") or ():
            self.ids.append(token)
            self.logprobs.append(logprob)
        if len(self.ids) - start != len(answer["output_ids"]):
            raise EngineError(f"{len(answer['output_ids'])} ids came with {len(self.ids) - start} log-probs")
        spans = meta.get("weight_versions")
        if not spans:
            spans = [{"version": meta["weight_version"], "start": 0, "end": len(self.ids) - start}]
        for span in spans:
            first, last = start + span["start"], start + span["end"]
            if self.spans and self.spans[-1].version == span["version"] and self.spans[-1].end == first:
                first = self.spans.pop().start
            if last > first:
                self.spans.append(VersionSpan(version=span["version"], start=first, end=last))

    def extend_routes(self, answer: dict[str, Any], shape: RouteShape) -> None:
        """Call after `extend`. Raises EngineError where the server tells of other tokens than were computed."""
        wanted = self.prompt + len(self.ids) - 1 - self.routed
        found = decode_routes(answer["meta_info"].get("routed_experts"), shape)
        if found is None and answer["meta_info"]["finish_reason"]["type"] == "abort":
            return  # from the server's queue: the next call tells of these tokens
        if found is None:
            raise EngineError(f"the server returns no experts: {NO_EXPERTS}")
        if len(found) != wanted:
            raise EngineError(f"experts of {len(found)} tokens came where {wanted} were computed")
        self.routes.append(found)

    def all_routes(self) -> Routes | None:
        if not self.routes:
            return None
        return Routes.of(np.concatenate(self.routes)).first(self.prompt + len(self.ids) - 1)

    def cut(self, length: int) -> None:
        del self.ids[length:], self.logprobs[length:]
        spans = (VersionSpan(version=s.version, start=s.start, end=min(s.end, length)) for s in self.spans)
        self.spans = [span for span in spans if span.end > span.start]


def decode_routes(told: str | None, shape: RouteShape) -> np.ndarray | None:
    """[tokens, layers, k] of `shape.dtype`, from the base64 of int32 that SGLang 0.5.23 answers; None of nothing.

    Raises EngineError for what this model's routers cannot have chosen.
    """
    if told is None:
        return None
    flat = np.frombuffer(base64.b64decode(told), dtype=np.int32)
    each = shape.layers * shape.experts_per_token
    found = flat.reshape(-1, shape.layers, shape.experts_per_token) if flat.size % each == 0 else flat[:0]
    possible = flat.size == found.size and 0 <= flat.min(initial=0) <= flat.max(initial=0) < shape.num_experts
    # A layer of which nothing was recorded holds zeros.
    if not possible or (shape.experts_per_token > 1 and (found[..., 0] == found[..., 1]).any()):
        raise EngineError(
            f"the server's experts are not {shape.experts_per_token} of {shape.num_experts} in each of "
            f"{shape.layers} layers: does it serve another model?"
        )
    return found.astype(shape.dtype)
