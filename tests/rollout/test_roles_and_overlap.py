from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from rollout_helpers import by_key, requests

from megavar.data.records import VersionSpan
from megavar.errors import UserError
from megavar.rollout.engine import SamplingParams
from megavar.rollout.local import LocalEngine
from megavar.rollout.overlap import Overlap, token_staleness
from megavar.rollout.roles import RoleEngines

PARAMS = SamplingParams(max_tokens=12)


def versions(completions) -> set[str]:
    return {span.version for c in completions for span in c.weight_spans}


@pytest.mark.parametrize("shared", [True, False])
def test_roles_on_one_engine_or_two(tiny_model, other_model, shared):
    started, updated = [], []

    class Watched(LocalEngine):
        def update_weights(self, hf_directory, version):
            updated.append(version)
            super().update_weights(hf_directory, version)

    def start(directory, version):
        engine = Watched(directory, version=version)
        started.append(version)
        updated.clear()
        return engine

    def start_other(directory, version):
        return start(directory, version)

    roles = RoleEngines({"policy": start, "posterior": start if shared else start_other})
    assert roles.started("policy") is None and roles.version("policy") is None
    weights = {"policy": tiny_model, "posterior": other_model}
    plain = {role: LocalEngine(directory) for role, directory in weights.items()}
    for role in ("policy", "posterior", "posterior", "policy"):
        with roles.using(role, weights[role], f"{role}-0") as engine:
            done = by_key(engine.generate(requests(3, 2), PARAMS))
        assert roles.version(role) == f"{role}-0" and roles.started(role) is engine
        assert versions(done.values()) == {f"{role}-0"}
        for key, c in by_key(plain[role].generate(requests(3, 2), PARAMS)).items():
            np.testing.assert_array_equal(c.ids, done[key].ids)
    # Weights that are there are not loaded again.
    assert updated == (["posterior-0", "policy-0"] if shared else [])
    assert started == (["policy-0"] if shared else ["policy-0", "posterior-0"])
    assert (roles.started("policy") is roles.started("posterior")) == shared
    with roles.using("policy", other_model, "policy-1") as engine:
        assert versions(engine.generate(requests(1, 1), PARAMS)) == {"policy-1"}

    # After an update that failed nothing is taken for loaded; weights may come by another way.
    with pytest.raises(UserError), roles.using("policy", tiny_model / "none", "policy-2"):
        pass
    assert roles.version("policy") is None
    roles.brought("policy", "policy-3")
    with roles.using("policy", tiny_model / "none", "policy-3"):
        pass
    with pytest.raises(KeyError), RoleEngines({"policy": start}).using("posterior", tiny_model, "v"):
        pass
    roles.close()
    roles.close()


def test_an_engine_is_lent_to_one_thread_at_a_time(tiny_model, other_model):
    """Two roles on one engine, from two threads: nobody's weights change under its samples."""

    def start(directory, version):
        return LocalEngine(directory, version=version)

    roles = RoleEngines({"policy": start, "posterior": start})
    weights, seen = {"policy": tiny_model, "posterior": other_model}, []

    def use(role):
        for _ in range(6):
            with roles.using(role, weights[role], role) as engine:
                seen.append((role, versions(engine.generate(requests(2, 2), PARAMS))))

    threads = [threading.Thread(target=use, args=(role,)) for role in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 12 and all(found == {role} for role, found in seen)
    roles.close()


def wait_until(ready):
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.002)


def train_on_rollouts(models, staleness):
    """Six steps with real sampling; step i swaps in version i+1. Returns what was seen and the metrics."""
    engine = LocalEngine(models[0], version="v0")
    batches = [requests(4, 2, seed=i) for i in range(6)]
    seen, begun = [], []

    def rollout(batch):
        begun.append(batch)
        return list(engine.generate(batch, PARAMS))

    with Overlap(iter(batches), rollout, staleness=staleness) as stream:
        for step, generated in enumerate(stream):
            assert generated.index == step and generated.behind == step - generated.started
            seen.append(generated)
            if staleness:  # the trainer works for as long as the next batch takes to begin
                ahead = min(step + 2, 6)
                wait_until(lambda ahead=ahead: len(begun) >= ahead)
            engine.update_weights(models[(step + 1) % 2], f"v{step + 1}")
    return seen, stream.metrics()


def test_staleness_zero_is_the_synchronous_loop(tiny_model, other_model):
    models = (tiny_model, other_model)
    seen, metrics = train_on_rollouts(models, 0)
    assert [versions(g.result) for g in seen] == [{f"v{i}"} for i in range(6)]
    assert metrics["rollout/staleness_max"] == 0
    for i, generated in enumerate(seen):
        expected = LocalEngine(models[i % 2]).generate(requests(4, 2, seed=i), PARAMS)
        for c, other in zip(expected, generated.result, strict=True):
            np.testing.assert_array_equal(c.ids, other.ids)
            np.testing.assert_array_equal(c.logprobs, other.logprobs)


@pytest.mark.parametrize("staleness", [1, 3])
def test_staleness_is_bounded_and_used(tiny_model, other_model, staleness):
    seen, metrics = train_on_rollouts((tiny_model, other_model), staleness)
    assert len(seen) == 6
    order = {f"v{i}": i for i in range(7)}
    for g in seen:
        for c in g.result:
            mean, worst = token_staleness(c.weight_spans, order, g.index)
            assert 0 <= mean <= worst <= g.behind <= staleness
    assert 0 < metrics["rollout/staleness_max"] == max(g.behind for g in seen) <= staleness


def test_rollouts_do_not_run_further_ahead():
    begun = []
    with Overlap(range(100), lambda i: begun.append(i) or i, staleness=2) as stream:
        steps = iter(stream)
        for step in range(4):
            assert next(steps).result == step
            wait_until(lambda ahead=step + 3: len(begun) >= ahead)
            time.sleep(0.02)  # for one too many
            assert begun == list(range(step + 3))
    assert len(begun) <= 7 and threading.active_count() < 20


def test_errors_and_early_ends_reach_the_consumer():
    def rollout(i: int) -> int:
        if i == 2:
            raise ValueError("engine broke")
        return i

    got = []
    with pytest.raises(ValueError, match="engine broke"):
        with Overlap(range(5), rollout, staleness=1) as stream:
            got.extend(g.result for g in stream)
    assert got == [0, 1]
    with Overlap([], rollout, staleness=0) as stream:
        assert list(stream) == []
    with pytest.raises(UserError, match="staleness"):
        Overlap([], rollout, staleness=-1)


def test_token_staleness_weighs_by_length():
    spans = (VersionSpan(version="a", start=0, end=6), VersionSpan(version="b", start=6, end=8))
    assert token_staleness(spans, {"a": 1, "b": 3}, 3) == (1.5, 2)
    assert token_staleness((), {}, 5) == (0.0, 0)
