"""What ops say of a wrong argument, before anything is computed from it."""

from __future__ import annotations

import torch


def check(name: str, tensor: torch.Tensor, *, shape: tuple[int | None, ...] | None = None, dtypes: tuple[torch.dtype, ...] = (),
          device: torch.device | None = None, contiguous: bool = True) -> None:
    """ValueError, naming argument, got and expected, where `tensor` is not what a kernel needs; None in shape fits any size."""
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {_words(tensor.dtype)}, expected {' or '.join(map(_words, dtypes))}")
    if shape is not None and (tensor.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape))):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({expected})")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} lies on {tensor.device}, expected {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous memory (shape {tuple(tensor.shape)})")


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
