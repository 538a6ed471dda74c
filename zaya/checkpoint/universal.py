"""DeepSpeed's universal checkpoint, both ways: the format alone, as deepspeed.checkpoint.ds_to_universal (0.19.8) leaves it.

    DIR/latest_universal                                 names the directory below
    DIR/global_step8_universal/
       zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt            {"param": the whole tensor}; from ZeRO-3 the bare, flat tensor
       zero/NAME/step.pt                                 AdamW's counter; absent where its optimizer keeps none per parameter
       zero/optimizer_state.pt                           hyperparameters by group; DeepSpeed's loader overwrites its own with these
       mp_rank_00_model_states.pt                        counters, buffers, what the caller of save_checkpoint added (client_state)
       zero_pp_rank_0_mp_rank_00_model_states.pt         the same file for ZeRO-3, which asks for this name

Tools stand on it: tools.export_deepspeed writes through UniversalWriter, tools.import_deepspeed reads through Universal. Knows no model, no
recipe and no manifest; needs no deepspeed. One tensor is in memory at a time.

The files are pickles, and nothing of a pickle is run: torch's restricted reader takes tensors and plain values, the few classes in
`_INERT` become objects that do nothing, and any other class is an error that names it before the file is loaded.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zaya.checkpoint.directory import NewDirectory
from zaya.checkpoint.errors import CheckpointError, disk_errors
from zaya.checkpoint.manifest import check_name
from zaya.checkpoint.torch_dist import save_pickle

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, by DeepSpeed's names of the files."""
VERSION = "0.19.8"  # DeepSpeed's loader refuses a file without one, and ZeRO-1 one below 0.3.17
LATEST = "latest_universal"
CLIENT_KEY = "zaya"
"""Of our part of a client_state, the dict that callers of save_checkpoint pass and callers of load_checkpoint get back."""
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


class _LossScaler:
    """Stands in for DeepSpeed's: of fp16 runs, whose scale nobody here asks for."""


# What ds_to_universal copies from a run's own files beside tensors and plain values: inert stand-ins by the name in the pickle.
_INERT: list[Any] = [
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
# What a damaged or hostile file makes of the readers below; none of these is a mistake of ours that should show its traceback.
_UNREADABLE = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError,
               EOFError)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one optimizer group, in the order of the target's, and what its loader sets there (lr, betas, weight_decay, ...)."""

    names: tuple[str, ...]
    hyperparameters: Mapping[str, object]


# ------------------------------------------------------------------------------------------------------------------------- writing


