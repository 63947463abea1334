"""The Triton path of linear_logprob under the interpreter, chunk and tile boundaries crossed everywhere."""

import interpreter_shim
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_oracles import gradients, logprob_and_entropy, within_ulp
from live_bytes import LiveBytes
from megavar_kernels import linear_logprob, linear_logprob_forward, linear_logprob_forward_backward
from megavar_kernels import linear_logprob_triton as launch
from megavar_kernels.vocab_parallel import merge_statistics
from megavar_kernels.workspace import workspace_bytes


@pytest.fixture(params=["chunked", "fused"])
def variant(request, monkeypatch):
    interpreter_shim.install(monkeypatch, fused=request.param == "fused")


def problem(tokens, width, rows, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(rows, width, generator=generator).mul(width**-0.5).to(dtype)
    target = torch.randint(0, rows, (tokens,), generator=generator)
    grads = torch.randn(2, tokens, generator=generator)
    return hidden, weight, target, grads[0].contiguous(), grads[1].contiguous()


@pytest.mark.usefixtures("variant")
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 40),
    width=st.sampled_from([8, 16, 24, 64]),
    rows=st.integers(1, 200),
    temperature=st.floats(0.5, 2),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 9),
)
def test_outputs_match_fp64(tokens, width, rows, temperature, dtype, seed):
    hidden, weight, target, _, _ = problem(tokens, width, rows, dtype, seed)
    target[1::5] = -100
    actual = linear_logprob_forward(hidden, weight, target, temperature=temperature)
    expected = logprob_and_entropy(hidden, weight, target, temperature)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)


