"""AdamW over one flat shard: one pass that updates weights and both moments and rounds the weights to the model's dtype.

With g' = g grad_scale and t = step + 1 (Loshchilov & Hutter 2019, in the order of torch.optim.AdamW):

    p <- p - lr weight_decay p,   m <- m + (1 - beta1) (g' - m),   v <- beta2 v + (1 - beta2) g'^2
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps),   out <- p rounded

The gate is a branch around all stores but that of out: where commit is false, p, m and v keep their bits whatever g holds, and out gets p.
Scale, step and verdict are read on the device, so the host waits for nothing. An element moves 30 bytes (28 with a bf16 gradient).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zaya.kernels.arguments import check
from zaya.kernels.launch import config, launch, target

GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDED = (torch.bfloat16, torch.float16)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


@triton.jit
def _one_minus_power(log_base, exponent):
    """1 - base^exponent for base < 1; near 0 by the series of expm1: subtracting would leave 3 digits of 1 - 0.999."""
    x = exponent * log_base
    # The next term, x^6 / 5040, is below 2e-8 where the series is taken.
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.2, series, 1 - tl.exp(x))


@triton.jit
def _adamw_block(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, out_ptr, mask, commit, grad_scale, step_size, inverse_sqrt_correction,
                 decay, one_minus_beta1, beta2, one_minus_beta2, eps):
    """One block of elements; the pointers are its own, mask is None where all of them exist."""
    param = tl.load(param_ptr, mask=mask)
    grad = tl.load(grad_ptr, mask=mask).to(tl.float32) * grad_scale
    exp_avg = tl.load(exp_avg_ptr, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr, mask=mask)
    if commit:
        exp_avg += one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
        param -= decay * param
        param -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_sqrt_correction + eps)
        tl.store(param_ptr, param, mask=mask)
        tl.store(exp_avg_ptr, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr, exp_avg_sq, mask=mask)
    if out_ptr is not None:
        tl.store(out_ptr, param.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, out_ptr, grad_scale_ptr, step_ptr, commit_ptr, num_elements, lr, decay,
                  one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, BLOCK: tl.constexpr):
    commit = tl.load(commit_ptr) != 0
    grad_scale = tl.load(grad_scale_ptr)
    step = tl.load(step_ptr) + 1
    step_size = lr / _one_minus_power(log_beta1, step)
    inverse_sqrt_correction = tl.rsqrt(_one_minus_power(log_beta2, step))
    start = tl.program_id(0).to(tl.int64) * BLOCK  # shards may hold more than 2^31 elements
    offsets = tl.arange(0, BLOCK)
    param_ptr += start
    grad_ptr += start
    exp_avg_ptr += start
    exp_avg_sq_ptr += start
    if out_ptr is not None:
        out_ptr += start
    # Whole blocks take no mask: one that ends anywhere would narrow every access to one element.
    if start + BLOCK <= num_elements:
        _adamw_block(param_ptr + offsets, grad_ptr + offsets, exp_avg_ptr + offsets, exp_avg_sq_ptr + offsets,
                     None if out_ptr is None else out_ptr + offsets, None, commit, grad_scale, step_size, inverse_sqrt_correction,
                     decay, one_minus_beta1, beta2, one_minus_beta2, eps)
    else:
        _adamw_block(param_ptr + offsets, grad_ptr + offsets, exp_avg_ptr + offsets, exp_avg_sq_ptr + offsets,
                     None if out_ptr is None else out_ptr + offsets, offsets < num_elements - start, commit, grad_scale, step_size,
                     inverse_sqrt_correction, decay, one_minus_beta1, beta2, one_minus_beta2, eps)


@torch.no_grad()
def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float, beta2: float, eps: float,
           weight_decay: float, grad_scale: Tensor, step: Tensor, commit: Tensor, out: Tensor | None = None) -> None:
    """AdamW in place from grad * grad_scale; nothing but `out` changes where commit is false. ValueError for what the kernel does not take.

    param, exp_avg, exp_avg_sq: fp32 of one shape, any length; grad: that shape, fp32, bf16 or fp16, left as it is. grad_scale: 0-dim fp32;
    commit: 0-dim bool; step: 0-dim fp32, updates so far, which the caller counts. out: that shape, bf16 or fp16, gets the weights rounded.
    """
    shape, device = tuple(param.shape), param.device
    for name, tensor, dtypes in (("param", param, (torch.float32,)), ("grad", grad, GRADIENTS), ("exp_avg", exp_avg, (torch.float32,)),
                                 ("exp_avg_sq", exp_avg_sq, (torch.float32,)), ("out", out, ROUNDED)):
        if tensor is not None:
            check(name, tensor, shape=shape, dtypes=dtypes, device=device)
    for name, tensor, dtype in (("grad_scale", grad_scale, torch.float32), ("step", step, torch.float32), ("commit", commit, torch.bool)):
        check(name, tensor, shape=(), dtypes=(dtype,), device=device)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} is {beta}, expected a number from 0 to below 1")
    if param.numel() == 0:
        return
    chosen = config(_adamw_kernel, target(device))
    launch(_adamw_kernel, (triton.cdiv(param.numel(), chosen.blocks["BLOCK"]),), {
        "param_ptr": param, "grad_ptr": grad, "exp_avg_ptr": exp_avg, "exp_avg_sq_ptr": exp_avg_sq, "out_ptr": out,
        "grad_scale_ptr": grad_scale, "step_ptr": step, "commit_ptr": commit, "num_elements": param.numel(), "lr": lr,
        "decay": lr * weight_decay, "one_minus_beta1": 1 - beta1, "log_beta1": _log(beta1), "beta2": beta2,
        "one_minus_beta2": 1 - beta2, "log_beta2": _log(beta2), "eps": eps}, chosen)
