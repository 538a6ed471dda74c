"""What starts a run: settings where they apply, the user's first; NUMA binding; collections on schedule; the Slurm script."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zaya import runtime
from zaya.runtime import SETTINGS, GarbageCollection, Machine, apply, describe

ROOT = Path(__file__).resolve().parents[2]
GFX90A = 90010


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def node(folder: Path, *, archs: tuple[int, ...] = (runtime.GFX942,) * 8, hip: str | None = "7.2.53211",
         cpus: tuple[str, ...] = ("0-3", "4-7"), balancing: str = "1", kfd: bool = True) -> Machine:
    """A made-up node: two CPU sockets, then GPUs, the first half of them beside socket 0."""
    if kfd:
        write(folder / "dev/kfd", "")
    topology = folder / "sys/class/kfd/kfd/topology/nodes"
    for socket, listed in enumerate(cpus):
        write(topology / str(socket) / "properties", "cpu_cores_count 4\nsimd_count 0\ngfx_target_version 0\n")
        write(folder / f"sys/devices/system/node/node{socket}/cpulist", f"{listed}\n")
    for index, arch in enumerate(archs):
        bus = 0x05 + 0x10 * index
        text = (f"cpu_cores_count 0\nsimd_count 1216\ngfx_target_version {arch}\nlocation_id {(bus << 8) + (1 << 3)}\ndomain 0\n"
                f"unique_id {0xabc0 + index}\n") if arch else ""
        write(topology / str(len(cpus) + index) / "properties", text)
        write(folder / f"sys/bus/pci/devices/0000:{bus:02x}:01.0/numa_node", f"{index * len(cpus) // len(archs)}\n")
    write(folder / "proc/sys/kernel/numa_balancing", balancing)
    write(folder / "version.py", f"__version__ = '2.10.0'\ncuda: Optional[str] = None\nhip: Optional[str] = {hip!r}\n")
    return Machine(folder, folder / "version.py")


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[int]]]:
    """The CPUs this process may use, as the code under test sees and sets them."""
    state = [set(range(8))]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(state[-1]))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: state.append(set(cpus)))
    yield state


# ---------------------------------------------------------------------------------------------------------------- environment


def test_an_mi300x_node_gets_every_setting(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    outcomes = apply(environ, node(tmp_path))
    assert environ == {setting.name: setting.value for setting in SETTINGS}
    assert [outcome.state for outcome in outcomes if outcome.name in environ] == ["set"] * len(SETTINGS)
    assert apply(dict(environ), node(tmp_path))[0].value == SETTINGS[0].value


def test_what_mi300x_asks_for_is_there() -> None:
    wanted = {"HSA_NO_SCRATCH_RECLAIM": "1", "HSA_KERNARG_POOL_SIZE": str(12 * 2**20), "GPU_MAX_HW_QUEUES": "2",
              "HIP_FORCE_DEV_KERNARG": "1", "NCCL_MIN_NCHANNELS": "112", "TORCH_NCCL_HIGH_PRIORITY": "1"}
    assert wanted.items() <= {setting.name: setting.value for setting in SETTINGS}.items()
    assert all(setting.reason and setting.source for setting in SETTINGS)
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


def test_what_the_user_has_set_wins(tmp_path: Path) -> None:
    environ = {"GPU_MAX_HW_QUEUES": "4", "NCCL_MIN_NCHANNELS": ""}
    outcomes = {outcome.name: outcome for outcome in apply(environ, node(tmp_path))}
    assert environ["GPU_MAX_HW_QUEUES"] == "4" and environ["NCCL_MIN_NCHANNELS"] == ""
    assert (outcomes["GPU_MAX_HW_QUEUES"].state, outcomes["GPU_MAX_HW_QUEUES"].value) == ("kept", "4")
    assert "GPU_MAX_HW_QUEUES=4 (set by the user)" in str(outcomes["GPU_MAX_HW_QUEUES"])


@pytest.mark.parametrize(("change", "scopes"), [
    (dict(hip=None), set()),  # a torch for CUDA or the CPU on a machine with AMD GPUs
    (dict(kfd=False), set()),  # ROCm's image on a machine without a GPU
    (dict(archs=(0, 0)), set()),  # a container that may use no GPU
    (dict(archs=(GFX90A, GFX90A)), {"rocm"}),
    (dict(archs=(runtime.GFX942, GFX90A)), {"rocm"}),
    (dict(archs=(0, runtime.GFX942)), {"rocm", "mi300x"}),
], ids=["not ROCm", "no driver", "no GPU of ours", "MI250X", "mixed", "one GPU of ours"])
def test_only_what_applies_is_set(tmp_path: Path, change: dict, scopes: set[str]) -> None:
    environ: dict[str, str] = {}
    apply(environ, node(tmp_path, **change))
    assert environ == {setting.name: setting.value for setting in SETTINGS if setting.scope in scopes}


@pytest.mark.parametrize(("line", "hip"), [("hip: Optional[str] = '7.2.53211'", "7.2.53211"), ("hip = '6.4'", "6.4"),
                                           ("hip: Optional[str] = None", None), ("rocm: Optional[str] = '7.2'", None)])
def test_torchs_build_is_read_without_torch(tmp_path: Path, line: str, hip: str | None) -> None:
    write(tmp_path / "version.py", f"__version__ = '2.10.0'\ncuda = '12.8'\n{line}\n")
    assert Machine(tmp_path, tmp_path / "version.py").hip == hip


@pytest.mark.parametrize(("soft", "hard", "after"), [(64, 4096, "4096"), (4096, 4096, "4096")])
def test_a_process_may_open_as_many_files_as_the_machine_allows(soft: int, hard: int, after: str) -> None:
    """1,024 ranks need 3,100; many systems start a process with 1,024."""
    code = (f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\nfrom zaya import runtime\n"
            "print([o for o in runtime.apply({}) if o.name == 'open files'][0].value, *resource.getrlimit(resource.RLIMIT_NOFILE))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.split() == [after, after, str(hard)], done.stderr


def test_nothing_heavy_is_imported_and_torch_is_found() -> None:
    code = ("import sys; from zaya import runtime; runtime.apply({}); m = runtime.Machine(); "
            "print('torch' in sys.modules, runtime._find_torch_version_file().is_file())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_training_process_sets_them_before_torch_is_loaded() -> None:
    code = ("import runpy, sys; from zaya import runtime; runtime.start = lambda program: sys.exit(f'{program} {sorted(sys.modules)}'); "
            "runpy.run_module('zaya.train', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.stderr.startswith("zaya.train ['") and "'torch'" not in done.stderr


def test_the_lines_at_start_say_it_all(tmp_path: Path) -> None:
    machine = node(tmp_path)
    lines = describe(apply({}, machine), machine)
    assert lines[0] == "runtime: torch for HIP 7.2.53211, 8 AMD GPUs, 2 NUMA nodes"
    for setting in SETTINGS:
        assert f"runtime: {setting.name}={setting.value} ({setting.reason})" in lines
    assert any("NUMA balancing is on" in line for line in lines)
    assert not any("\n" in line for line in lines)
    machine = node(tmp_path / "off", balancing="0")
    assert not any("balancing" in line for line in describe(apply({}, machine), machine))


def test_the_document_lists_the_settings_as_they_are() -> None:
    text = (ROOT / "docs/several_nodes.md").read_text()
    rows = [f"| {s.name} | {s.value} | {'MI300X' if s.scope == 'mi300x' else 'ROCm'} | {s.reason} |" for s in SETTINGS]
    assert "\n".join(rows) + "\n\n" in text
    script = (ROOT / "tools/launch_slurm.sh").read_text()
    switches = {runtime.NUMA_SWITCH, runtime.COLLECT_SWITCH, *re.findall(r"\bZAYA_[A-Z_]+", script)} - {"ZAYA_LOGS"}
    assert switches <= set(re.findall(r"\bZAYA_[A-Z_]+", text))
    assert not [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / "docs" / link).exists()]


@pytest.mark.parametrize("switch", ["ZAYA_GC_STEPS=often", "ZAYA_GC_STEPS=-1", "ZAYA_NUMA_BINDING=yes"])
def test_a_bad_switch_is_one_line_and_exit_code_2(switch: str) -> None:
    name, value = switch.split("=")
    environ = {**os.environ, name: value}
    done = subprocess.run([sys.executable, "-m", "zaya.runtime"], capture_output=True, text=True, timeout=60, cwd=ROOT, env=environ)
    assert done.returncode == 2 and done.stderr.startswith(f"zaya.runtime: {name}={value!r}") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------- NUMA


@pytest.mark.parametrize(("environ", "cpus"), [
    ({"LOCAL_RANK": "0"}, {0, 1, 2, 3}),
    ({"LOCAL_RANK": "3"}, {0, 1, 2, 3}),
    ({"LOCAL_RANK": "4"}, {4, 5, 6, 7}),
    ({"LOCAL_RANK": "0", "HIP_VISIBLE_DEVICES": "7,0"}, {4, 5, 6, 7}),
    ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "0,6"}, {4, 5, 6, 7}),
    ({"LOCAL_RANK": "0", "ROCR_VISIBLE_DEVICES": "5,6,7", "HIP_VISIBLE_DEVICES": "2"}, {4, 5, 6, 7}),
    ({"LOCAL_RANK": "0", "ROCR_VISIBLE_DEVICES": "GPU-000000000000abc6"}, {4, 5, 6, 7}),
])
def test_a_worker_is_bound_beside_its_gpu(tmp_path: Path, affinity: list[set[int]], environ: dict[str, str], cpus: set[int]) -> None:
    outcome = next(outcome for outcome in apply(environ, node(tmp_path)) if outcome.name == runtime.NUMA_SWITCH)
    assert outcome.state == "set" and affinity[-1] == cpus and len(affinity) == 2


def test_a_container_without_gpu_0_counts_from_its_first(tmp_path: Path, affinity: list[set[int]]) -> None:
    machine = node(tmp_path, archs=(0, 0, 0, 0, *[runtime.GFX942] * 4))
    assert len(machine.gpus) == 4
    apply({"LOCAL_RANK": "0"}, machine)
    assert affinity[-1] == {4, 5, 6, 7}


def test_a_narrower_set_of_cpus_stays_inside(tmp_path: Path, affinity: list[set[int]]) -> None:
    affinity[-1] = {2, 3, 6}
    apply({"LOCAL_RANK": "4"}, node(tmp_path))
    assert affinity[-1] == {6}


@pytest.mark.parametrize(("environ", "change", "before", "says"), [
    ({}, {}, set(range(8)), "LOCAL_RANK"),
    ({"LOCAL_RANK": "0"}, dict(cpus=("0-7",)), set(range(8)), "1 NUMA node"),
    ({"LOCAL_RANK": "8"}, {}, set(range(8)), "8 AMD GPUs are visible"),
    ({"LOCAL_RANK": "0"}, dict(kfd=False), set(range(8)), "0 AMD GPUs are visible"),
    ({"LOCAL_RANK": "0", "HIP_VISIBLE_DEVICES": "9"}, {}, set(range(8)), "no GPU of this node is '9'"),
    ({"LOCAL_RANK": "4"}, {}, {0, 1}, "set by the user"),  # numactl, taskset or torchrun --numa-binding came first
    ({"LOCAL_RANK": "4", "ZAYA_NUMA_BINDING": "off"}, {}, set(range(8)), "set by the user"),
], ids=["no worker", "one node", "no such GPU", "no GPU", "hidden badly", "bound already", "switched off"])
def test_binding_is_left_out_and_says_why(tmp_path: Path, affinity: list[set[int]], environ: dict[str, str], change: dict, before: set[int],
                                          says: str) -> None:
    affinity[-1] = before
    outcome = next(outcome for outcome in apply(environ, node(tmp_path, **change)) if outcome.name == runtime.NUMA_SWITCH)
    assert len(affinity) == 1 and says in str(outcome)


# ---------------------------------------------------------------------------------------------------------------- garbage


class Knot:
    """A cycle: only the collector frees it."""

    alive = 0

    def __init__(self) -> None:
        self.self = self
        Knot.alive += 1

    def __del__(self) -> None:
        Knot.alive -= 1


def test_garbage_is_collected_at_the_given_steps_and_at_no_other() -> None:
    Knot.alive = 0
    with GarbageCollection(steps=3) as garbage:
        assert not gc.isenabled()
        alive = []
        for step in range(1, 8):
            Knot()
            [object() for _ in range(2000)]  # far beyond the threshold of Python's own collections
            garbage.step(step)
            alive.append(Knot.alive)
    assert alive == [1, 2, 0, 1, 2, 0, 1]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_zero_steps_leave_the_collector_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZAYA_GC_STEPS", "0")
    with GarbageCollection() as garbage:
        assert gc.isenabled() and gc.get_freeze_count() == 0 and garbage.steps == 0
    monkeypatch.delenv("ZAYA_GC_STEPS")
    assert GarbageCollection().steps == 50


def test_the_collector_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), GarbageCollection(steps=1):
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0


# ---------------------------------------------------------------------------------------------------------------- Slurm

SCRIPT = ROOT / "tools/launch_slurm.sh"
FAKES = {
    # scontrol show hostnames LIST | scontrol requeue JOB
    "scontrol": '''
        if [[ $1 == show ]]; then for i in $(seq 1 200); do echo "host$i"; done; else echo "$*" >> "$FAKE_LOG"; fi''',
    # One task a node, its output in its file, SIGTERM to all tasks, the highest exit code; options before `bash` are written down.
    "srun": '''
        while [[ $1 != bash ]]; do
            echo "srun $1" >> "$FAKE_LOG"
            case $1 in --output=*) output=${1#--output=};; --nodes=*) nodes=${1#--nodes=};; esac
            shift
        done
        for ((n = 0; n < nodes; n++)); do
            SLURM_PROCID=$n "$@" > "${output/\\%t/$n}" 2>&1 &
            tasks+=($!)
        done
        trap 'kill -TERM "${tasks[@]}"' TERM
        code=0
        for task in "${tasks[@]}"; do
            while true; do wait "$task"; got=$?; kill -0 "$task" 2> /dev/null || break; done
            wait "$task"; got=$?
            ((got > code)) && code=$got
        done
        exit "$code"''',
    # The supervisor: once. The node FAKE_UNFIT is unfit.
    "python3": '''
        [[ "$1 $2 $3 $5" == "-m zaya.resilience.supervisor --report --" ]] || exit 99
        echo "supervised" >> "$FAKE_LOG"
        nodes=($(grep -o "nodelist=.*" "$FAKE_LOG" | tail -n 1 | cut -d= -f2 | tr , " "))
        if [[ " ${FAKE_UNFIT:-} " == *" ${nodes[SLURM_PROCID]} "* ]]; then
            echo "{\\"code\\": 4, \\"host\\": \\"x\\", \\"cause\\": \\"cuda:3: wrong\\"}" > "$4"
            exit 4
        fi
        exec "${@:6}"''',
    "torchrun": '''
        echo "torchrun $*" >> "$FAKE_LOG"
        if [[ -n ${FAKE_SLEEP:-} ]]; then
            trap 'echo stopped >> "$FAKE_LOG"; exit 1' TERM
            touch "$FAKE_LOG.on"; sleep "$FAKE_SLEEP" & wait
        fi
        if [[ " $* " == *" --node-rank 1 "* ]]; then echo "${FAKE_WORDS:-Traceback (most recent call last)}"; exit "${FAKE_CODE:-0}"; fi''',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job of 2 nodes, with stand-ins for Slurm and torchrun that write down how they were called."""
    for name, body in FAKES.items():
        write(tmp_path / "bin" / name, f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE_LOG": str(tmp_path / "calls"), "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "host[1-200]", "SLURM_CPUS_ON_NODE": "96"}


