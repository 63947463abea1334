"""AdamW for Megatron-Core where neither transformer-engine nor NVIDIA's apex brings a fused one.

Megatron's distributed optimizer then takes torch's, but cannot resume: its fully reshardable checkpoints know the state
of the fused ones only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw


def install() -> None:
    """Have Megatron-Core take `FusedAdam` instead of torch's AdamW; a no-op where it has found a fused one."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of the fused GPU optimizers: `step` in the parameter group, two moments in the state.

    Update rule: decoupled weight decay (arXiv 1711.05101, Algorithm 2) with bias correction.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        **_: Any,
    ) -> None:
        if not (adam_w_mode and bias_correction):
            raise ValueError("only AdamW with bias correction is implemented")
        self.adam_w_mode = adam_w_mode
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = step = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            for p in params:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            grads = [p.grad for p in params]
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            adamw(
                params,
                grads,
                first,
                second,
                [],
                [torch.full((), step - 1.0, device=p.device) for p in params],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
