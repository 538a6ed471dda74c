"""The reference's costliest ops on a CPU, in C (c/): attention, cca's convolutions, the residual join, the experts, the loss's softmax.

torch computes them by operations that each read and write memory; in C what lies between stays in a cache. They compute in fp32, also
from bf16 and fp16, of which they save copies in fp32. Experts in 16 bits, or of widths that are no multiples of 32, remain the reference's,
and so do wide products. The machine's C compiler builds the library on first use, for the CPU that it stands on; it is kept under
XDG_CACHE_HOME (~/.cache), as Triton keeps its kernels.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zaya.kernels import reference
from zaya.kernels.arguments import FLOATS, check, check_attention, check_cca, check_experts
from zaya.kernels.gradient_sum import ExpertSums, GradientSum

SOURCES = sorted(Path(__file__).with_name("c").glob("*.[ch]"))
# A product and its sum may round once; nobody reads errno or a floating-point trap. NaN and infinity stay what they are.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
# What the functions in C take, in order. x: fp32, i: int64, s: int32, each a contiguous tensor or None; f: float; n: long.
SIGNATURES = {
    "attention_forward": "xxxiixxnnnnnnn", "attention_backward": "xxxiixxxxxxnnnnnnn",
    "mix_forward": "xxxxxxxxxxfxxxnnnnnn", "mix_backward": "xxxxxxxxxxxxxxxxxnnnnn",
    "residual_norm_forward": "xxxxxxxfxxxnn", "residual_norm_backward": "xxxxxxxxxxxxxnn",
    "experts_forward": "xixxsxxxnnnnn", "experts_backward": "xixxsxxxxxxxxxxxnnnnnnn",
    "cross_entropy_partials": "xixxxnn"}
TENSORS = {"x": torch.float32, "i": torch.int64, "s": torch.int32}
CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------------------- library


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled ops. RuntimeError: why there are none here, in one line."""
    try:
        path = _build()
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # cut short by a full disk or a power failure
            path.unlink(missing_ok=True)  # another rank may have been here
            loaded = ctypes.CDLL(str(_build()))
    except (OSError, ValueError) as error:  # ValueError: quotes in CC that do not close, messages that are no text
        raise RuntimeError(f"cannot build or load its C library: {error}") from error
    for name, signature in SIGNATURES.items():
        getattr(loaded, name).argtypes = [{"f": ctypes.c_float, "n": ctypes.c_long}.get(letter, ctypes.c_void_p) for letter in signature]
    return loaded


