"""Tokens per second of megavar's SGLang client beside SGLang's own bench_serving, on one server and one load;
and bytes per token of the trace store. Run it with the trainer's Python after `make engine-env`.

Both send the same number of prompts of random ids, keep the same number in flight, ask for log-probs and get
exactly --output tokens each; they take turns, and the median of the turns counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megavar.data.records import Trace
from megavar.data.traces import TraceStore
from megavar.rollout.engine import Completion, Request, SamplingParams
from megavar.rollout.engine_env import engine_python
from megavar.rollout.fleet import Fleet
from megavar.rollout.process import ServerSpec
from megavar.rollout.sglang import SGLangEngine


def write_model(directory: Path) -> Path:
    """A Qwen3 of 0.3M parameters that never samples its end-of-sequence id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(fast),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            bos_token_id=None,
        )
    )
    with torch.no_grad():  # a direction that every hidden state has and the end id is averse to
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[fast.eos_token_id, 0] = -20.0
    model.save_pretrained(directory)
    return directory


def ours(engine: SGLangEngine, options: argparse.Namespace, turn: int) -> tuple[float, list[Completion]]:
    rng = np.random.default_rng(turn)
    prompts = rng.integers(0, 256, size=(options.prompts, options.input)).astype(np.int32)
    requests = (
        Request(id=str(n), prompt_ids=prompt, seeds=(turn * options.prompts + n,))
        for n, prompt in enumerate(prompts)
    )
    began = time.perf_counter()
    done = list(engine.generate(requests, SamplingParams(max_tokens=options.output)))
    seconds = time.perf_counter() - began
    tokens = sum(len(completion.ids) for completion in done)
    assert tokens == options.prompts * options.output, "the model ended a completion early"
    return tokens / seconds, done


def bench_serving(url: str, model: Path, options: argparse.Namespace, turn: int, scratch: Path) -> float:
    host, _, port = url.removeprefix("http://").partition(":")
    report = scratch / f"bench-{turn}.jsonl"
    command = [str(engine_python()), "-m", "sglang.bench_serving", "--backend", "sglang", "--host", host]
    command += ["--port", port, "--model", str(model), "--dataset-name", "random-ids", "--tokenize-prompt"]
    command += ["--random-input-len", str(options.input), "--random-output-len", str(options.output)]
    command += ["--random-range-ratio", "1.0", "--num-prompts", str(options.prompts), "--seed", str(turn)]
    command += ["--max-concurrency", str(options.concurrency), "--disable-stream", "--return-logprob"]
    command += ["--logprob-start-len", "-1", "--temperature", "1.0", "--disable-tqdm"]
    command += ["--output-file", str(report)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
    if run.returncode or not report.exists():
        raise SystemExit(f"bench_serving failed:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")
    result = json.loads(report.read_text().splitlines()[-1])
    assert result["completed"] == options.prompts and result["total_output_tokens"] == (
        options.prompts * options.output
    )
    return result["output_throughput"]


def store_bytes_per_token(completions: list[Completion], scratch: Path) -> float:
    empty = np.zeros(0, dtype=np.int32)
    traces = (
        Trace(
            question_id=c.request_id,
            index=c.index,
            role="posterior",
            prompt_ids=empty,
            thought_ids=c.ids,
            answer_ids=empty,
            thought_logprobs=c.logprobs,
            answer_logprobs=empty.astype(np.float32),
            closed=True,
            finish_reason=c.finish_reason,
            seed=c.seed,
            weight_spans=c.weight_spans,
        )
        for c in completions
    )
    TraceStore(scratch / "store").write_traces(0, traces)
    size = sum(file.stat().st_size for file in (scratch / "store").glob("*.parquet"))
    return size / sum(len(c.ids) for c in completions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="Hugging Face directory; a tiny random Qwen3 by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-seeds", action="store_true", help="server without deterministic mode")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = options.model or write_model(scratch / "model")
        dtype = "float32" if options.device == "cpu" else "bfloat16"
        spec = ServerSpec(
            device=options.device,
            dtype=dtype,
            max_running=options.concurrency,
            deterministic=not options.no_seeds,
        )
        fleet = Fleet(model, logs=scratch / "logs", spec=spec)
        engine = SGLangEngine(fleet, concurrency=options.concurrency)
        try:
            url = fleet.servers()[0]
            ours(engine, options, 0)
            mine, theirs = [], []
            for turn in range(1, options.turns + 1):
                theirs.append(bench_serving(url, model, options, turn, scratch))
                speed, done = ours(engine, options, turn)
                mine.append(speed)
            per_token = store_bytes_per_token(done, scratch)
        finally:
            engine.close()
    print(
        json.dumps(
            {
                "client_tokens_per_s": [round(speed) for speed in mine],
                "bench_serving_tokens_per_s": [round(speed) for speed in theirs],
                "ratio_of_medians": round(statistics.median(mine) / statistics.median(theirs), 3),
                "store_bytes_per_token": round(per_token, 2),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