def launch(folder: Path, environ: dict[str, str], *arguments: str) -> tuple[int, str, list[str]]:
    """(exit code, stderr, the stand-ins' calls) of the script."""
    done = subprocess.run([SCRIPT, *arguments], env=environ, cwd=folder, capture_output=True, text=True, timeout=60)
    calls = Path(environ["FAKE_LOG"])
    return done.returncode, done.stderr, sorted(calls.read_text().splitlines()) if calls.exists() else []


def test_the_script_starts_one_torchrun_a_node(tmp_path: Path, slurm: dict[str, str]) -> None:
    code, err, calls = launch(tmp_path, slurm, "recipe.toml", "--train.steps=1 0")
    assert code == 0, err
    common = "--nproc-per-node 8 --master-addr host1 --master-port 23456 -m zaya.train recipe.toml --train.steps=1 0"
    assert [call for call in calls if call.startswith("torchrun")] == [f"torchrun --nnodes 2 --node-rank {n} {common}" for n in (0, 1)]
    assert {"srun --kill-on-bad-exit=1", "srun --cpu-bind=none", "srun --cpus-per-task=96", "srun --ntasks-per-node=1"} <= set(calls)
    assert calls.count("supervised") == 2
    assert sorted(path.name for path in (tmp_path / "runs/slurm-123456/attempt-0").iterdir()) == ["node-0.log", "node-1.log"]


