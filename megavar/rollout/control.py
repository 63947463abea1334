"""Control calls of one SGLang server (0.5.23): health, versions, pause and resume, weights from disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

PauseMode = Literal["abort", "retract", "in_place"]
HELD_BACK = 2
"""Positions of the model's limit that SGLang keeps to itself."""
NO_EXPERTS = "start it with --enable-return-routed-experts, or set rollout.replay_experts = false"
"""What to do about a server that does not say which experts its tokens went to."""


class EngineError(RuntimeError):
    """A server failed, refused a call, or did not answer; the message names the server and what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    model_path: str
    weight_version: str
    context_length: int
    """Longest prompt plus completion: the model's limit less HELD_BACK."""
    vocabulary: int | None
    """Number of logits; None when the model's config.json is not readable from here."""


class ServerControl:
    """Blocking calls to one server; safe to use from several threads."""

    def __init__(self, url: str, *, timeout_s: float = 600.0) -> None:
        """timeout_s: for calls that move weights; the others answer in seconds."""
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._client = httpx.Client(base_url=self.url, timeout=30.0, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def answers(self, timeout_s: float = 2.0) -> bool:
        """Whether the HTTP side is up; says nothing of the model and works while paused."""
        try:
            return self._client.get("/model_info", timeout=timeout_s).status_code == 200
        except httpx.HTTPError:
            return False

    def healthy(self, timeout_s: float = 30.0) -> bool:
        """Whether the model generates a token. A paused server does not."""
        try:
            return self._client.get("/health", timeout=timeout_s).status_code == 200
        except httpx.HTTPError:
            return False

    def info(self) -> ServerInfo:
        model = self._call("GET", "/model_info")
        served = self._call("GET", "/v1/models")
        vocabulary = None
        config = Path(model["model_path"]) / "config.json"
        if config.is_file():
            content = json.loads(config.read_text())
            vocabulary = (content.get("text_config") or content).get("vocab_size")
        return ServerInfo(
            model_path=model["model_path"],
            weight_version=model["weight_version"],
            context_length=served["data"][0]["max_model_len"] - HELD_BACK,
            vocabulary=vocabulary,
        )

    def returns_experts(self) -> bool:
        """Whether it was started to say which experts its tokens went to."""
        return bool(self._call("GET", "/server_info").get("enable_return_routed_experts"))

    def weight_version(self) -> str:
        return self._call("GET", "/model_info")["weight_version"]

    def pause(self, mode: PauseMode) -> None:
        """Stop sampling. `abort` ends the requests with what they have, `retract` frees their KV cache and
        puts them back in the queue, `in_place` leaves them where they are."""
        self._call("POST", "/pause_generation", {"mode": mode}, timeout_s=self._timeout_s)

    def resume(self) -> None:
        self._call("POST", "/continue_generation", {})

    def update_from_disk(self, directory: Path, version: str, *, flush_cache: bool) -> None:
        """Load the safetensors of `directory`. Raises EngineError with the server's words; it then keeps the
        weights it had."""
        body = {"model_path": str(directory), "weight_version": version, "flush_cache": flush_cache}
        answer = self._call("POST", "/update_weights_from_disk", body, timeout_s=self._timeout_s)
        if not answer.get("success"):
            raise EngineError(f"{self.url}: weights of {directory} were refused: {answer.get('message')}")
        if (now := self.weight_version()) != version:
            raise EngineError(f"{self.url}: reports weights {now!r} after an update to {version!r}")

    def gauges(self) -> dict[str, float]:
        """Sum over ranks of the server's Prometheus gauges, by name without the `sglang:` prefix."""
        try:
            answer = self._client.get("/metrics")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}: no metrics: {error!r}") from error
        found: dict[str, float] = {}
        for line in answer.text.splitlines():
            if line.startswith("sglang:"):
                name, _, value = line.removeprefix("sglang:").rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def _call(self, method: str, path: str, body: Any = None, timeout_s: float = 30.0) -> Any:
        try:
            answer = self._client.request(method, path, json=body, timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise EngineError(f"{self.url}{path}: no answer within {timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}{path}: {error!r}") from error
        if answer.status_code != 200:
            raise EngineError(f"{self.url}{path}: HTTP {answer.status_code}: {answer.text[:500]}")
        return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}