class UniversalWriter(NewDirectory):
    """Stream AdamW's state into a new universal checkpoint.

        with UniversalWriter(directory, step=8, optimizer_steps=8, groups=groups, buffers={}, client_state={}) as writer:
            for name in ...: for state in STATES: writer.add(name, state, tensor)

    step: DeepSpeed's global_steps; optimizer_steps of them were committed. buffers: the module's, by name; DeepSpeed's loader of universal
    checkpoints does not restore any, so whoever needs them puts them into client_state, which load_checkpoint returns. Everything goes to
    a hidden sibling of `directory`, which `close` renames; an exception inside the `with` removes it. `directory` must not exist, or be
    empty. CheckpointError if it cannot be written.
    """

    def __init__(self, directory: str | Path, *, step: int, optimizer_steps: int, groups: Sequence[ParameterGroup],
                 buffers: Mapping[str, Tensor], client_state: Mapping[str, Any]) -> None:
        self.step, self.optimizer_steps = step, optimizer_steps
        self.groups, self.buffers, self.client_state = groups, buffers, client_state
        self._tag = f"global_step{step}_universal"
        self._shapes: dict[str, torch.Size] = {}
        self._missing = {(name, state) for group in groups for name in group.names for state in STATES}
        super().__init__(directory)
        with disk_errors("write", self.directory):
            (self.hidden / self._tag / "zero").mkdir(parents=True)

    def add(self, name: str, state: str, tensor: Tensor) -> None:
        """The whole of one tensor of a parameter, fp32."""
        assert (name, state) in self._missing and tensor.dtype == torch.float32, (name, state, tensor.dtype)
        assert self._shapes.setdefault(name, tensor.shape) == tensor.shape, (name, state, tensor.shape)
        self._missing.remove((name, state))
        folder = self.hidden / self._tag / "zero" / check_name(name)
        with disk_errors("write", self.directory):
            folder.mkdir(exist_ok=True)
            # A view would take its whole storage along. cat_dim: where slices of tensor parallelism were joined; read, never needed.
            whole = tensor.detach().clone(memory_format=torch.contiguous_format) if _is_view(tensor) else tensor.detach()
            _save({"param": whole, "cat_dim": 0}, folder / f"{state}.pt")
            if state == STATES[0]:
                # A float: torch's fused AdamW takes no other.
                _save(torch.tensor(float(self.optimizer_steps)), folder / "step.pt")

    def close(self) -> None:
        """The rest of the files; the directory takes its name."""
        assert not self._missing, f"no {min(self._missing)} was added"
        folder = self.hidden / self._tag
        with disk_errors("write", self.directory):
            _save(self._optimizer_state(), folder / "zero" / "optimizer_state.pt")
            for name in MODEL_STATES:
                _save(self._model_states(), folder / name)
            (self.hidden / LATEST).write_text(self._tag, encoding="ascii")
        super().close()

    def _optimizer_state(self) -> dict[str, Any]:
        groups = [{**group.hyperparameters, "params": [index]} for index, group in enumerate(self.groups)]
        # ZeRO-3's loader gives every group the hyperparameters of the first one that it finds here: the decay, which differs, stays out.
        alike = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
        step = torch.tensor(float(self.optimizer_steps))
        return {"ds_version": VERSION, "param_groups": groups,
                "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": alike}}

    def _model_states(self) -> dict[str, Any]:
        shapes = [OrderedDict((name, self._shapes[name]) for name in group.names) for group in self.groups]
        own = {
            "module": OrderedDict(self.buffers), "buffer_names": list(self.buffers), "param_shapes": shapes, "optimizer": None,
            "lr_scheduler": None, "global_steps": self.step, "skipped_steps": self.step - self.optimizer_steps, "dp_world_size": 1,
            "mp_world_size": 1, "ds_version": VERSION,
        }
        assert not own.keys() & self.client_state.keys(), "client_state hides what DeepSpeed reads"
        return own | dict(self.client_state)


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous()


def _save(value: object, path: Path) -> None:
    with open(path, "xb") as file:
        save_pickle(value, file)
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------------------- reading