def test_the_environments_torchrun_goes_first(tmp_path: Path, slurm: dict[str, str]) -> None:
    write(tmp_path / ".venv/bin/torchrun", '#!/usr/bin/env bash\necho "own" >> "$FAKE_LOG"\n')
    write(tmp_path / ".venv/bin/python", '#!/usr/bin/env bash\nexec python3 "$@"\n')
    for name in ("torchrun", "python"):
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    assert launch(tmp_path, slurm, "recipe.toml")[2].count("own") == 2


def test_a_nodes_failure_is_the_jobs(tmp_path: Path, slurm: dict[str, str]) -> None:
    code, err, calls = launch(tmp_path, {**slurm, "FAKE_CODE": "3"}, "recipe.toml")
    assert code == 3 and "node-1.log:1:Traceback" in err and not any("requeue" in call for call in calls)


def test_the_first_error_is_the_workers_own_line(tmp_path: Path, slurm: dict[str, str]) -> None:
    words = "W1126 torchrun\nzaya.train: cannot read recipe\nTraceback (most recent call last)"
    err = launch(tmp_path, {**slurm, "FAKE_CODE": "1", "FAKE_WORDS": words}, "recipe.toml")[1]
    assert "node-1.log:2:zaya.train: cannot read recipe" in err and "Traceback" not in err


