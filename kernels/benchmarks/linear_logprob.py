"""Time linear_logprob against the bare cuBLAS GEMMs of the same run and against its peers.

    python kernels/benchmarks/linear_logprob.py                         the whole grid
    python kernels/benchmarks/linear_logprob.py --tokens 8192 --hidden 4096 --shards 1

Prints one line per shape and measurement and saves them, with device and versions, as JSON. A shard of a
tensor-parallel group is timed as its share on one device, collectives left out. Needs a CUDA device; exits
with 2 without one.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from megavar_kernels import linear_logprob, linear_logprob_forward, linear_logprob_forward_backward
from megavar_kernels import linear_logprob_triton as launch
from megavar_kernels.workspace import workspace_bytes
from peers import Peer, peer_versions, peers
from timing import milliseconds, peak_mib, require_device, save

VOCAB = 151_936
SAMPLED_ROWS = 64


def forward_gemm(hidden, weight):
    """The GEMM of the forward pass alone, 2THV, in chunks of the logits that fit beside the weight."""
    out = hidden.new_empty((min(hidden.shape[0], 8192), weight.shape[0]))
    return lambda: [torch.mm(rows, weight.t(), out=out[: rows.shape[0]]) for rows in hidden.split(8192)]


def step_gemms(hidden, weight):
    """The three GEMMs of a step without recomputation, 6THV: logits, dX and dW."""
    logits = forward_gemm(hidden, weight)
    dz = hidden.new_ones((min(hidden.shape[0], 8192), weight.shape[0]))
    dx, dw = torch.empty_like(hidden[:8192]), torch.empty_like(weight)

    def run():
        logits()
        for rows in hidden.split(8192):
            part = dz[: rows.shape[0]]
            torch.mm(part, weight, out=dx[: rows.shape[0]])
            torch.mm(part.t(), rows, out=dw)

    return run


def backward_alone(hidden, weight, target, grad):
    """The backward pass of a graph built beforehand, logits recomputed."""
    logprob, _ = linear_logprob(hidden, weight, target, keep="none")
    return lambda: torch.autograd.grad(logprob, (hidden, weight), grad, retain_graph=True)


def error(hidden, weight, target, logprob, entropy):
    """Largest absolute error of log-prob and entropy against fp64 on sampled rows."""
    rows = torch.randperm(hidden.shape[0], device=hidden.device)[:SAMPLED_ROWS]
    z = hidden[rows].double() @ weight.double().t()
    log_p = z.log_softmax(-1)
    exact = log_p.gather(1, target[rows, None].long())[:, 0]
    return (
        (logprob[rows] - exact).abs().max().item(),
        (entropy[rows] + (log_p.exp() * log_p).sum(1)).abs().max().item(),
    )


def stated_mib(tokens: int, width: int, rows: int, fused: bool) -> float:
    """What workspace_bytes gives a recomputing step, with its outputs."""
    space = workspace_bytes(tokens, width, rows, torch.bfloat16, fused=fused)
    return (max(space.forward, space.backward) + 2 * width * (tokens + rows) + 8 * tokens) / 2**20


def measure(tokens: int, width: int, shards: int, others: list[Peer]) -> list[dict]:
    rows = -(-VOCAB // shards)
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).mul_(width**-0.5).requires_grad_()
    target = torch.randint(0, rows, (tokens,), device="cuda")
    grad = torch.randn(tokens, device="cuda")
    x, w = hidden.detach(), weight.detach()
    flop = 2 * tokens * width * rows
    shape = {"tokens": tokens, "hidden": width, "shards": shards, "vocab_rows": rows}
    shape["variant"] = "fused" if launch.uses_fused(x) else "chunked"
    results: list[dict] = []

    def report(name, row, text):
        results.append({**shape, "what": name, **row})
        print(f"T={tokens} H={width} TP={shards} {shape['variant']:<8} {name:<36} {text}", flush=True)

    def record(name, function, flops, floor=None, **extra):
        try:
            row = {"ms": milliseconds(function), "peak_mib": peak_mib(function), **extra}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            report(name, {"ms": None, "status": "out of memory"}, "out of memory")
            return None
        row["tflops"] = flops / row["ms"] / 1e9
        if floor:
            row["ratio_to_gemm"] = row["ms"] / floor
        report(name, row, ", ".join(f"{key}={value:.4g}" for key, value in row.items()))
        return row["ms"]

    def step(keep):
        # autograd.grad hands the gradients out, so that they count in the peak and not before it
        return lambda: torch.autograd.grad(
            linear_logprob(hidden, weight, target, keep=keep)[0], (hidden, weight), grad
        )

    forward_ms = record("gemm 2THV", forward_gemm(x, w), flop)
    step_ms = record("gemm 6THV", step_gemms(x, w), 3 * flop)
    record("forward", lambda: linear_logprob_forward(x, w, target), flop, forward_ms)
    record("backward", backward_alone(hidden, weight, target, grad), 3 * flop, step_ms)
    stated = stated_mib(tokens, width, rows, shape["variant"] == "fused")
    record("step, recompute 8THV", step("none"), 4 * flop, step_ms, stated_mib=stated)
    record("step, keep=auto", step("auto"), 3 * flop, step_ms)
    record("one pass 6THV", lambda: linear_logprob_forward_backward(x, w, target, grad), 3 * flop, step_ms)
    for peer in others if shards == 1 else ():
        if peer.loss is None:
            report(peer.name, {"ms": None, "status": peer.reason}, peer.reason)
            continue

        def peer_step(loss=peer.loss):
            return torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))

        try:
            record(f"{peer.name} forward", lambda loss=peer.loss: loss(x, w, target), flop, forward_ms)
            record(f"{peer.name} step", peer_step, 3 * flop, step_ms)
        except Exception as failure:  # whatever a peer raises is a row of the table, not the end of the run
            reason = f"unsupported: {type(failure).__name__}: {failure}".splitlines()[0]
            report(peer.name, {"ms": None, "status": reason}, reason)
    errors = error(x, w, target, *linear_logprob_forward(x, w, target))
    results.append({**shape, "what": "error", "logprob": errors[0], "entropy": errors[1]})
    print(f"T={tokens} H={width} TP={shards} largest error: logprob {errors[0]:.2e}, entropy {errors[1]:.2e}")
    return results


def positive(text: str) -> int:
    """An argument of at least one."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=positive, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--hidden", type=positive, nargs="+", default=[2048, 4096, 5120])
    parser.add_argument("--shards", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--save", type=Path, default=Path(__file__).parent / "results/linear_logprob.json")
    arguments = parser.parse_args()
    require_device(parser.prog)
    torch.manual_seed(0)
    rows = []
    others = peers()
    for shape in itertools.product(arguments.tokens, arguments.hidden, arguments.shards):
        rows += measure(*shape, others)
        save(arguments.save, rows, **peer_versions())


if __name__ == "__main__":
    main()
