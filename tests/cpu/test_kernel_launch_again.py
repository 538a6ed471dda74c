"""The second launch of a kernel goes past Triton's own search for what it has compiled: it must find the same, and be quicker.

Each test runs in a Python of its own: in this one Triton is an interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERY_LAUNCH = """
import torch
from tools.kernel_report import of_cases, of_training
from zaya.kernels import cases, launch, machine_code

built = {}

def compare(kernel, grid, everything, config):
    key = id(kernel), id(config), *launch.specialisation(kernel, [everything[name] for name in kernel.arg_names])
    build = machine_code.specialise(kernel, everything, config.options(launch.MI300X)).key
    assert built.setdefault(key, build) == build, (kernel, key)

with launch.launching_through(compare):
    for _, run in [*of_cases(cases.cases(cases.CHIP)), *of_training()]:
        run()
    for case in cases.cases(cases.SMALL):
        for dtype in case.dtypes:
            cases.run(case.op, case.make(torch.device("cpu"), dtype), case.gradients)
print(len(built), len(set(built.values())))
"""


def test_equal_keys_mean_equal_machine_code_in_every_launch_of_ours() -> None:
    """Of training, chip and small cases; and at most 2 % more keys than Triton has builds, or the host would search for nothing."""
    keys, builds = map(int, run(EVERY_LAUNCH).split())
    assert keys > 500 and keys <= 1.02 * builds


KERNEL = '''
import time
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from zaya.kernels import launch, machine_code
from zaya.kernels.adamw import _adamw_kernel as kernel
'''

ODD_VALUES = KERNEL + """
names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
fixed = {parameter.name: 1 for parameter in kernel.params if parameter.is_constexpr}
whole = torch.zeros(64)
values = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 16, -2**31, -2**31 - 1, 2**63 - 16, 2**63 - 1, 2**63,
          2**64 - 16, True, False, None, 1.0, 16.0, 0.5, whole, whole[1:], whole[4:], whole.double(), torch.empty(2**29 - 1, device="meta"),
          torch.empty(2**29, device="meta"), torch.empty(2**29 + 8, device="meta")[8:]]
built = {}
constexpr = next(iter(fixed))
for name, value in [*((names[0], value) for value in values), *((constexpr, value) for value in (1, True, 1.0, 0, False, "a", None))]:
    everything = {**dict.fromkeys(names, 3), **fixed, name: value}
    key = tuple(launch.specialisation(kernel, [everything[name] for name in kernel.arg_names]))
    build = machine_code.specialise(kernel, everything, {"num_warps": 4}).key
    assert built.setdefault(key, build) == build, value
print(len(built))
"""


def test_equal_keys_mean_equal_machine_code_for_values_at_every_border() -> None:
    assert int(run(ODD_VALUES)) >= 20


AGAIN = KERNEL + """
class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)
    get_current_target = staticmethod(lambda: GPUTarget("hip", "gfx942", 64))

class Built(CompiledKernel):  # that notes what a chip would be given
    def __init__(self):
        self.function, self.packed_metadata, self.name, self.src = 5, (), "built", None

    def _init_handles(self):
        pass

    @property
    def run(self):
        return lambda *arguments: ran.append(arguments)

def compile(self, key, signature, device, *rest):
    compiled.append(signature)
    self.device_caches[device][0][key] = built = Built()
    return built

ran, compiled = [], []
JITFunction._do_compile = compile
driver.set_active(Driver())
torch.cuda.current_device = lambda: None  # as tensors of the CPU have no index
launch.target = lambda device: launch.MI300X
settings = launch.Config({"BLOCK": 1024}, num_warps=4)
def tensors(n):
    return {parameter.name: torch.zeros(n) for parameter in kernel.params if not parameter.is_constexpr}
rest = {parameter.name: 1 for parameter in kernel.params if parameter.is_constexpr and parameter.name != "BLOCK"}

def step(n=64, start=0):
    launch.launch(kernel, (3,), {**{name: t[start:] for name, t in tensors(n).items()}, **rest}, settings)

step()
run, JITFunction.run = JITFunction.run, None
step()  # without it
JITFunction.run = run
assert len(ran) == 2 and len(compiled) == 1
plain = [[a.shape if isinstance(a, torch.Tensor) else a for a in arguments if not callable(a)] for arguments in ran]
assert plain[0][:4] == plain[1][:4] == [3, 1, 1, 7] and plain[0][-len(kernel.arg_names):] == plain[1][-len(kernel.arg_names):]
step(start=1), step(start=1)
assert len(compiled) == 2, "other alignment, other machine code"
hooked = []
kernel.pre_run_hooks.append(lambda *_, **__: hooked.append(1))
step()
assert hooked == [1]
kernel.pre_run_hooks.clear()

def microseconds(call, times=300):
    best = 1e9
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(times):
            call()
        best = min(best, (time.perf_counter() - began) / times * 1e6)
    return best

arguments = {**tensors(64), **rest}
options = settings.options(launch.MI300X)
print(microseconds(lambda: launch.launch(kernel, (3,), arguments, settings)),
      microseconds(lambda: kernel[(3,)](**arguments, **settings.blocks, **options)))
"""


def test_a_second_launch_is_the_same_and_leaves_tritons_search_out() -> None:
    """With a driver and a compiler that only note what they are given."""
    ours, tritons = map(float, run(AGAIN).split())
    print(f"{ours:.1f} us a launch, Triton's own {tritons:.1f}")
