"""Build .venv with everything zaya needs, and never touch a torch that is already there (AMD's containers bring their own).

Runs before anything is installed, on whatever interpreter the user has: the standard library only, in syntax that an old
Python can still parse, so that its message is a sentence and not a SyntaxError. `make setup` calls it.

A torch that this interpreter can import is inherited: .venv sees it, pip gets its version and its triton's as constraints, and
the last step compares torch's version and HIP version with what was there before. Without one, torch 2.13.0 is installed.

    python3 -m tools.setup_env
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
NEW_TORCH = "2.13.0"
OLDEST_TORCH = (2, 9)
OLDEST_PYTHON, FIRST_UNKNOWN_PYTHON = (3, 11), (3, 14)
EXTRAS = "train,hf,dev"

# What an interpreter can import: null, or torch's versions and which distributions own torch and triton.
PROBE = """
import importlib.util, json, sys
found = None
if importlib.util.find_spec("torch") is not None:
    import torch
    from importlib import metadata
    owners = metadata.packages_distributions()
    present = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is not None]
    found = {
        "version": torch.__version__,
        "hip": getattr(torch.version, "hip", None),
        "owners": {name: {owner: metadata.version(owner) for owner in owners.get(name, [])} for name in present},
        "sites": [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))],
    }
print(json.dumps(found))
"""

TORCHRUN = """#!{python}
# torchrun for an inherited torch: its own launcher would start workers outside this environment.
import sys
from torch.distributed.run import main
sys.exit(main())
"""


class SetupError(Exception):
    """What the user must do, in one line."""


class Decision(NamedTuple):
    """How .venv is made: whether it sees the interpreter's packages, and what pip is asked for under which constraints."""

    inherit: bool
    requirements: list[str]
    constraints: list[str]


def check_python(version: tuple[int, int], has_ensurepip: bool) -> None:
    """SetupError where this interpreter cannot make our environment."""
    name = f"{version[0]}.{version[1]}"
    if version < OLDEST_PYTHON:
        raise SetupError(f"Python {name} is too old, 3.11 to 3.13 is needed; install one and name it: make setup PYTHON=python3.12")
    if version >= FIRST_UNKNOWN_PYTHON:
        raise SetupError(f"Python {name} is too new, 3.11 to 3.13 is needed; install one and name it: make setup PYTHON=python3.12")
    if not has_ensurepip:
        raise SetupError(f"this Python cannot make virtual environments; run: sudo apt-get install -y python{name}-venv")


def check_place(venv: Path) -> None:
    """SetupError where something else than an environment lies: making one clears the directory."""
    if venv.exists() and not venv.is_dir():
        raise SetupError(f"{venv} is not a directory; name another place with --venv")
    if venv.is_dir() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
        raise SetupError(f"{venv} is not empty and no virtual environment; it would be cleared, so name another place with --venv")


