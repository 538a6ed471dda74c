"""The reference's costliest ops on a CPU, in C (cpu.c): attention, cca's convolutions, the residual join, the experts, the loss's
softmax.

torch computes them by operations that each read and write memory; in C what lies between stays in a cache. fp32 inside, whatever the
inputs' dtype, but no fp64. Wide products remain torch's. The machine's C compiler builds the library on first use, for the CPU that it
stands on; it is kept under XDG_CACHE_HOME (~/.cache), as Triton keeps its kernels.

Letters as in reference.py.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.arguments import check
from zaya.kernels.gradient_sum import ExpertSums

HEAD_DIMS = (32, 64, 128)  # multiples of a register tile's width; cpu.c keeps rows of up to 128 on its stack
SOURCE = Path(__file__).with_name("cpu.c")
# A product and its sum may round once; nobody reads errno or a floating-point trap. NaN and infinity stay what they are.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
WIDTH = 32  # TOKENS of cpu.c, and what experts' widths are multiples of
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KNOWN_IN_C = (torch.float32, torch.int64, torch.int32)


# ---------------------------------------------------------------------------------------------------------------- library


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled ops. RuntimeError: why there are none here, in one line."""
    try:
        return ctypes.CDLL(str(_build()))
    except OSError as error:
        raise RuntimeError(f"cannot build or load its C library: {error}") from error


def _build() -> Path:
    """Path of the library for this source, compiler and CPU, which are its name: nodes of different CPUs may share a home."""
    found = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        raise RuntimeError("needs a C compiler, and finds none of cc, gcc, clang (or CC)")
    command = [*shlex.split(found), *FLAGS]
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])  # among them the compiler's version and the CPU's instructions
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *command, macros]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zaya"
    path = folder / f"cpu-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # whole or not at all: other ranks build it too
            _run([*command, str(SOURCE), "-o", f"{scratch}/cpu.so", "-lm"])
            os.replace(f"{scratch}/cpu.so", path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"cannot compile {SOURCE.name} by {command[0]}: {next((line for line in lines if 'error' in line), lines[0])}")
    return done.stdout


def _call(function: str, *arguments: Tensor | int | float | None) -> None:
    """A function of cpu.c; None is a null pointer."""
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous() and argument.device.type == "cpu" and argument.dtype in KNOWN_IN_C, function
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        else:
            converted.append(None if argument is None else ctypes.c_long(argument))
    if getattr(library(), function)(*converted):
        raise MemoryError(f"{function} of zaya/kernels/cpu.c got no memory")


def _plain(*tensors: Tensor) -> list[Tensor]:
    """fp32 and contiguous; the gradients go back through both."""
    return [tensor.float().contiguous() for tensor in tensors]

# ---------------------------------------------------------------------------------------------------------------- stream


def residual_norm(stream: Tensor, branch: Tensor, scales: tuple[Tensor, Tensor, Tensor, Tensor], norm_weight: Tensor,
                  eps: float) -> tuple[Tensor, Tensor]:
    """See reference.residual_norm. ValueError names an argument of a wrong dtype or shape."""
    check("stream", stream, dtypes=(torch.float32,), contiguous=False)
    check("branch", branch, shape=tuple(stream.shape), dtypes=FLOATS, device=stream.device, contiguous=False)
    for index, scale in enumerate(scales):
        check(f"scales[{index}]", scale, shape=(stream.shape[-1],), dtypes=FLOATS, device=stream.device, contiguous=False)
    check("norm_weight", norm_weight, shape=(stream.shape[-1],), dtypes=FLOATS, device=stream.device, contiguous=False)
    new, x = _ResidualNorm.apply(*_plain(stream, branch, *scales, norm_weight), eps)
    return new, x.to(norm_weight.dtype)


