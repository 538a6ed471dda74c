"""Floating-point operations of the model, by formula: the numerator of MFU. Two per multiply-add; elementwise work is not counted.

Tested against torch's FLOP counter on the real model (tests/cpu/test_model.py). Knows shapes only.
"""

from __future__ import annotations

from zaya.config import ModelConfig

BACKWARD = 2  # each product has two gradients, each as large as itself
PEAK_BF16 = {  # dense, without sparsity, from the makers' data sheets
    "MI300X": 1307.4e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
}
SLOWER = ("PCIe", "NVL")  # boards of the same names with other clocks


def forward_flops_per_token(config: ModelConfig, keys: dict[str, float]) -> float:
    """One token through every block and the head; keys: how many keys its query meets, per kind of attention."""
    D, H, N, G = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    R, C = config.router_hidden_size, config.num_router_classes
    projections = D * H * (N + 2 * G) + N * H * D
    convolutions = 3 * H * H * (N + G)  # both convolutions are one of width 3 (kernels/reference.py)
    router = D * R + 2 * R * R + R * C
    expert = 3 * D * config.moe_intermediate_size  # gate, up, down; one expert per token
    blocks = config.num_layers * (projections + convolutions + router + expert)
    attention = sum(2 * N * H * keys[config.attention_kind(block)] for block in range(config.num_layers))  # scores and values
    return 2 * (blocks + attention + D * config.vocab_size)


def causal_keys(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Mean number of keys a query sees in an unpacked row of seq_len tokens, per kind of attention: what the mask leaves to compute."""
    window = min(config.sliding_window or seq_len, seq_len)
    return {"full": (seq_len + 1) / 2, "sliding": window - window * (window - 1) / (2 * seq_len)}


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward of one token in a row of seq_len; recomputation is not counted, nor a row's document borders."""
    return (1 + BACKWARD) * forward_flops_per_token(config, causal_keys(config, seq_len))


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s by its name; None where unknown."""
    if any(board in device_name for board in SLOWER):
        return None
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