def compiler() -> str | None:
    """The C compiler's command: that of the environment's CC, or what is found."""
    return os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def _build() -> Path:
    """Path of the library for this source, compiler and CPU, which are its name: nodes of different CPUs may share a home."""
    found = compiler()
    if found is None:
        raise RuntimeError("needs a C compiler, and finds none of cc, gcc, clang (or CC)")
    command = [*shlex.split(found), *FLAGS]
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])  # among them the compiler's version and the CPU's instructions
    key = hashlib.sha256("\n".join([*(source.read_text() for source in SOURCES), *command, macros]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zaya"
    path = folder / f"cpu-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # whole or not at all: other ranks build it too
            _run([*command, *(str(source) for source in SOURCES if source.suffix == ".c"), "-o", f"{scratch}/cpu.so", "-lm"])
            os.replace(f"{scratch}/cpu.so", path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"cannot compile zaya/kernels/c by {command[0]}: {next((line for line in lines if 'error' in line), lines[0])}")
    return done.stdout


def _call(function: str, *arguments: Tensor | int | float | None) -> None:
    """A function in C; None is a null pointer."""
    converted: list[Any] = []
    for index, (letter, argument) in enumerate(zip(SIGNATURES[function], arguments, strict=True)):
        if isinstance(argument, Tensor):
            if argument.dtype != TENSORS[letter] or argument.device != CPU or not argument.is_contiguous() or argument.is_neg():
                raise ValueError(f"argument {index} of {function} is {argument.dtype} of strides {argument.stride()} on {argument.device}, "
                                 f"expected contiguous {TENSORS[letter]} on cpu")
            argument = argument.data_ptr()
        converted.append(argument)
    if getattr(library(), function)(*converted):
        raise MemoryError(f"{function} of zaya/kernels/c got no memory")


def _constant(name: str) -> int:
    """A number that C and the sizes of its buffers share."""
    return ctypes.c_long.in_dll(library(), name).value


def _plain(*tensors: Tensor) -> list[Tensor]:
    """fp32 and contiguous; gradients go back through both."""
    return [tensor.float().contiguous() for tensor in tensors]

# ---------------------------------------------------------------------------------------------------------------- stream


def residual_norm(stream: Tensor, branch: Tensor, scales: tuple[Tensor, Tensor, Tensor, Tensor], norm_weight: Tensor,
                  eps: float) -> tuple[Tensor, Tensor]:
    """See reference.residual_norm. ValueError names a wrong argument."""
    check("stream", stream, dtypes=(torch.float32,), device=CPU, contiguous=False)
    if stream.dim() == 0 or len(scales) != 4:
        raise ValueError(f"stream has shape {tuple(stream.shape)} and {len(scales)} scales, expected a last dim and 4")
    check("branch", branch, shape=tuple(stream.shape), dtypes=FLOATS, device=CPU, contiguous=False)
    for name, vector in (*((f"scales[{index}]", scale) for index, scale in enumerate(scales)), ("norm_weight", norm_weight)):
        check(name, vector, shape=(stream.shape[-1],), dtypes=FLOATS, device=CPU, contiguous=False)
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
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stream, branch, inverse_rms, a_h, b_h, a_x, b_x, weight = ctx.saved_tensors
        rows, D = inverse_rms.numel(), stream.shape[-1]
        dstream, dbranch = torch.empty_like(stream), torch.empty_like(branch)
        sums = stream.new_empty(-(-rows // _constant("rows_of_a_block")), 4, D)
        _call("residual_norm_backward", stream, branch, inverse_rms, a_h, b_h, a_x, b_x, weight, *_plain(*gradients), dstream, dbranch,
              sums, rows, D)
        total, of_branch, of_stream, dweight = sums.sum(0)
        return dstream, dbranch, b_h * total + of_branch, a_h * total, b_x * total + of_stream, a_x * total, dweight, None

# ---------------------------------------------------------------------------------------------------------------- attention


def cca(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, q_mean_BTGH: Tensor | None, q_convs: tuple[Tensor, Tensor, Tensor, Tensor],
        k_convs: tuple[Tensor, Tensor, Tensor, Tensor], temperature_G: Tensor, positions_BT: Tensor, rope: tuple[Tensor, Tensor],
        halos: tuple[Tensor, Tensor, Tensor], delayed_rows: tuple[int, int],
        begin: Callable[[Tensor, Tensor], None] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.cca. ValueError names a wrong argument."""
    arguments = (q_BTC, k_BTC, v_BTC, q_mean_BTGH, q_convs, k_convs, temperature_G, positions_BT, rope, halos, delayed_rows)
    check("q_BTC", q_BTC, device=CPU, contiguous=False)
    check_cca(*arguments, contiguous=False)
    return reference.cca_by(_mix, *arguments, begin)


def _mix(x: Tensor, other: Tensor, kernel: Tensor, constant: Tensor, temperature: Tensor | None, halo: Tensor, keeps: list[Tensor],
         rope: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """See reference._MixNormRotate."""
    temperatures = [None] if temperature is None else _plain(temperature)
    mixed: Tensor = _MixNormRotate.apply(*_plain(x, other, kernel, constant), *temperatures, *_plain(halo, *keeps, *rope), eps)
    return mixed


class _MixNormRotate(torch.autograd.Function):
    """Saves x, e and r, as the reference does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, kernel: Tensor, constant: Tensor, temperature: Tensor | None, halo: Tensor,
                *rest: Any) -> Tensor:
        *tables, eps = rest  # keep_1, keep_2, cosine, sine
        (B, T, G, H), N = other.shape, len(constant)
        unit, out, inverse = x.new_empty(B, T, N, H), x.new_empty(B, T, N, H), x.new_empty(B, T, N)
        _call("mix_forward", x, other, kernel, constant, temperature, halo, *tables, eps, unit, inverse, out, B, T, N, G, H, halo.shape[1])
        ctx.save_for_backward(x, kernel, temperature, halo, unit, inverse, *tables)
        ctx.groups = G
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, temperature, halo, unit, inverse, *tables = ctx.saved_tensors
        (B, T, N, H), K = unit.shape, halo.shape[1]
        dx, dother, dhalo = torch.empty_like(x), torch.empty_like(unit), torch.empty_like(halo)
        parts = x.new_empty(B * K, N, 3 * H, H), x.new_empty(B * K, N, H), None if temperature is None else x.new_empty(B * K, N)
        transposed = kernel.view(N, 3, H, H).mT.contiguous()
        _call("mix_backward", x, transposed, temperature, halo, *tables, unit, inverse, *_plain(*gradients), dx, dother, *parts,
              dhalo, B, T, N, H, K)
        dkernel, dconstant, dtemperature = (None if part is None else part.sum(0) for part in parts)
        return dx, dother.unflatten(2, (ctx.groups, -1)).sum(3), dkernel, dconstant, dtemperature, dhalo, *[None] * 5


def attention(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, first_key_BT: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """See reference.attention. A query sees itself at least, whatever its first key. ValueError names a wrong argument."""
    check("q_BTNH", q_BTNH, device=CPU, contiguous=False)
    check_attention(q_BTNH, k_BSGH, v_BSGH, first_key_BT, offsets)
    out: Tensor = _Attention.apply(*_plain(q_BTNH, k_BSGH, v_BSGH), first_key_BT.long().contiguous(), torch.tensor(offsets))
    return out.to(q_BTNH.dtype)


class _Attention(torch.autograd.Function):
    """Saves q, k, v, the output, and of each row's scores the largest and one over the sum of exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, offsets: Tensor) -> Tensor:
        (B, T, N, H), (S, G) = q.shape, k.shape[1:3]
        out, softmax = torch.empty_like(q), q.new_empty(B, T, N, 2)
        _call("attention_forward", q, k, v, first_key, offsets, out, softmax, B, T, S, N, G, H, len(offsets))
        ctx.save_for_backward(q, k, v, first_key, offsets, out, softmax)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_key, offsets, out, softmax = ctx.saved_tensors
        (B, T, N, H), (S, G) = q.shape, k.shape[1:3]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _call("attention_backward", q, k, v, first_key, offsets, out, softmax, *_plain(*gradients), dq, dk, dv, B, T, S, N, G, H,
              len(offsets))
        return dq, dk, dv, None, None

# ---------------------------------------------------------------------------------------------------------------- experts


def experts(x_TD: Tensor, sizes_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, order_R: Tensor | None = None,
            gate_Tk: Tensor | None = None, gradient_sums: ExpertSums | None = None) -> Tensor:
    """See reference.experts, which computes what C does not: all but fp32, and other widths than multiples of 32. ValueError names a wrong
    argument."""
    x_TD, gate_up_EFD, down_EDF, sizes_E = (tensor.contiguous() for tensor in (x_TD, gate_up_EFD, down_EDF, sizes_E))
    order_R, gate_Tk = (None if tensor is None else tensor.contiguous() for tensor in (order_R, gate_Tk))
    check("x_TD", x_TD, device=CPU)
    check_experts(x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk, gradient_sums)
    rows, sizes = len(x_TD) if gate_Tk is None else gate_Tk.numel(), sizes_E.tolist()
    if any(size < 0 for size in sizes) or sum(sizes) > rows:
        raise ValueError(f"sizes_E is {sizes}, expected counts of together at most {rows} rows")
    if order_R is not None and not torch.equal(order_R.sort().values, torch.arange(rows, dtype=torch.int32)):
        raise ValueError(f"order_R holds other numbers than each of 0 to {rows - 1} once")
    if x_TD.dtype != torch.float32 or any(width % 32 for width in down_EDF.shape[1:]):
        return reference.experts(x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk, gradient_sums)
    y_TD: Tensor = _Experts.apply(x_TD, gate_up_EFD, down_EDF, gate_Tk, order_R, sizes_E.long(), gradient_sums)
    return y_TD


class _Experts(torch.autograd.Function):
    """Saves x and gate | up, by shares of an expert's rows, not the activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, gate: Tensor | None, order: Tensor | None, sizes: Tensor,
                gradient_sums: ExpertSums | None) -> Tensor:
        (T, D), (E, _, F), tokens = x.shape, down.shape, _constant("tokens_of_a_share")
        k = 1 if gate is None else gate.shape[1]
        hidden, y = x.new_empty(int((sizes + (tokens - 1)).div(tokens, rounding_mode="floor").sum()), 2 * F, tokens), x.new_empty(T, k, D)
        _call("experts_forward", x, sizes, gate_up, down, order, gate, hidden, y, T * k, k, E, D, F)
        ctx.save_for_backward(x, gate_up, down, gate, order, sizes, hidden)
        ctx.gradient_sums = gradient_sums
        return y.sum(1) if k > 1 else y[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, gate, order, sizes, hidden = ctx.saved_tensors
        (T, D), (E, _, F), (shares, _, tokens) = x.shape, down.shape, hidden.shape
        k = 1 if gate is None else gate.shape[1]
        sums = ctx.gradient_sums or ExpertSums.temporary(gate_up, down)
        dx, dgate = x.new_empty(T, k, D), None if gate is None else torch.empty_like(gate)
        work = torch.empty_like(hidden), x.new_empty(shares, D, tokens), x.new_empty(shares, tokens, D), x.new_empty(shares, tokens, F)
        adds = [not gradient_sum.first() for gradient_sum in sums]
        _call("experts_backward", x, sizes, gate_up, down, order, gate, hidden, *_plain(*gradients), *work, dx, dgate,
              *(gradient_sum.total for gradient_sum in sums), *adds, T * k, k, E, D, F)
        dweights = (gradient_sum.for_autograd(x.dtype) for gradient_sum in sums)
        return dx.sum(1) if k > 1 else dx[:, 0], *dweights, dgate, None, None, None

# ---------------------------------------------------------------------------------------------------------------- loss


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float = 0.0, *, vocab_start: int = 0,
                  combine: Callable[[reference.Partials], reference.Partials] = reference.whole,
                  gradient_sum: GradientSum | None = None) -> Tensor:
    """See reference.cross_entropy. ValueError names a wrong argument."""
    check("hidden_TD", hidden_TD, shape=(None, None), dtypes=FLOATS, device=CPU, contiguous=False)
    T, D = hidden_TD.shape
    check("weight_VD", weight_VD, shape=(None, D), dtypes=(hidden_TD.dtype,), device=CPU, contiguous=False)
    check("labels_T", labels_T, shape=(T,), dtypes=(torch.int64, torch.int32), device=CPU, contiguous=False)
    if not len(weight_VD):
        raise ValueError(f"weight_VD has shape {tuple(weight_VD.shape)}, expected at least one row")
    return reference.cross_entropy_by(_partials, hidden_TD, weight_VD, labels_T.long(), z_loss, vocab_start, combine, gradient_sum)


def _partials(logits_TV: Tensor, labels_T: Tensor, vocab_start: int, probs_TV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.cross_entropy_partials; the softmax takes the logits' place."""
    largest, total, target = logits_TV.new_empty(3, len(logits_TV))
    _call("cross_entropy_partials", logits_TV, labels_T - vocab_start, largest, total, target, *logits_TV.shape)
    return largest, total, target, logits_TV