class Universal:
    """An open universal checkpoint: `path` is its directory, or the one above with `latest_universal`.

    1. the constructor; 2. `check`, with the shapes that are to be in it; 3. `read`. CheckpointError, one line that names the file, for
    whatever is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _locate(Path(path))
        self.zero = self.path / "zero"
        with disk_errors("read", self.zero):
            self.names = sorted(entry.name for entry in self.zero.iterdir() if entry.is_dir())
        found = [self.path / name for name in MODEL_STATES if (self.path / name).is_file()]
        if not found:
            raise CheckpointError(f"{self.path} has no {MODEL_STATES[0]}, which holds the counters; convert the checkpoint again")
        self._file = found[0]
        self.model_states = _mapping(read_pt(self._file), self._file)
        self.step, self.skipped_steps = (self._count(key) for key in ("global_steps", "skipped_steps"))
        listed = self.model_states.get("buffer_names")
        buffers = set(map(str, listed)) if isinstance(listed, list) else set()
        module = _mapping(self.model_states.get("module") or {}, self._file)
        self.buffers = {name: tensor for name, tensor in module.items() if name in buffers and isinstance(tensor, Tensor)}
        shared = _mapping(self.model_states.get("shared_params") or {}, self._file)
        self.aliases = {str(alias): str(name) for alias, name in shared.items()}
        """Other names of a parameter under which ds_to_universal writes it once more, fp32 alone."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Exactly these parameters, each with all its files; what the tensors are, `read` tells."""
        for name in shapes:
            if name not in self.names:
                raise CheckpointError(f"{self.zero} has no parameter {name}, which the recipe asks for")
            for state in STATES:
                if not (self.zero / name / f"{state}.pt").is_file():
                    raise CheckpointError(f"{self.zero / name} has no {state}.pt; AdamW cannot go on without it")
            for file in sorted((self.zero / name).iterdir()):
                if file.name not in {"step.pt", *(f"{state}.pt" for state in STATES)}:
                    raise CheckpointError(f"{file} is no state of AdamW, so it cannot be carried; only {', '.join(STATES)} and step are")
        known = shapes.keys() | self.buffers.keys() | {alias for alias, name in self.aliases.items() if name in shapes}
        for name in self.names:
            if name not in known:
                raise CheckpointError(f"{self.zero} has the unexpected parameter {name}, which the recipe does not ask for")

    def read(self, name: str, state: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, mapped: its pages are the file's."""
        file = self.zero / name / f"{state}.pt"
        value = read_pt(file)
        flat = isinstance(value, Tensor)  # as ZeRO-3 leaves it
        tensor = value if flat else _mapping(value, file).get("param")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file} holds no tensor")
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{file} is {tensor.dtype}; DeepSpeed keeps masters and moments in torch.float32")
        if tuple(tensor.shape) != shape and not (flat and tensor.shape == (torch.Size(shape).numel(),)):
            raise CheckpointError(f"{file} has shape {list(tensor.shape)}, the recipe asks for {list(shape)}")
        return tensor.reshape(shape)

    def optimizer_steps(self, names: Sequence[str]) -> int:
        """AdamW's counter, of all these parameters: from their own files, else the optimizer's, else the steps that were not skipped."""
        files = [self.zero / name / "step.pt" for name in names]
        found = {file: _number(read_pt(file), file) for file in files if file.is_file()}
        if found:
            first = next(iter(found))
            for file in files:
                if file not in found:
                    raise CheckpointError(f"{file.parent} has no step.pt, but {first.parent} has")
                if found[file] != found[first]:
                    raise CheckpointError(f"{file} says step {found[file]}, {first} says {found[first]}; one AdamW has one counter")
            return found[first]
        file = self.zero / "optimizer_state.pt"
        if not file.is_file():
            raise CheckpointError(f"{self.zero} has no {file.name}; convert the checkpoint again")
        state = _mapping(read_pt(file), file)
        for where in (_at(state, "optimizer_state_dict", "state", 0), _at(state, "param_groups", 0)):
            if isinstance(where, Mapping) and "step" in where:
                return _number(where["step"], file)
        return self.step - self.skipped_steps

    def _count(self, key: str) -> int:
        if key not in self.model_states:
            raise CheckpointError(f"{self._file} has no {key}; it is not DeepSpeed's")
        return _number(self.model_states[key], self._file)


def read_pt(path: Path) -> Any:
    """What a .pt file holds, tensors mapped; nothing in it is run. CheckpointError: it is damaged, or wants a class that is not allowed."""
    with disk_errors("read", path), torch.serialization.safe_globals(_INERT):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged: its part {damaged} does not match its checksum; get it again")
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            if foreign:
                raise CheckpointError(f"{path} is a pickle that asks for {min(foreign)}; only tensors and plain values are read, so it was "
                                      "not loaded")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except CheckpointError:
            raise
        except _UNREADABLE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path} is not a file of torch.save, or damaged ({reason}); get it again") from None


def _locate(path: Path) -> Path:
    if (path / "zero").is_dir():
        return path
    latest = path / LATEST
    if not latest.is_file():
        ordinary = any(path.glob("*_optim_states.pt")) or (path / "latest").is_file()
        raise CheckpointError(f"{path} is an ordinary checkpoint of DeepSpeed; make it universal: python -m "
                              "deepspeed.checkpoint.ds_to_universal --input_folder DIR/TAG --output_folder DIR/TAG_universal "
                              "--inject_missing_state" if ordinary else
                              f"{path} is not a universal checkpoint of DeepSpeed: it has neither zero/ nor {LATEST}")
    with disk_errors("read", latest):
        tag = latest.read_bytes().decode("utf-8", "replace").strip()
    if not tag or Path(tag).name != tag or not (path / tag / "zero").is_dir():
        raise CheckpointError(f"{latest} names {tag!r}, which is not a universal checkpoint beside it")
    return path / tag


def _mapping(value: Any, file: Path) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{file} holds {type(value).__name__} where a dict belongs")
    return value


def _number(value: Any, file: Path) -> int:
    """A counter as int, float or tensor."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 2**63 or number != int(number):
        raise CheckpointError(f"{file} counts steps with {str(value)[:40]!r}, which is not a whole number")
    return int(number)


def _at(value: Any, *keys: Any) -> Any:
    """value[k0][k1]..., None where there is no such place."""
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value
