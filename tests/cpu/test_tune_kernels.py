"""tools.tune_kernels: which candidates it tries, which one wins, what it writes. In a Python of its own, which can compile kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_candidates_scores_and_file(tmp_path: Path) -> None:
    result = run("-c", textwrap.dedent(f"""
        import pathlib
        from tools import tune_kernels as tune

        entry = {{"arch": "gfx942", "blocks": {{"BLOCK_M": 64, "GROUP": 1}}, "num_warps": 16, "num_stages": 1, "figures": "old"}}
        found = [(c["blocks"]["BLOCK_M"], c["blocks"]["GROUP"], c["num_warps"], c["num_stages"]) for c in tune.neighbours(entry)]
        assert found == [(64, 1, 16, 1), (32, 1, 16, 1), (128, 1, 16, 1), (64, 2, 16, 1), (64, 1, 8, 1), (64, 1, 16, 2)], found
        space = tune.parse_space(["BLOCK_M=64,128", "num_warps=4,16", "BLOCK_OTHER=1,2"])
        found = [(c["blocks"], c["num_warps"]) for c in tune.products(entry, space)]
        assert found == [(entry["blocks"], 16), ({{"BLOCK_M": 64, "GROUP": 1}}, 4), ({{"BLOCK_M": 128, "GROUP": 1}}, 4),
                         ({{"BLOCK_M": 128, "GROUP": 1}}, 16)], found

        assert tune.is_better((1.0, 2.0, 0.90), (1.0, 2.0, 0.80)) and not tune.is_better((0.0, 2.0, 0.99), (1.0, 2.0, 0.10))
        assert not tune.is_better((-1.0,), (-1.01,)) and tune.is_better((-1.0,), (-1.1,))  # 1 % faster is noise, 10 % is not
        never = (-float("inf"),)  # does not run
        assert not tune.is_better(never, (-5.0,)) and tune.is_better((-5.0,), never) and not tune.is_better(never, never)
        assert not tune.is_better((1.0, 1.0), (1.0, 1.0))

        tune.TABLE = pathlib.Path({str(tmp_path)!r}, "configs.json")
        tune.TABLE.write_text('{{"_a_kernel": [{{"arch": "gfx942"}}, {{"arch": "sm_90"}}], "_b_kernel": []}}')
        tune.write({{("_a_kernel", 1): entry}})
        lines = tune.TABLE.read_text().splitlines()
        assert lines[:3] == ["{{", '  "_a_kernel": [', '    {{"arch": "gfx942"}},'] and '"GROUP": 1' in lines[3], lines
        assert [path.name for path in tune.TABLE.parent.iterdir()] == ["configs.json"]
    """))
    assert result.returncode == 0, result.stderr


def test_all_kernels_of_an_op_are_tried_at_once_and_what_does_not_fit_never() -> None:
    """On a GPU that is played: its compiler is the real one; its clock likes many warps."""
    result = run("-c", textwrap.dedent("""
        import dataclasses, types
        import torch, triton
        from triton.backends.compiler import GPUTarget
        from tools import tune_kernels as tune
        from zaya.kernels import cases, launch, machine_code, trials

        chip, gpu, cpu = launch.Target("sm_90", num_cus=132), GPUTarget("cuda", 90, 32), torch.device("cpu")

        class Clock:
            def by_launch(self, call, rounds):
                with machine_code.recording(chip, gpu) as noted:
                    call()
                assert all(config.num_warps < 16 for _, config in noted), "a misfit is launched"
                return {(build.kernel, id(config.blocks)): 8.0 / config.num_warps for build, config in noted}

        shared = {"max_shared_mem": 228 * 1024}
        triton.runtime.driver.set_active(types.SimpleNamespace(
            get_current_target=lambda: gpu, utils=types.SimpleNamespace(get_device_properties=lambda index: shared)))
        torch.cuda.current_device, torch.cuda.get_device_name, trials.Clock = lambda: 0, lambda: "played", Clock
        launch._gpu = lambda index: chip
        compiles = trials.misfit
        def misfit(build, *limits):
            return "too many warps" if build.num_warps == 16 else compiles(build, *limits)
        trials.misfit = misfit
        class InThisProcess:  # so that the misfit above is the one that is asked
            def __init__(self, *arguments): pass
            def __enter__(self): return self
            def __exit__(self, *arguments): pass
            map = staticmethod(map)
        machine_code.process_pool = InThisProcess

        case = next(case for case in cases.cases() if case.name == "rms_norm small 4096")
        case = dataclasses.replace(case, make=lambda device, dtype, make=case.make: make(cpu, dtype))
        with launch.launching_through(lambda *launched: None, chip):
            entries = tune.used_entries(launch._table(), chip, [case], None)
            candidates = {entry: list(tune.products(launch._table()[entry[0]][entry[1]], {"num_warps": [4, 8, 16]})) for entry in entries}
            scores = trials.measured_scores(candidates, [case])
        assert {kernel for kernel, _ in entries} == {"_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel", "_rms_norm_bwd_weight_kernel"}
        for entry, each in candidates.items():
            for candidate, ((score,), words) in zip(each, scores[entry]):
                warps = candidate["num_warps"]
                assert score == (-8.0 / warps if warps < 16 else -float("inf")), (entry, candidate, score, words)
                assert words == ("too many warps" if warps == 16 else f"measured: {8 / warps:.3f} ms, played, rms_norm small 4096"), words
            assert launch._table()[entry[0]][entry[1]] is each[0], "the table is left as it was"
    """))
    assert result.returncode == 0, result.stderr


def test_the_table_is_written_as_it_stands() -> None:
    """So that a change of one entry is a change of one line."""
    result = run("-c", "import pathlib, tempfile\nfrom tools import tune_kernels as tune\ntext = tune.TABLE.read_text()\n"
                       "tune.TABLE = pathlib.Path(tempfile.mkdtemp(), 'configs.json')\ntune.TABLE.write_text(text)\ntune.write({})\n"
                       "assert tune.TABLE.read_text() == text")
    assert result.returncode == 0, result.stderr


def test_an_op_is_ranked_by_its_machine_code() -> None:
    before = (ROOT / "zaya/kernels/configs.json").read_bytes()
    result = run("-m", "tools.tune_kernels", "--op", "adamw 8b embedding shard ragged", "--arch", "gfx942", "--space", "num_warps=2,4",
                 "--dry-run")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()[:2]
    assert "* wins: by machine code: no failed gate" in first and "less than 2% decides nothing" in first and "gfx942" in second
    assert "_adamw_kernel gfx942" in result.stdout and "warps 2" in result.stdout and "VGPRs" in result.stdout
    assert result.stdout.count("\n * ") == 1 and (ROOT / "zaya/kernels/configs.json").read_bytes() == before


def test_wrong_calls_are_one_line() -> None:
    for words, message in ((["--op", "nonsense"], "no chip case"), (["--op", "adamw", "--space", "BLOCK"], "NAME=NUMBER"),
                           (["--op", "adamw", "--arch", "gfx90a"], "gfx90a"), (["--op", "adamw", "--kernel", "_x_kernel"], "_x_kernel")):
        result = run("-m", "tools.tune_kernels", *words)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
