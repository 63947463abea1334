"""Bandwidth of trace_weights against a copy on the same device.

    python kernels/benchmarks/trace_weights.py

A million tokens in traces of random length, K traces a question. Needs a CUDA device; exits with 2 without
one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from megavar_kernels import trace_weights
from timing import milliseconds, require_device, save


def measure(tokens: int, traces_per_question: int, mean_length: int) -> dict:
    questions = max(tokens // (mean_length * traces_per_question), 1)
    traces = questions * traces_per_question
    cuts = torch.randint(0, tokens, (traces - 1,)).sort().values
    cu_seqlens = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).cuda()
    offsets = torch.arange(0, traces + 1, traces_per_question).cuda()
    policy, posterior = -torch.rand(2, tokens, device="cuda")
    accuracy = torch.rand(traces, device="cuda")
    ms = milliseconds(lambda: trace_weights(policy, posterior, cu_seqlens, offsets, accuracy=accuracy))
    out = torch.empty(tokens, device="cuda")
    copy_ms = milliseconds(lambda: out.copy_(policy))  # reads and writes what trace_weights reads
    gigabytes = 8 * tokens / 1e9
    row = {"tokens": tokens, "k": traces_per_question, "questions": questions, "ms": ms}
    return row | {"gb_per_s": gigabytes / ms * 1e3, "copy_gb_per_s": gigabytes / copy_ms * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--traces", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--mean-length", type=int, default=1000)
    parser.add_argument("--save", type=Path, default=Path(__file__).parent / "results/trace_weights.json")
    arguments = parser.parse_args()
    require_device(parser.prog)
    torch.manual_seed(0)
    rows = []
    for count in arguments.traces:
        rows.append(measure(arguments.tokens, count, arguments.mean_length))
        print(" ".join(f"{key}={value:.4g}" for key, value in rows[-1].items()))
    save(arguments.save, rows)


if __name__ == "__main__":
    main()
