"""Dtypes by name: a recipe's names, and safetensors', which checkpoints use."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""What a model can be trained and exported in, by config.DTYPES' names."""
STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
"""What a checkpoint can hold."""
STORED_FLOATS = {name: dtype for name, dtype in STORED_DTYPES.items() if dtype.is_floating_point}
STORED_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer dtype of each width: bytes pass through numpy as these, because it has no bfloat16."""