def spared(folder: Path, slurm: dict[str, str], spares: int, unfit: str) -> tuple[int, str, list[str]]:
    """2 nodes train, of host1 to host4 as many as spares say; the exit code, stderr, and on which nodes each start was."""
    write(folder / "bin/scontrol", f'#!/usr/bin/env bash\nfor i in $(seq {2 + spares}); do echo host$i; done\n')
    environ = {**slurm, "SLURM_JOB_NUM_NODES": str(2 + spares), "ZAYA_SPARE_NODES": str(spares), "FAKE_UNFIT": unfit}
    code, err, calls = launch(folder, environ, "recipe.toml")
    return code, err, [call.removeprefix("srun --nodelist=") for call in calls if "nodelist" in call]


@pytest.mark.parametrize(("spares", "unfit", "code", "starts"), [
    (1, "host2", 0, ["host1,host2", "host1,host3"]),
    (2, "host1", 0, ["host1,host2", "host2,host3"]),  # the others' meeting point
    (2, "host1 host2", 0, ["host1,host2", "host3,host4"]),
    (2, "host2 host3", 0, ["host1,host2", "host1,host3", "host1,host4"]),
    (1, "host2 host3", 4, ["host1,host2", "host1,host3"]),
    (0, "host2", 4, ["host1,host2"]),
])
def test_a_spare_node_takes_the_place_of_an_unfit_one(tmp_path: Path, slurm: dict[str, str], spares: int, unfit: str, code: int,
                                                      starts: list[str]) -> None:
    ended, err, started = spared(tmp_path, slurm, spares, unfit)
    assert (ended, started) == (code, sorted(starts)), err
    assert f'{unfit.split()[0]} is unfit and left out: "cuda:3: wrong"\n' in err
    assert (f"going on with {starts[-1].replace(',', ' ')};" in err) == (len(starts) > 1)
    assert ("fit nodes are left, 2 are needed: see ZAYA_SPARE_NODES\n" in err) == (code == 4)
    last = (tmp_path / "calls").read_text().rpartition("nodelist")[2]
    if code == 0:
        first = starts[-1].partition(",")[0]
        assert re.search(rf"torchrun --nnodes 2 --node-rank 1 .* --master-addr {first} --master-port {23455 + len(starts)} ", last)
    logs = tmp_path / "runs/slurm-123456/attempt-0"
    assert (logs / "node-1.log").exists() and (logs / f"replaced-{len(starts) - 1}/node-1.log").exists() == (len(starts) > 1)