class _ResidualNorm(torch.autograd.Function):
    """Saves its inputs and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, branch: Tensor, a_h: Tensor, b_h: Tensor, a_x: Tensor, b_x: Tensor, weight: Tensor,
                eps: float) -> tuple[Tensor, Tensor]:
        D = stream.shape[-1]
        new, x, inverse_rms = torch.empty_like(stream), torch.empty_like(stream), stream.new_empty(stream.shape[:-1])
        _call("residual_norm_forward", stream, branch, a_h, b_h, a_x, b_x, weight, eps, new, inverse_rms, x, inverse_rms.numel(), D)
        ctx.save_for_backward(stream, branch, inverse_rms, a_h, b_h, a_x, b_x, weight)
        return new, x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stream, branch, inverse_rms, a_h, b_h, a_x, b_x, weight = ctx.saved_tensors
        dnew, dx = _plain(*gradients)
        rows, D = inverse_rms.numel(), stream.shape[-1]
        dstream, dbranch, sums = torch.empty_like(stream), torch.empty_like(branch), stream.new_empty(-(-rows // 32), 4, D)
        _call("residual_norm_backward", stream, branch, inverse_rms, a_h, b_h, a_x, b_x, weight, dnew, dx, dstream, dbranch, sums, rows, D)
        total, of_branch, of_stream, dweight = sums.sum(0)
        return dstream, dbranch, b_h * total + of_branch, a_h * total, b_x * total + of_stream, a_x * total, dweight, None

# ---------------------------------------------------------------------------------------------------------------- attention


def _mix(x_BTC: Tensor, other_BTGH: Tensor, kernel: Tensor, constant: Tensor, temperature_N: Tensor | None, halo_BKnC: Tensor,
         keeps: list[Tensor], rope: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """See reference._MixNormRotate."""
    B, T, C = x_BTC.shape
    (N, H), G = constant.shape, other_BTGH.shape[2]
    if H not in HEAD_DIMS:
        raise ValueError(f"k_BTC has head dim {H}, expected {' or '.join(map(str, HEAD_DIMS))}")
    expected = (("q_BTC", x_BTC, (B, T, N * H)), ("q_mean_BTGH", other_BTGH, (B, T, None, H)), ("halos", halo_BKnC, (B, None, 2, C)),
                ("convs", kernel, (N, 3 * H, H)), *(("positions_BT", keep, (B, T, 1)) for keep in keeps),
                *(("rope", table, (B, T, H // 4)) for table in rope))
    for name, tensor, shape in expected:
        check(name, tensor, shape=shape, dtypes=FLOATS, contiguous=False)
    if N % G:
        raise ValueError(f"q_BTC has {N} heads, expected a multiple of the {G} of k_BTC")
    if T % halo_BKnC.shape[1]:
        raise ValueError(f"halos has {halo_BKnC.shape[1]} chunks, expected a divisor of T = {T}")
    if temperature_N is not None:
        check("temperature_G", temperature_N, shape=(N,), dtypes=FLOATS, contiguous=False)
    temperature = None if temperature_N is None else temperature_N.float().contiguous()
    mixed: Tensor = _MixNormRotate.apply(*_plain(x_BTC, other_BTGH, kernel, constant), temperature, *_plain(halo_BKnC, *keeps, *rope), eps)
    return mixed


class _MixNormRotate(torch.autograd.Function):
    """Saves what the reference does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, kernel: Tensor, constant: Tensor, temperature: Tensor | None, halo: Tensor,
                *rest: Any) -> Tensor:
        *tables, eps = rest  # keep_1, keep_2, cosine, sine
        (B, T, G, H), N = other.shape, len(constant)
        unit, out, inverse = x.new_empty(B, T, N, H), x.new_empty(B, T, N, H), x.new_empty(B, T, N)
        _call("mix_forward", x, other, kernel, constant, temperature, halo, *tables, eps, unit, inverse, out, B, T, N, G, H, halo.shape[1])
        ctx.save_for_backward(x, kernel, temperature, halo, unit, inverse, *tables)
        ctx.eps, ctx.groups = eps, G
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, temperature, halo, unit, inverse, *tables = ctx.saved_tensors
        (B, T, N, H), K = unit.shape, halo.shape[1]
        dx, dother, dhalo = torch.empty_like(x), torch.empty_like(unit), torch.empty_like(halo)
        parts = x.new_empty(B * K, N, 3 * H, H), x.new_empty(B * K, N, H), None if temperature is None else x.new_empty(B * K, N)
        transposed = kernel.view(N, 3, H, H).mT.contiguous()
        _call("mix_backward", x, transposed, temperature, halo, *tables, ctx.eps, unit, inverse, *_plain(*gradients), dx, dother, *parts,
              dhalo, B, T, N, H, K)
        dkernel, dconstant, dtemperature = (None if part is None else part.sum(0) for part in parts)
        return dx, dother.unflatten(2, (ctx.groups, -1)).sum(3), dkernel, dconstant, dtemperature, dhalo, *[None] * 5


