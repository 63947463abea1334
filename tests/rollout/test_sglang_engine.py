"""The SGLang client against real servers: two behind a router, shared by the session."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rollout_helpers import CONTEXT, END, by_key, full_logprobs, requests
from transformers import AutoModelForCausalLM, AutoTokenizer

from megavar.cli import main
from megavar.data.routes import RouteShape
from megavar.data.store import PartStore
from megavar.doctor.engine import check_servers
from megavar.errors import UserError
from megavar.evaluate.suite import SUITE_RECORDS
from megavar.rollout.control import EngineError
from megavar.rollout.engine import Request, SamplingParams
from megavar.rollout.fleet import Fleet
from megavar.rollout.local import LocalEngine
from megavar.rollout.sglang import SGLangEngine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def models(tiny_model: Path, other_model: Path, endless_model: Path) -> dict[str, torch.nn.Module]:
    paths = {"a": tiny_model, "b": other_model, "endless": endless_model}
    return {
        version: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for version, path in paths.items()
    }


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_logprobs_equal_hugging_face(engine, models, temperature, top_p):
    asked = requests(10, 4)
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=30)
    done = by_key(engine.generate(iter(asked), params))
    assert set(done) == {(request.id, k) for request in asked for k in range(4)}
    for request in asked:
        for k in range(4):
            completion = done[request.id, k]
            assert completion.seed == request.seeds[k]
            assert completion.ids.dtype == np.int32 and completion.logprobs.dtype == np.float32
            expected = full_logprobs(models["a"], request.prompt_ids, completion.ids, temperature or 1.0)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
            (span,) = completion.weight_spans
            assert (span.version, span.start, span.end) == ("a", 0, len(completion.ids))


def test_greedy_equals_the_local_engine(engine, tiny_model):
    asked, params = requests(12, 1), SamplingParams(temperature=0.0, max_tokens=40)
    here, there = (by_key(e.generate(asked, params)) for e in (LocalEngine(tiny_model), engine))
    for key, completion in here.items():
        np.testing.assert_array_equal(completion.ids, there[key].ids)
        assert completion.finish_reason == there[key].finish_reason


def test_seeds_are_distinct_and_repeat(engine):
    asked, params = requests(6, 8), SamplingParams(max_tokens=30)
    done = by_key(engine.generate(asked, params))
    for request in asked:
        assert len({done[request.id, k].ids.tobytes() for k in range(8)}) == 8
    for request in reversed(asked):  # other neighbours in the batch
        for completion in engine.generate([request], params):
            np.testing.assert_array_equal(completion.ids, done[request.id, completion.index].ids)
    assert engine.metrics()["rollout/cache_hit_rate"] > 0.3  # 8 seeds share a prompt


def test_stop_texts_are_found_however_they_are_spelt(engine, tiny_model):
    """ "</a>" is one id to the tokenizer and three or four to the model, which SGLang's own window misses."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    stop = ("ab", "</a", "é", "\n")
    asked = requests(8, 16, seed=3)
    free = by_key(engine.generate(asked, SamplingParams(max_tokens=60)))
    done = by_key(engine.generate(asked, SamplingParams(max_tokens=60, stop=stop)))
    seen = set()
    for key, completion in free.items():
        ids, reason = completion.ids, completion.finish_reason
        for end in range(1, len(ids) + 1):
            text = tokenizer.decode(ids[:end], skip_special_tokens=False)
            if found := [part for part in stop if part in text]:
                ids, reason = ids[:end], "stop"
                seen.update(found)
                break
        np.testing.assert_array_equal(done[key].ids, ids)
        assert done[key].finish_reason == reason and len(done[key].logprobs) == len(ids)
    assert len(seen) >= 3


def test_stop_ids_and_length(engine):
    asked = requests(8, 8)
    free = by_key(engine.generate(asked, SamplingParams(max_tokens=25)))
    done = by_key(engine.generate(asked, SamplingParams(max_tokens=25, stop_ids=(4, 9))))
    for key, completion in free.items():
        assert completion.finish_reason == ("stop" if completion.ids[-1] == END else "length")
        assert completion.finish_reason == "stop" or len(completion.ids) == 25
        hits = np.flatnonzero(np.isin(completion.ids, (4, 9)))
        expected = completion.ids[: hits[0] + 1] if len(hits) else completion.ids
        np.testing.assert_array_equal(done[key].ids, expected)
        assert done[key].finish_reason == ("stop" if len(hits) else completion.finish_reason)
    metrics = engine.metrics()
    both = [*free.values(), *done.values()]
    truncated = sum(c.finish_reason == "length" for c in both) / len(both)
    assert metrics["rollout/truncation_rate"] == pytest.approx(truncated) and 0 < truncated < 1
    assert metrics["rollout/tokens"] == sum(len(c.ids) for c in both)
    assert sum(metrics["rollout/length_histogram"]) == len(both)


