"""Experts that a real SGLang server tells of: against transformers, and as far as the training step."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_mixture
from rollout_helpers import CONTEXT, by_key, full_logprobs, requests
from transformers import AutoModelForCausalLM

from megavar.data.records import Trace
from megavar.data.routes import Routes, RouteShape
from megavar.data.traces import TraceStore
from megavar.data.training_set import Example, write_training_set
from megavar.doctor.engine import check_servers
from megavar.rollout.engine import SamplingParams
from megavar.rollout.fleet import Fleet
from megavar.rollout.process import ServerSpec
from megavar.rollout.sglang import SGLangEngine

pytestmark = pytest.mark.engine

LAYERS, EXPERTS, CHOSEN = 3, 8, 2
SHAPE = RouteShape(layers=LAYERS, experts_per_token=CHOSEN, num_experts=EXPERTS)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of the same shape, whose completions end only at their length limit."""
    root = tmp_path_factory.mktemp("mixtures")
    options = dict(num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    return {name: write_mixture(root / name, seed=seed, **options) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def models(mixtures: dict[str, Path]) -> dict[str, torch.nn.Module]:
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in mixtures.items()
    }


@pytest.fixture(scope="module")
def engine(mixtures: dict[str, Path], engine_venv: Path, tmp_path_factory: pytest.TempPathFactory):
    spec = ServerSpec(kv_tokens=16 * CONTEXT, return_experts=True)
    logs = tmp_path_factory.mktemp("mixture-fleet")
    fleet = Fleet(mixtures["a"], logs=logs, spec=spec, version="a", venv=engine_venv)
    engine = SGLangEngine(fleet, routes=SHAPE, timeout_s=120.0, pause_mode="abort")
    yield engine
    engine.close()


@torch.no_grad()
def top_experts(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """[n, layers, k], sorted: where transformers routes each token."""
    logits = model(torch.from_numpy(ids.astype(np.int64))[None], output_router_logits=True).router_logits
    chosen = torch.stack([layer.reshape(len(ids), -1).topk(CHOSEN).indices for layer in logits], 1)
    return chosen.sort(-1).values.numpy()


def test_experts_equal_transformers(engine: SGLangEngine, models) -> None:
    """Of the prompt too, where the prefix cache has computed it for another seed; a stop text cuts them."""
    assert [check.status for check in check_servers(engine._servers.servers(), experts=True)] == ["ok"]
    asked = requests(6, 4)
    for stop in ((), ("ab", "é")):
        params = SamplingParams(max_tokens=30, stop=stop, return_experts=True)
        done = by_key(engine.generate(asked, params))
        assert len(done) == 24 and (not stop or any(c.finish_reason == "stop" for c in done.values()))
        for request in asked:
            for k in range(4):
                ids = np.concatenate([request.prompt_ids, done[request.id, k].ids])
                found = np.asarray(done[request.id, k].experts)
                assert found.dtype == np.uint8 and found.shape == (len(ids) - 1, LAYERS, CHOSEN)
                np.testing.assert_array_equal(np.sort(found, -1), top_experts(models["a"], ids[:-1]))
    assert engine.metrics()["rollout/cache_hit_rate"] > 0.3
    assert all(c.experts is None for c in engine.generate(asked, SamplingParams(max_tokens=3)))


def test_a_completion_cut_by_new_weights_keeps_the_experts_of_both(engine: SGLangEngine, models, mixtures):
    """Paused with "abort" and continued: each token's experts are those of the weights that computed it then."""
    asked, done = requests(6, 2, low=3, high=8), []
    params = SamplingParams(max_tokens=700, return_experts=True)
    consumer = threading.Thread(target=lambda: done.extend(engine.generate(asked, params)))
    try:
        consumer.start()
        while engine.servers.gauges().get("num_running_reqs", 0) < 12:
            assert consumer.is_alive() and not done
            time.sleep(0.02)
        engine.update_weights(mixtures["b"], "b")
        consumer.join()
    finally:
        engine.update_weights(mixtures["a"], "a")
    assert len(done) == 12
    for c in done:
        prompt = next(r.prompt_ids for r in asked if r.id == c.request_id)
        assert [span.version for span in c.weight_spans] == ["a", "b"]
        computed = np.concatenate([prompt, c.ids])[:-1]
        cut = len(prompt) + c.weight_spans[0].end - 1
        found = np.sort(np.asarray(c.experts), -1)
        assert found.shape == (len(computed), LAYERS, CHOSEN)
        np.testing.assert_array_equal(found[:cut], top_experts(models["a"], computed)[:cut])
        np.testing.assert_array_equal(found[cut:], top_experts(models["b"], computed)[cut:])


def test_experts_reach_scores_and_steps(engine: SGLangEngine, models, mixtures, torchrun, tmp_path) -> None:
    """Through the store and a training set: with the engine's experts the trainer agrees with the engine and with
    transformers; with others in their place the same tokens get other log-probs and another loss."""
    asked = requests(5, 3)
    params = SamplingParams(max_tokens=40, return_experts=True)
    done = by_key(engine.generate(asked, params))
    prompts = {r.id: r.prompt_ids for r in asked}

    def trace(key: tuple[str, int]) -> Trace:
        c, none = done[key], np.empty(0, np.int32)
        return Trace(
            question_id=c.request_id,
            index=c.index,
            role="policy",
            prompt_ids=prompts[c.request_id],
            thought_ids=c.ids,
            answer_ids=none,
            thought_logprobs=c.logprobs,
            answer_logprobs=none.astype(np.float32),
            closed=True,
            finish_reason="stop",
            experts=c.experts,
        )

    TraceStore(tmp_path / "traces").write_traces(0, map(trace, sorted(done)))
    stored = list(TraceStore(tmp_path / "traces").iter_traces())
    rng = np.random.default_rng(0)

    def example(t: Trace, routes: Routes | None) -> Example:
        # What follows the thought was not sampled: its tokens, and the thought's last, are routed freely.
        response = np.concatenate([t.thought_ids, rng.integers(0, 30, 4).astype(np.int32)])
        return Example.of(t.question_id, t.prompt_ids, response, 0.5, experts=routes)

    def others(t: Trace) -> Routes:
        return Routes.of((np.asarray(t.experts) + 1) % EXPERTS)

    for name, of in {
        "theirs": lambda t: t.routes(t.prompt_ids, len(t.thought_ids)),
        "free": lambda t: None,
        "altered": others,
    }.items():
        rng = np.random.default_rng(0)
        write_training_set(tmp_path / f"{name}.arrow", [example(t, of(t)) for t in stored])
    script = Path(__file__).with_name("replay_ranks.py")
    report = torchrun(script, mixtures["a"], tmp_path, ranks=2)

    wanted = 0.0
    for n, t in enumerate(stored):
        tail = np.array(report["tails"][n], np.int32)
        every = full_logprobs(models["a"], t.prompt_ids, np.concatenate([t.thought_ids, tail]), 1.0)
        np.testing.assert_allclose(report["theirs"]["scores"][n], every, atol=1e-4)
        np.testing.assert_allclose(
            report["theirs"]["scores"][n][: len(t.thought_ids)], t.thought_logprobs, atol=1e-4
        )
        wanted -= 0.5 * every.sum() / report["constant"]
    assert report["theirs"]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert report["free"]["loss"] == pytest.approx(wanted, rel=1e-5)  # nearly equal experts are rare in fp32
    assert abs(report["altered"]["loss"] - wanted) > 0.01 * wanted
    gaps = [
        np.abs(np.subtract(a, b)).max()
        for a, b in zip(report["altered"]["scores"], report["theirs"]["scores"], strict=True)
    ]
    assert min(gaps) > 0.01