def test_another_failure_replaces_nobody(tmp_path: Path, slurm: dict[str, str]) -> None:
    write(tmp_path / "bin/scontrol", "#!/usr/bin/env bash\nfor i in 1 2 3 4; do echo host$i; done\n")
    code, err, calls = launch(tmp_path, {**slurm, "SLURM_JOB_NUM_NODES": "4", "ZAYA_SPARE_NODES": "2", "FAKE_CODE": "1"}, "recipe.toml")
    assert code == 1 and calls.count("supervised") == 2 and "unfit" not in err


def test_too_few_names_are_one_line(tmp_path: Path, slurm: dict[str, str]) -> None:
    write(tmp_path / "bin/scontrol", "#!/usr/bin/env bash\nexit 1\n")
    code, err, calls = launch(tmp_path, slurm, "recipe.toml")
    assert (code, err, calls) == (1, "launch_slurm: scontrol names 0 of the job's 2 nodes\n", [])


@pytest.mark.parametrize("spares", ["2", "-1", "x"])
def test_a_bad_number_of_spares_is_one_line(tmp_path: Path, slurm: dict[str, str], spares: str) -> None:
    code, err, calls = launch(tmp_path, {**slurm, "ZAYA_SPARE_NODES": spares}, "recipe.toml")
    assert (code, err.count("\n"), calls) == (2, 1, []) and f"ZAYA_SPARE_NODES={spares}" in err