def test_context_limit_is_the_model_s_or_smaller(engine):
    prompt = np.zeros(CONTEXT - 56, dtype=np.int32)
    for limit in (None, CONTEXT - 36):
        asked = [Request(id="long", prompt_ids=prompt, seeds=tuple(range(12)))]
        done = list(engine.generate(asked, SamplingParams(max_tokens=1000, context_length=limit)))
        cut = [c for c in done if c.finish_reason == "length"]
        assert cut and {len(c.ids) for c in cut} == {
            (limit or CONTEXT - 2) - len(prompt)
        }  # two positions held back


def test_requests_are_taken_as_they_can_be_served(engine):
    taken = 0

    def source():
        nonlocal taken
        for request in requests(400, 1):
            taken += 1
            yield request

    stream = engine.generate(source(), SamplingParams(max_tokens=2))
    next(stream)
    time.sleep(1.0)
    assert taken <= 2 * 64 + 1  # twice the concurrency, with a consumer that does not ask for more
    assert len(list(stream)) == 399 and taken == 400


def test_closing_the_iterator_ends_the_work(engine, fleet):
    stream = engine.generate(requests(100, 1), SamplingParams(max_tokens=200))
    next(stream)
    stream.close()
    fleet.drain(timeout_s=20.0)


def test_bad_requests_are_named(engine):
    ok = SamplingParams(max_tokens=4)
    for ids, seed, said in (
        (np.zeros(3000, np.int32), 1, f"3000 tokens.*{CONTEXT - 2}"),
        (np.full(3, 99, np.int32), 1, r"\[0, 48\)"),
        (np.zeros(3, np.int32), -1, "seeds"),
    ):
        with pytest.raises(UserError, match=f"'bad'.*{said}"):
            list(engine.generate([Request(id="bad", prompt_ids=ids, seeds=(seed,))], ok))
    assert len(list(engine.generate(requests(3, 1), ok))) == 3


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_weights_change_under_running_requests(
    fleet, engine, models, tiny_model, other_model, endless_model, mode
):
    """Traces cut by an update are completed and say which token came from which weights.

    The first weights never end a completion, so all of them are under way when the second ones arrive.
    """
    engine._pause_mode = mode
    asked, count = requests(12, 2, low=3, high=8), 24
    done: list = []

    def consume():
        done.extend(engine.generate(asked, SamplingParams(max_tokens=CONTEXT - 20)))

    consumer = threading.Thread(target=consume)
    try:
        fleet.update_weights(endless_model, "endless", "retract")
        consumer.start()
        while fleet.gauges().get("num_running_reqs", 0) < count:
            assert consumer.is_alive() and not done, "the completions ended before they were all running"
            time.sleep(0.02)
        engine.update_weights(other_model, "b")
        consumer.join()
        assert engine.metrics()["rollout/mixed_version_rate"] == 1.0
        found = by_key(done)
        assert set(found) == {(request.id, k) for request in asked for k in range(2)} and len(found) == count
        prompt = {request.id: request.prompt_ids for request in asked}
        for c in found.values():
            assert [s.version for s in c.weight_spans] == ["endless", "b"]
            assert [s.start for s in c.weight_spans] == [0, c.weight_spans[0].end]
            assert c.weight_spans[-1].end == len(c.ids) == len(c.logprobs)
            for span in c.weight_spans:
                if mode == "in_place" and span.version == "b":
                    continue  # sent before the update: its cache holds what the old weights computed
                expected = full_logprobs(models[span.version], prompt[c.request_id], c.ids, 1.0)
                inside = slice(span.start, span.end)
                np.testing.assert_allclose(c.logprobs[inside], expected[inside], atol=1e-4)
        for c in engine.generate(asked, SamplingParams(max_tokens=8)):  # the same prompts, sent after it
            assert [span.version for span in c.weight_spans] == ["b"]
            expected = full_logprobs(models["b"], prompt[c.request_id], c.ids, 1.0)
            np.testing.assert_allclose(c.logprobs, expected, atol=1e-4)
    finally:
        fleet.update_weights(tiny_model, "a", "retract")


def test_servers_that_record_no_experts_are_named(fleet, engine):
    """Those of this fleet were not told to; a client of a dense model never asks."""
    asked, params = requests(1, 1), SamplingParams(max_tokens=4, return_experts=True)
    with pytest.raises(UserError, match="no mixture"):
        list(engine.generate(asked, params))
    engine._routes = RouteShape(layers=2, experts_per_token=2, num_experts=8)
    with pytest.raises(EngineError, match="--enable-return-routed-experts, or set rollout.replay_experts"):
        list(engine.generate(asked, params))