# bytes of a kept token of 150 rows in bf16: 160 elements and three maxima
TOKEN_BYTES = 2 * 160 + 4 * 3


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("keep", "entropy"),
    [("none", True), (21 * TOKEN_BYTES, True), (21 * TOKEN_BYTES, False), (1 << 30, True)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_match_fp64(keep, entropy, dtype):
    hidden, weight, target, g_lp, g_en = problem(40, 32, 150, dtype)
    target[3], target[4], g_lp[5], g_en[5] = -100, 149, 0.0, 0.0
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if dtype == torch.float16:  # the gradient of a mean over many tokens
        g_lp, g_en = g_lp * 1e-5, g_en * 1e-5
    logprob, h = linear_logprob(x, w, target, temperature=0.8, keep=keep)
    ((logprob * g_lp).sum() + (h * g_en).sum() * entropy).backward()
    want = gradients(hidden, weight, target, g_lp, g_en if entropy else None, temperature=0.8)
    for actual, expected in zip((x.grad, w.grad), want, strict=True):
        assert actual.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
        else:
            # dlogits are rounded too, so an element that cancels inherits the error of its terms: one unit in
            # the last place of the largest element bounds all of them
            info = torch.finfo(dtype)
            ulp = max(info.eps * float(expected.abs().max()), info.smallest_normal * info.eps)
            assert (actual.double() - expected).abs().max() <= ulp


@pytest.mark.usefixtures("variant")
def test_bf16_gradients_are_one_ulp_from_exact_products_of_the_rounded_dlogits():
    hidden, weight, target, g_lp, g_en = problem(24, 16, 70)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprob, entropy = linear_logprob(x, w, target, keep="none")
    (logprob * g_lp + entropy * g_en).sum().backward()
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    onehot = torch.nn.functional.one_hot(target, 70)
    h = -(log_p.exp() * log_p).sum(1, keepdim=True)
    dz = g_lp[:, None] * (onehot - log_p.exp()) - g_en[:, None] * log_p.exp() * (log_p + h)
    # the interpreter truncates where the hardware rounds to nearest
    dz = (dz.float().view(torch.int32) & -65536).view(torch.float32).double()
    # where fp32 and fp64 straddle a step of bf16, one term is off by an ulp
    slack = 2.0**-8 * float(dz.abs().max()) * 0.05
    assert within_ulp(x.grad, dz @ weight.double(), floor=slack)
    assert within_ulp(w.grad, dz.t() @ hidden.double(), floor=slack)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_blocks_of_dx_go_through_the_group(sequence_parallel):
    hidden, weight, target, g_lp, _ = problem(60, 16, 150, torch.float32)
    target[3], g_lp[5] = -100, 0.0
    hidden.requires_grad_(), weight.requires_grad_()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        options = dict(group=dist.group.WORLD, sequence_parallel=sequence_parallel, keep="none")
        linear_logprob(hidden, weight, target, **options)[0].backward(g_lp)
    finally:
        dist.destroy_process_group()
    want = gradients(hidden, weight, target, g_lp)
    for actual, expected in zip((hidden.grad, weight.grad), want, strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("rows", [0, 150])
def test_every_shard_announces_the_same_blocks_of_dx(rows):
    hidden, weight, target, g_lp, _ = problem(60, 16, 150, torch.float32)
    grad, parts = torch.full((60, 16), torch.nan), []
    row, lse = torch.full_like(target, -1, dtype=torch.int32), torch.zeros(60)
    launch.gradients(hidden, weight[:rows], row, lse, lse, g_lp, None, 1.0, None, grad, parts.append, None)
    assert parts == [slice(0, 24), slice(24, 48), slice(48, 60)]
    assert grad.isfinite().all() and grad.any() == (rows > 0)


@pytest.mark.usefixtures("variant")
def test_one_pass_matches_fp64():
    hidden, weight, target, g_lp, g_en = problem(40, 16, 150, torch.float32)
    target[3], g_lp[5], g_en[5] = -100, 0.0, 0.0
    logprob, entropy, dx, dw = linear_logprob_forward_backward(hidden, weight, target, g_lp, g_en)
    want_dx, want_dw = gradients(hidden, weight, target, g_lp, g_en)
    computed = torch.arange(40) != 5
    for got, want in zip((logprob, entropy), logprob_and_entropy(hidden, weight, target), strict=True):
        torch.testing.assert_close(got[computed].double(), want[computed], atol=2e-6, rtol=0)
    torch.testing.assert_close(dx.double(), want_dx, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dw.double(), want_dw, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("bounds", [(0, 70, 150), (0, 33, 34, 150), (0, 150, 150)])
def test_ragged_shards_merge_to_the_whole_vocabulary(bounds):
    """Targets around every shard's end: a ragged last tile's columns must not match the next shard's ids."""
    hidden, weight, _, _, _ = problem(20, 16, 150, torch.float32)
    ends = torch.tensor(bounds)
    target = (ends[:, None] + torch.arange(-2, 3)).clamp(0, 149).flatten()[:20].repeat(2)[:20]
    hidden = hidden[: len(target)].contiguous()
    shards = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        local = target - start
        local = torch.where((local >= 0) & (local < stop - start), local, -1).to(torch.int32)
        shards.append(launch.statistics(hidden, weight[start:stop], local, 1.0, 0)[0])
    actual = merge_statistics(torch.stack(shards))
    for got, want in zip(actual, logprob_and_entropy(hidden, weight, target), strict=False):
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)
    assert torch.isneginf(shards[-1][3][target < bounds[-2]]).all()


@pytest.mark.usefixtures("variant")
def test_underflowing_kept_exponentials_have_no_entropy_gradient():
    hidden = torch.full((16, 8), 4.0, dtype=torch.bfloat16)
    weight = torch.cat([torch.full((1, 8), 4.0), torch.full((39, 8), -4.0)]).bfloat16().requires_grad_()
    target = torch.zeros(16, dtype=torch.int64)
    logprob, entropy = linear_logprob(hidden, weight, target, keep=1 << 30)
    (logprob + entropy).sum().backward()
    assert entropy.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("keep", [0, 21 * TOKEN_BYTES])
@pytest.mark.parametrize("computed", [90, 60])
def test_live_memory_stays_within_the_stated_workspace(fused, keep, computed, monkeypatch):
    interpreter_shim.install(monkeypatch, fused=fused)
    hidden, weight, target, g_lp, g_en = problem(90, 32, 150)
    hidden.requires_grad_(), weight.requires_grad_()
    target[computed:] = -100
    space = workspace_bytes(90, 32, 150, torch.bfloat16, keep, computed_tokens=computed, fused=fused)
    with LiveBytes().ignore(hidden, weight, target, g_lp, g_en) as step:
        results = linear_logprob(hidden, weight, target, keep=keep)
        torch.autograd.backward(results, (g_lp, g_en))
    outputs = 2 * 4 * 90 + hidden.grad.numel() * 2 + weight.grad.numel() * 2
    moved = 2 * hidden.grad.numel() * 2  # copies of up to 1024 rows when rows were dropped: all of them here
    bound = max(space.forward, space.backward) + space.kept + outputs + moved * (computed < 90)
    assert 0.6 * bound <= step.peak <= bound


def test_launch_table_gives_the_fused_kernels_to_short_bf16_rows_on_sm_90(monkeypatch):
    for capability, dtype, width, fused in [
        ((9, 0), torch.bfloat16, 2048, True),
        ((9, 0), torch.bfloat16, 4096, False),
        ((9, 0), torch.float32, 2048, False),
        ((8, 0), torch.bfloat16, 2048, False),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        assert launch.uses_fused(torch.zeros(1, width, dtype=dtype)) is fused
