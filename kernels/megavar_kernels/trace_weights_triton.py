"""Triton kernels of trace_weights: one launch forward, one for the backward of the bounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import on_device_of_first

# Tokens per step of a trace's reduction, and the width of a question's group (trace_weights.MAX_TRACES).
BLOCK = 1024
GROUP = 256


@triton.jit
def _add_exponentials(m0, s0, m1, s1):
    """(max, sum of exponentials relative to it) of two sets -> of their union; (-inf, 0) is the empty set."""
    m = tl.maximum(m0, m1)
    at = tl.where(m == float("-inf"), 0.0, m)
    return m, s0 * tl.exp(m0 - at) + s1 * tl.exp(m1 - at)


@triton.jit
def _question_of(trace, question_offsets_ptr, questions, steps):
    """Index of the last question that starts at or before `trace`: bisection, 2 ** steps >= questions."""
    low = trace * 0
    high = low + questions
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(question_offsets_ptr + middle) <= trace
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(
    do_not_specialize=["questions", "steps", "accuracy", "normalize"],
    do_not_specialize_on_alignment=[
        "answer_ptr", "cu_seqlens_ptr", "question_offsets_ptr", "log_ratio_ptr", "log_rho_ptr", "weights_ptr",
        "bounds_ptr", "effective_ptr", "arrived_ptr",
    ],
)  # fmt: skip
def trace_weights_forward(
    policy_ptr, posterior_ptr, answer_ptr, cu_seqlens_ptr, question_offsets_ptr,
    log_ratio_ptr, log_rho_ptr, weights_ptr, bounds_ptr, effective_ptr, arrived_ptr,
    questions, steps, temper, clip, accuracy, normalize,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program per trace; the last of a question to finish computes what needs all of its traces.

    accuracy: 1 where answers are accuracies, 0 where they are log-likelihoods; normalize: 1 or 0.
    """
    trace = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + trace).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + trace + 1).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < stop
        policy = tl.load(policy_ptr + at, mask=inside, other=0.0)
        posterior = tl.load(posterior_ptr + at, mask=inside, other=0.0)
        sums += policy - posterior
    ratio = tl.sum(sums, 0)
    if normalize:
        ratio = ratio / tl.maximum(stop - start, 1).to(tl.float32)
    answer = tl.load(answer_ptr + trace)
    if accuracy:
        answer = tl.where(answer > 0, tl.log(tl.where(answer > 0, answer, 1.0)), float("-inf"))
    tempered = tl.where(temper == 0, 0.0, temper * ratio)
    tl.store(log_ratio_ptr + trace, ratio)
    tl.store(log_rho_ptr + trace, tl.minimum(tl.maximum(tempered, -clip), clip) + answer)

    question = _question_of(trace, question_offsets_ptr, questions, steps)
    begin = tl.load(question_offsets_ptr + question)
    count = (tl.load(question_offsets_ptr + question + 1) - begin).to(tl.int32)
    # release: this trace's log_rho is visible to whoever counts it; acquire: the last one sees all of them
    if tl.atomic_add(arrived_ptr + question, 1, sem="acq_rel") == count - 1:
        offs = tl.arange(0, GROUP)
        inside = offs < count
        # .cg: other SMs wrote these, the L1 must not answer
        log_rho = tl.load(log_rho_ptr + begin + offs, mask=inside, other=float("-inf"), cache_modifier=".cg")
        log_rho = tl.where(count <= GROUP, log_rho, float("nan"))
        top = tl.max(log_rho, 0)
        rho = tl.exp(log_rho - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(rho, 0)
        none = total == 0
        safe = tl.where(none, 1.0, total)
        tl.store(weights_ptr + begin + offs, rho / safe, mask=inside)
        square = tl.where(none, 1.0, tl.sum(rho * rho, 0))
        tl.store(effective_ptr + question, total * total / square)
        one = tl.where(log_rho == float("-inf"), 0.0, 1.0)
        m, s = tl.associative_scan((log_rho, one), 0, _add_exponentials)
        bounds = m + tl.log(tl.where(s == 0, 1.0, s)) - tl.log((offs + 1).to(tl.float32))
        tl.store(bounds_ptr + begin + offs, bounds, mask=inside)


@triton.jit(
    do_not_specialize_on_alignment=[
        "grad_ptr",
        "log_rho_ptr",
        "bounds_ptr",
        "question_offsets_ptr",
        "grad_log_rho_ptr",
    ]
)
def trace_bounds_backward(
    grad_ptr, log_rho_ptr, bounds_ptr, question_offsets_ptr, grad_log_rho_ptr, GROUP: tl.constexpr
):
    """One program per question: d log_rho_j = sum_(k >= j) g_k rho_j / sum_(i <= k) rho_i."""
    begin = tl.load(question_offsets_ptr + tl.program_id(0))
    count = (tl.load(question_offsets_ptr + tl.program_id(0) + 1) - begin).to(tl.int32)
    offs = tl.arange(0, GROUP)
    inside = offs < count
    log_rho = tl.load(log_rho_ptr + begin + offs, mask=inside, other=float("-inf"))
    result = tl.zeros([GROUP], tl.float32)
    traces = tl.full([], 0.0, tl.float32)
    for k in range(count):
        traces += 1.0
        bound = tl.load(bounds_ptr + begin + k)
        log_total = bound + tl.log(traces)
        # a bound of -inf has only rho of zero below it: no gradient
        share = tl.exp(log_rho - tl.where(bound == float("-inf"), float("inf"), log_total))
        result += tl.where(offs <= k, share, 0.0) * tl.load(grad_ptr + begin + k)
    tl.store(grad_log_rho_ptr + begin + offs, result, mask=inside)


@on_device_of_first
def forward(
    policy: Tensor,
    posterior: Tensor,
    log_likelihood: Tensor | None,
    accuracy: Tensor | None,
    cu_seqlens: Tensor,
    question_offsets: Tensor,
    ratio,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of trace_weights.TraceWeights; ratio is a trace_weights.Ratio."""
    traces, questions = cu_seqlens.shape[0] - 1, question_offsets.shape[0] - 1
    log_ratio, log_rho, weights, bounds = policy.new_empty((4, traces)).unbind(0)
    zeros = policy.new_zeros((2, questions))
    if traces:
        trace_weights_forward[(traces,)](
            policy, posterior, log_likelihood if accuracy is None else accuracy, cu_seqlens, question_offsets,
            log_ratio, log_rho, weights, bounds, zeros[0], zeros[1].view(torch.int32),
            questions, questions.bit_length(), ratio.temper, ratio.clip,
            int(accuracy is not None), int(ratio.length_normalize),
            BLOCK=BLOCK, GROUP=GROUP, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return log_ratio, log_rho, weights, bounds, zeros[0]


@on_device_of_first
def bounds_backward(grad: Tensor, log_rho: Tensor, bounds: Tensor, question_offsets: Tensor) -> Tensor:
    """`[S]` gradient of the bounds in log rho."""
    result = torch.empty_like(log_rho)
    if question_offsets.shape[0] > 1:
        trace_bounds_backward[(question_offsets.shape[0] - 1,)](
            grad, log_rho, bounds, question_offsets, result, GROUP=GROUP, num_warps=4, enable_fp_fusion=True
        )
    return result
