"""tools.plan_layout: the numbers of the published models, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools.plan_layout import main

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes/zaya1_8b_pretrain1.toml")


def test_the_8b_on_1024_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([RECIPE, "--ranks", "1024", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    memory, sent = numbers["memory_bytes"], numbers["sent_bytes_per_step"]
    parameters = 8_840_488_784
    # bf16 parameters and fp32 gradients everywhere, masters and one or two moments cut over all; padding is below a thousandth.
    assert memory["parameters"] == pytest.approx(2 * parameters, rel=1e-3)
    assert memory["gradients"] == pytest.approx(4 * parameters, rel=1e-3)
    assert memory["master weights"] == pytest.approx(4 * parameters / 1024, rel=1e-3)
    assert sent["reduce_scatter over all holders"] == pytest.approx(4 * parameters * 1023 / 1024, rel=1e-3)
    assert sent["all_gather over all holders"] == pytest.approx(2 * parameters * 1023 / 1024, rel=1e-3)
    assert sent["all_to_all over all exchange"] < 2 * 2 * 2 * parameters / 1024, "Muon sends little more than a shard each way, in bf16"


def test_bf16_sums_halve_the_gradients_traffic_and_ep_cuts_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def numbers(*flags: str) -> dict[str, dict[str, int]]:
        assert main([RECIPE, "--ranks", "1024", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    whole, narrow, ep = numbers(), numbers("--parallel.grad_dtype=bf16"), numbers("--parallel.ep=8")
    key = "reduce_scatter over all holders"
    assert narrow["sent_bytes_per_step"][key] * 2 == whole["sent_bytes_per_step"][key]
    assert ep["memory_bytes"]["parameters"] < 0.25 * whole["memory_bytes"]["parameters"]


def test_a_tiny_model_has_sizes_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "recipes/quickstart.toml"), "--ranks", "2", "--model.hidden_size=32", "--model.vocab_size=512",
                 "--model.num_layers=2", "--model.moe_intermediate_size=32", "--model.router_hidden_size=16"]) == 0
    out = capsys.readouterr().out
    sizes = dict(re.findall(r"^  (.+?)  +([0-9.]+ [kMG]?B)", out, flags=re.MULTILINE))
    assert sizes.keys() >= {"parameters", "gradients", "activations", "all_gather over all holders", "in all"}
    assert sizes["parameters"].endswith(" kB") and not [what for what, words in sizes.items() if float(words.split()[0]) == 0
                                                         and what != "master weights"], out


def test_what_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([RECIPE, "--ranks", "1024", "--gpu-gb", "24"]) == 1
    assert "does NOT fit 24 GB" in capsys.readouterr().out
    for flags, says in ((["--ranks", "0"], "outside 1 to"), (["--ranks", "6", "--parallel.ep=4"], "does not divide the 6 ranks")):
        assert main([RECIPE, *flags]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