def test_a_refused_update_keeps_the_old_weights(fleet, engine, tiny_model, tmp_path):
    with pytest.raises(UserError, match="not a Hugging Face directory"):
        engine.update_weights(tmp_path, "none")
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model.safetensors: not a complete safetensors file"):
        engine.update_weights(tmp_path, "torn")
    (tmp_path / "model.safetensors").write_bytes(whole)
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(UserError, match="hidden_size 64 -> 32"):
        engine.update_weights(tmp_path, "narrow")
    (only,) = engine.generate(requests(1, 1), SamplingParams(max_tokens=4))
    assert {span.version for span in only.weight_spans} == {"a"} and len(fleet.servers()) == 2


SUITE_RECIPE = """
[model]
path = "{model}"
[data.train]
kind = "jsonl"
path = "none.jsonl"
[data.eval]
kind = "jsonl"
path = "none.jsonl"
[templates]
policy = "short"
posterior = "short_posterior"
[templates.custom.short]
prompt = "{{question}} a"
thought_end = "b"
answer_end = "<|end|>"
[templates.custom.short_posterior]
prompt = "{{question}} {{solution}}"
thought_end = "b"
answer_end = "<|end|>"
"""


def test_a_suite_over_running_servers(fleet, engine, tiny_model, tmp_path, capsys, monkeypatch):
    """Benchmarks under a recipe's own template: every record is what the servers say to that question and seed."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # one verifier will do
    problems = [{"id": n, "question": f"{n} + {n} =", "answer": str(2 * n)} for n in range(3)]
    (tmp_path / "data/amc23").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(problems), tmp_path / "data/amc23/test.parquet")
    row = {"unique_id": "only", "problem": "1 + 1 =", "answer": "2", "solution": "1 + 1 = 2"}
    (tmp_path / "data/math500").mkdir()
    (tmp_path / "data/math500/test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "recipe.toml").write_text(SUITE_RECIPE.format(model=tiny_model))
    out = tmp_path / "out"
    words = ["eval", tiny_model, "--suite", "amc23,math500", "--data-dir", tmp_path / "data", "--out", out]
    words += ["--template", tmp_path / "recipe.toml", "--samples", 128, "--max-tokens", 8, "--top-p", 0.9]
    words += [word for url in fleet.servers() for word in ("--server", url)]

    def evaluate() -> list[dict]:
        assert main([str(word) for word in words]) == 0
        key = ("benchmark", "question_id", "index")
        stores = [PartStore(out / name, SUITE_RECORDS, key=key) for name in ("amc23", "math500")]
        return [row for store in stores for row in store.read_table().to_pylist()]

    rows, table = evaluate(), capsys.readouterr().out
    assert len(rows) == 3 * 128 + 128 and len({row["seed"] for row in rows}) == len(rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    asked = {}
    for row in rows:
        request = asked.setdefault(
            (row["benchmark"], row["question_id"]), {"prompt": row["prompt"], "seeds": []}
        )
        assert row["prompt"] == request["prompt"] and row["index"] == len(request["seeds"])
        request["seeds"].append(row["seed"])
    requests = [
        Request(
            id="/".join(key),
            prompt_ids=np.asarray(tokenizer.encode(one["prompt"]) + tokenizer.encode(" a"), np.int32),
            seeds=tuple(one["seeds"]),
        )
        for key, one in asked.items()
    ]
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=8, stop_ids=(END,))
    said = by_key(engine.generate(requests, params))
    for row in rows:
        ids = said[f"{row['benchmark']}/{row['question_id']}", row["index"]].ids
        assert row["completion"] == tokenizer.decode(ids, skip_special_tokens=False)

    parts = sorted((out / "amc23").glob("part-*.parquet"))
    written = [part.stat().st_mtime_ns for part in parts]
    parts[1].unlink()  # as if killed before it was there
    assert evaluate() == rows and capsys.readouterr().out == table
    assert [part.stat().st_mtime_ns == then for part, then in zip(parts, written, strict=True)] == [
        True,
        False,
    ]


def test_servers_that_return_no_experts_are_told_before_a_run(fleet: Fleet) -> None:
    for wanted in (False, True):
        checks = check_servers(fleet.servers(), experts=wanted)
        assert [check.status for check in checks] == ["fail" if wanted else "ok"] * 2
    assert all("--enable-return-routed-experts" in check.fix for check in checks)


def test_fleet_is_shared(fleet: Fleet, engine: SGLangEngine):
    """Both servers work: the router spreads what comes."""
    assert len(fleet.servers()) == 2 and len(fleet.endpoints()) == 1
    before = [control.gauges()["generation_tokens_total"] for control in fleet._controls()]
    list(engine.generate(requests(64, 1), SamplingParams(max_tokens=20)))
    after = [control.gauges()["generation_tokens_total"] for control in fleet._controls()]
    assert all(now > then for then, now in zip(before, after, strict=True))