def probe_torch(python: str) -> dict[str, Any] | None:
    """torch as `python` sees it, or None. SetupError if it is there but does not import."""
    # -P: no directory of the caller's is taken for a package.
    result = subprocess.run([python, "-P", "-c", PROBE], capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(f"torch is installed for {python} but does not import ({last}); repair it or use another PYTHON=")
    found: dict[str, Any] | None = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def decide(torch: dict[str, Any] | None) -> Decision:
    """What to install around `torch`, a probe's answer. SetupError if it is too old for us: replacing it is not ours to do."""
    if torch is None:
        return Decision(False, [f"torch=={NEW_TORCH}", "-e", f".[torch,{EXTRAS}]"], [])
    release = re.match(r"(\d+)\.(\d+)", torch["version"])  # of 2.9.0a0+gitabc too, which pip would not take for 2.9
    if release and (int(release[1]), int(release[2])) < OLDEST_TORCH:
        raise SetupError(f"the torch that is here, {torch['version']}, is older than 2.9 and is not ours to replace; "
                         "start from a newer image, or name a Python without torch: make setup PYTHON=...")
    constraints = []
    for name, owners in torch["owners"].items():
        constraints += [f"{owner}=={version}" for owner, version in sorted(owners.items())]
        if name not in owners:
            # Importable, but under another name (pytorch-triton-rocm) or none: pip knows no conflict and would write over it.
            constraints.append(f"{name}<0")
    return Decision(True, ["-e", f".[{EXTRAS}]"], constraints)


def reusable(venv: Path, inherit: bool) -> bool:
    """Whether an existing environment is whole, of this Python and of the wanted kind."""
    config = venv / "pyvenv.cfg"
    if not config.is_file():
        return False
    settings = dict(line.replace(" ", "").lower().split("=", 1) for line in config.read_text().splitlines() if "=" in line)
    if (settings.get("include-system-site-packages") == "true") != inherit:
        return False
    asked = [str(venv / "bin/python"), "-c", "import sys, pip; print(*sys.version_info[:2])"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True)
    except OSError:  # the interpreter it was made from is gone
        return False
    return answer.returncode == 0 and answer.stdout.split() == [str(part) for part in sys.version_info[:2]]


def make_venv(python: str, venv: Path, torch: dict[str, Any] | None, with_pip: bool = True) -> None:
    """Create `venv` from `python`, seeing the packages `torch` lives in if there is one. `with_pip=False` is for tests: it is quick."""
    command = [python, "-m", "venv", "--clear", *([] if with_pip else ["--without-pip"])]
    result = subprocess.run([*command, *(["--system-site-packages"] if torch else []), str(venv)], capture_output=True, text=True)
    if result.returncode:
        raise SetupError(f"cannot make {venv}: {' '.join((result.stderr or result.stdout).split())}")
    if torch and probe_torch(str(venv / "bin/python")) is None:
        # `python` is itself a virtual environment's: --system-site-packages skipped to the interpreter beneath. Name its folders.
        (site,) = (venv / "lib").glob("python3.*/site-packages")
        (site / "inherited.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in torch["sites"]))


def install(venv: Path, decision: Decision) -> None:
    """One pip call, so that one resolution sees every requirement and constraint. Silent unless it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", prefix="constraints-") as constraints:
        constraints.write("".join(f"{line}\n" for line in decision.constraints))
        constraints.flush()
        command = [str(venv / "bin/python"), "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check"]
        result = subprocess.run([*command, "--constraint", constraints.name, *decision.requirements], cwd=ROOT)
    if result.returncode:
        raise SetupError(f"pip failed with exit code {result.returncode}; its reason is above. Mend it and run make setup again")


def verify(venv: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """torch as .venv sees it. SetupError if it is not the one that was inherited, or not the one that was asked for."""
    after = probe_torch(str(venv / "bin/python"))
    if after is None:
        raise SetupError(f"{venv} has no torch after the installation; remove {venv} and run make setup again")
    if before:
        for key in ("version", "hip", "owners"):
            if after[key] != before[key]:
                raise SetupError(f"torch's {key} changed from {before[key]} to {after[key]} in {venv}; remove that directory")
    elif after["version"].split("+")[0] != NEW_TORCH:
        raise SetupError(f"torch {after['version']} was installed where {NEW_TORCH} was asked for; remove {venv} and run make setup again")
    return after


def setup(venv: Path) -> None:
    check_python(sys.version_info[:2], importlib.util.find_spec("ensurepip") is not None)  # Debian splits it off into python3-venv
    check_place(venv)
    inside = Path(sys.prefix).resolve() == venv.resolve()  # an activated .venv must not be its own parent
    python = getattr(sys, "_base_executable", sys.executable) if inside else sys.executable
    torch = probe_torch(python)
    decision = decide(torch)
    kept = reusable(venv, decision.inherit)
    if inside and not kept:
        raise SetupError(f"{venv} is active but must be built anew; run deactivate, then make setup")
    say(1, f"{venv.name} {'is there' if kept else 'made'} from Python {sys.version.split()[0]}, "
           + (f"with its torch {torch['version']}" if torch else "without a torch of its own"))
    if not kept:
        make_venv(python, venv, torch)
    say(2, "installing " + ("zaya's requirements around it" if torch else f"torch {NEW_TORCH} and zaya's requirements, some minutes"))
    install(venv, decision)
    after = verify(venv, torch)
    torchrun = venv / "bin/torchrun"
    if not torchrun.exists():
        torchrun.write_text(TORCHRUN.format(python=venv / "bin/python"))
        torchrun.chmod(0o755)
    say(3, f"ready: torch {after['version']}, " + (f"HIP {after['hip']}" if after["hip"] else "no HIP"))


def say(phase: int, text: str) -> None:
    print(f"setup {phase}/3: {text}", flush=True)


class Parser(argparse.ArgumentParser):
    """A wrong call is one line, as with zaya.cli's, of which nothing is imported here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.setup_env", description="Build .venv; an importable torch is inherited, never replaced.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where to build it (default: .venv beside setup.py)")
    options = parser.parse_args(argv)
    try:
        setup(options.venv.absolute())
    except SetupError as error:
        print(f"tools.setup_env: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tools.setup_env: interrupted; make setup goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