@pytest.mark.parametrize(("sent", "restarts", "is_requeued"), [
    (signal.SIGUSR1, "0", True), (signal.SIGTERM, "0", False), (signal.SIGUSR1, "100", False)], ids=["preempted", "cancelled", "too often"])
def test_a_signal_reaches_the_workers_and_preemption_queues_again(tmp_path: Path, slurm: dict[str, str], sent: signal.Signals,
                                                                  restarts: str, is_requeued: bool) -> None:
    environ = {**slurm, "FAKE_SLEEP": "30", "SLURM_RESTART_COUNT": restarts}
    calls, started = Path(environ["FAKE_LOG"]), Path(environ["FAKE_LOG"] + ".on")
    job = subprocess.Popen([SCRIPT, "recipe.toml"], env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not started.exists() or calls.read_text().count("torchrun") < 2:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # both stand-ins have set their traps
    job.send_signal(sent)
    _, err = job.communicate(timeout=20)
    assert job.returncode == 1, err
    assert calls.read_text().count("stopped") == 2
    assert ("requeue 123456" in calls.read_text()) == is_requeued
    assert (tmp_path / f"runs/slurm-123456/attempt-{restarts}").is_dir()


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_script_explains_itself(tmp_path: Path, slurm: dict[str, str], flag: str) -> None:
    environ = {key: value for key, value in slurm.items() if key != "SLURM_JOB_ID"}
    done = subprocess.run([SCRIPT, flag], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: sbatch ")
    assert "#" not in done.stdout and all(name in done.stdout for name in re.findall(r"ZAYA_[A-Z_]+", SCRIPT.read_text()))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [[], ["--nonsense"], ["recipe.toml"]])
def test_a_wrong_call_of_the_script_is_one_line(tmp_path: Path, slurm: dict[str, str], arguments: list[str]) -> None:
    environ = {key: value for key, value in slurm.items() if key != "SLURM_JOB_ID" or not arguments}
    code, err, calls = launch(tmp_path, environ, *arguments)
    assert (code, err.count("\n"), calls) == (2, 1, []) and "sbatch" in err and not (tmp_path / "runs").exists()


def test_the_container_gets_devices_and_settings(tmp_path: Path, slurm: dict[str, str]) -> None:
    write(tmp_path / "bin/docker", '#!/usr/bin/env bash\necho "docker $*" >> "$FAKE_LOG"\n')
    write(tmp_path / "bin/stat", "#!/usr/bin/env bash\necho 109\n")
    for name in ("docker", "stat"):
        (tmp_path / "bin" / name).chmod(0o755)
    code, err, calls = launch(tmp_path, {**slurm, "ZAYA_IMAGE": "zaya:1", "NCCL_IB_HCA": "rdma0", "SECRET": "x"}, "recipe.toml")
    (first, second) = (call for call in calls if call.startswith("docker"))
    assert code == 0, err
    for part in ("--device=/dev/kfd", "--device=/dev/dri", "--group-add 109", "--network=host", "--ipc=host", "--env NCCL_IB_HCA",
                 f"--volume {tmp_path}:{tmp_path}", "zaya:1 /zaya/.venv/bin/python -m zaya.resilience.supervisor --report "
                 "runs/slurm-123456/attempt-0/node-0.json -- /zaya/",
                 "torchrun --nnodes 2 --node-rank 0"):
        assert part in first, part
    assert "SECRET" not in first and "--node-rank 1" in second


def test_the_image_is_pinned_and_only_extras_are_installed() -> None:
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    (base,) = [line for line in lines if line.startswith("FROM ")]
    tag, _, digest = base.removeprefix("FROM ").partition("@sha256:")
    assert tag.startswith("rocm/pytorch:rocm") and "latest" not in tag and len(digest) == 64 and int(digest, 16)
    (setup,) = [line for line in lines if "make setup" in line]  # tools.setup_env, which never replaces a torch
    assert setup.startswith("RUN python3 -c") and "assert torch.version.hip" in setup
    assert not any("pip install" in line or "torch==" in line or "triton" in line for line in lines)