cca = functools.partial(reference.cca, mix=_mix)


def attention(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, first_key_BT: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """See reference.attention. ValueError names an argument of a wrong dtype or shape."""
    check("q_BTNH", q_BTNH, shape=(None, None, None, None), dtypes=FLOATS, contiguous=False)
    B, T, N, H = q_BTNH.shape
    check("k_BSGH", k_BSGH, shape=(B, None, None, H), dtypes=(q_BTNH.dtype,), device=q_BTNH.device, contiguous=False)
    check("v_BSGH", v_BSGH, shape=tuple(k_BSGH.shape), dtypes=(q_BTNH.dtype,), device=q_BTNH.device, contiguous=False)
    check("first_key_BT", first_key_BT, shape=(B, T), dtypes=(torch.int64, torch.int32), device=q_BTNH.device, contiguous=False)
    S, G = k_BSGH.shape[1:3]
    if H not in HEAD_DIMS:
        raise ValueError(f"q_BTNH has head dim {H}, expected {' or '.join(map(str, HEAD_DIMS))}")
    if G == 0 or N % G:
        raise ValueError(f"q_BTNH has {N} heads, expected a multiple of the {G} heads of k_BSGH")
    if not offsets or T % len(offsets) or not all(0 <= offset <= S - T // len(offsets) for offset in offsets):
        raise ValueError(f"offsets is {offsets}, expected starts of chunks, a divisor of T = {T} of them, within S = {S}")
    out: Tensor = _Attention.apply(*_plain(q_BTNH, k_BSGH, v_BSGH), first_key_BT.long().contiguous(), torch.tensor(offsets))
    return out.to(q_BTNH.dtype)


class _Attention(torch.autograd.Function):
    """Saves q, k, v, the output and the log-sum-exp of each row's scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, offsets: Tensor) -> Tensor:
        B, T, N, H = q.shape
        out, lse = torch.empty_like(q), q.new_empty(B, T, N)
        _call("attention_forward", q, k, v, first_key, offsets, out, lse, B, T, k.shape[1], N, k.shape[2], H, len(offsets))
        ctx.save_for_backward(q, k, v, first_key, offsets, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_key, offsets, out, lse = ctx.saved_tensors
        B, T, N, H = q.shape
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _call("attention_backward", q, k, v, first_key, offsets, out, lse, *_plain(*gradients), dq, dk, dv, B, T, k.shape[1], N,
              k.shape[2], H, len(offsets))
        return dq, dk, dv, None, None

# ---------------------------------------------------------------------------------------------------------------- experts


def experts(x_TD: Tensor, sizes_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, order_R: Tensor | None = None,
            gate_Tk: Tensor | None = None, gradient_sums: ExpertSums | None = None) -> Tensor:
    """See reference.experts, which computes all but fp32, and widths that are no multiples of 32. ValueError names a wrong argument."""
    (T, D), (E, _, F) = x_TD.shape, down_EDF.shape
    sums = () if gradient_sums is None else tuple(gradient_sum.total for gradient_sum in gradient_sums)
    if any(tensor.dtype != torch.float32 for tensor in (x_TD, gate_up_EFD, down_EDF, *sums)) or D % WIDTH or F % WIDTH:
        return reference.experts(x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk, gradient_sums)
    check("sizes_E", sizes_E, shape=(E,), dtypes=(torch.int64,), contiguous=False)
    check("gate_up_EFD", gate_up_EFD, shape=(E, 2 * F, D), contiguous=False)
    check("down_EDF", down_EDF, shape=(E, D, F), contiguous=False)
    if order_R is None or gate_Tk is None:
        order_R, gate_Tk, k, rows = None, None, 1, T
    else:
        check("gate_Tk", gate_Tk, shape=(T, None), dtypes=(torch.float32,), contiguous=False)
        k, rows = gate_Tk.shape[1], gate_Tk.numel()
        check("order_R", order_R, shape=(rows,), dtypes=(torch.int32,), contiguous=False)
        order_R, gate_Tk = order_R.contiguous(), gate_Tk.contiguous()
    sizes = sizes_E.tolist()
    if min(sizes, default=0) < 0 or sum(sizes) > rows:
        raise ValueError(f"sizes_E is {sizes}, expected counts of together at most {rows} rows")
    y_RD: Tensor = _Experts.apply(*_plain(x_TD, gate_up_EFD, down_EDF), gate_Tk, order_R, sizes_E.contiguous(), gradient_sums)
    return y_RD if k == 1 else y_RD.view(T, k, D).sum(1)


class _Experts(torch.autograd.Function):
    """Saves x and gate | up, by shares of an expert's rows, not the activation. Returns a row per assignment, times its gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, gate: Tensor | None, order: Tensor | None, sizes: Tensor,
                gradient_sums: ExpertSums | None) -> Tensor:
        (T, D), (E, _, F) = x.shape, down.shape
        rows = T if gate is None else gate.numel()
        shares = int(((sizes + WIDTH - 1) // WIDTH).sum())
        hidden, y = x.new_empty(shares, 2 * F, WIDTH), x.new_empty(rows, D)
        _call("experts_forward", x, sizes, gate_up, down, order, gate, hidden, y, rows, rows // max(T, 1), E, D, F)
        ctx.save_for_backward(x, gate_up, down, gate, order, sizes, hidden)
        ctx.gradient_sums = gradient_sums
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, gate, order, sizes, hidden = ctx.saved_tensors
        (T, D), (E, _, F), shares = x.shape, down.shape, len(hidden)
        rows = T if gate is None else gate.numel()
        # By assignment each gets its token's gradient; where tokens have several, y was summed over them.
        (dy,), k = _plain(*gradients), rows // max(T, 1)
        dy = dy.view(T, k, D)[:, 0].contiguous() if k > 1 else dy
        sums = ctx.gradient_sums or ExpertSums.temporary(gate_up, down)
        dx, dgate = x.new_empty(rows, D), None if gate is None else torch.empty_like(gate)
        work = (torch.empty_like(hidden), x.new_empty(shares, D, WIDTH), x.new_empty(shares, WIDTH, D), x.new_empty(shares, WIDTH, F))
        adds = [not gradient_sum.first() for gradient_sum in sums]
        _call("experts_backward", x, sizes, gate_up, down, order, gate, hidden, dy, *work, dx, dgate, *(each.total for each in sums), *adds,
              rows, k, E, D, F)
        dx = dx if k == 1 else dx.view(T, k, D).sum(1)
        return dx, *(gradient_sum.for_autograd(x.dtype) for gradient_sum in sums), dgate, None, None, None

# ---------------------------------------------------------------------------------------------------------------- loss


def _partials(logits_TV: Tensor, labels_T: Tensor, vocab_start: int = 0, probs_TV: Tensor | None = None) -> tuple[Tensor, ...]:
    if logits_TV.dtype != torch.float32:
        return reference.cross_entropy_partials(logits_TV, labels_T, vocab_start, probs_TV)
    largest, total, target = logits_TV.new_empty(3, len(logits_TV))
    _call("cross_entropy_partials", logits_TV, labels_T - vocab_start, largest, total, target, *logits_TV.shape)
    return largest, total, target, logits_TV


cross_entropy = functools.partial(reference.cross_entropy, partials=_partials)
