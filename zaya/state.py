"""What a run keeps: one rank's part of the training state by checkpoint name, given out to be saved and taken from a checkpoint.

Between the trainer, whose tensors these are, and zaya/checkpoint, which knows names and boxes only. The plan says which parameters there
are, the optimizer which tensors it keeps of each and which boxes of them lie here; the small rest is equal on all ranks.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zaya.checkpoint.errors import CheckpointError, raise_on_all
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import Share
from zaya.dtypes import STORED_DTYPES
from zaya.parallel.collectives import gather_objects
from zaya.parallel.deepspeed_engine import DeepSpeedEngine
from zaya.parallel.mesh import Mesh
from zaya.parallel.zero1 import Zero1
from zaya.plan import ParameterPlan


class TrainState:
    """`replicated`: the tensors that are equal on all ranks, by checkpoint name; writing into them restores them."""

    def __init__(self, table: Mapping[str, ParameterPlan], optimizer: Zero1 | DeepSpeedEngine, replicated: Mapping[str, Tensor],
                 mesh: Mesh, *, rounded: bool) -> None:
        self.table, self.optimizer, self.mesh = table, optimizer, mesh
        self.replicated = {**replicated, "optim.step": optimizer.step}
        self.rounded = rounded
        """The model's parameters are in a narrow dtype: master weights are kept beside them."""
        self.left_out = ""
        """What the last `load` left out, by leave of its caller, as the end of a sentence."""

    def owned(self) -> dict[str, Share]:
        """The state by checkpoint name, and the boxes of it that this rank writes: together the ranks have every element once."""
        self.optimizer.wait()
        shares = {}
        for name, row in self.table.items():
            for kind in self.optimizer.kinds(name):
                shares[_stored(kind, name)] = Share(self.optimizer.dtype(name, kind), row.shape, list(self.optimizer.own_parts(name, kind)))
        for name, tensor in self.replicated.items():
            whole = ((0,) * tensor.dim(), tuple(tensor.shape))
            shares[name] = Share(tensor.dtype, tuple(tensor.shape), [(whole, tensor)] if self.mesh.rank == 0 else [])
        return shares

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, *, weights_only: bool = False, allow_missing: Sequence[str] = ()) -> None:
        """Take the state, or the weights alone (all ranks together; each reads its own boxes, rank 0 what is replicated).

        Tensors that match one of the patterns of `allow_missing` may be absent or misshapen (they keep what they hold) or unknown (they
        are passed over). ValueError: any other tensor is missing, misshapen, of a wrong kind of dtype or one too many: nothing has
        changed. CheckpointError, on every rank: a part cannot be read; the state is then half loaded, and good for another `load` only.
        """
        wanted = self._match(checkpoint, weights_only, allow_missing)
        self.optimizer.wait()
        small, error = {}, None
        try:
            for name in self.table:
                for kind in self.optimizer.kinds(name):
                    if _stored(kind, name) in wanted:
                        for box, tensor in self.optimizer.parts(name, kind):
                            _read_into(checkpoint, wanted[_stored(kind, name)], box, tensor)
            if self.mesh.rank == 0:  # whose file has them: on a tier of its own another node could not see it
                small = {name: checkpoint.read(wanted[name]) for name in self.replicated if name in wanted}
        except CheckpointError as damage:
            error = damage
        told = gather_objects((error, small), self.mesh.world)
        raise_on_all([error for error, _ in told])
        for name, tensor in told[0][1].items():
            self.replicated[name].copy_(tensor)
        self.optimizer.publish()

    def _match(self, checkpoint: Checkpoint, weights_only: bool, allow_missing: Sequence[str]) -> dict[str, str]:
        """Our tensor -> the stored one that it is read from."""
        path, stored = checkpoint.path, checkpoint.manifest.tensors
        needed = {_stored(kind, name): (row.shape, self.optimizer.dtype(name, kind))
                  for name, row in self.table.items() for kind in self.optimizer.kinds(name)}
        needed |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.replicated.items()}
        if weights_only:
            needed = {name: what for name, what in needed.items() if name.startswith(("model.", "optim.master."))}
        sources = {name: _where(name, stored, rounded=self.rounded) for name in needed}
        # A wide run reads the master weights of a narrow one as its model, and keeps no second copy.
        unknown = sorted(name for name in stored.keys() - needed.keys() - set(sources.values())
                         if name.startswith("model." if weights_only else ("model.", "optim.")) and not name.startswith("optim.master."))
        extra = [name for name in unknown if not _matches(name, allow_missing)]
        if extra:
            raise ValueError(f"checkpoint {path} has tensor {extra[0]}, which this recipe's model or optimizer lacks; it belongs to "
                             "another one, or pass it over by checkpoint.allow_missing")
        wanted: dict[str, str] = {}
        for name, (shape, dtype) in needed.items():
            source = sources[name]
            if _matches(name, allow_missing) and (source not in stored or stored[source].shape != shape):
                continue
            if source not in stored:
                raise ValueError(f"checkpoint {path} has no tensor {name}; it belongs to another model or optimizer, or allow it in "
                                 "checkpoint.allow_missing")
            if stored[source].shape != shape:
                raise ValueError(f"checkpoint {path}: {source} has shape {stored[source].shape}, this recipe needs {shape}; "
                                 "it belongs to another model")
            if STORED_DTYPES[stored[source].dtype].is_floating_point != dtype.is_floating_point:
                raise ValueError(f"checkpoint {path}: {source} is {STORED_DTYPES[stored[source].dtype]}, this recipe needs {dtype}; "
                                 "it was not written by this program")
            wanted[name] = source
        kept = sorted(needed.keys() - wanted.keys())
        self.left_out = "".join(f"; {len(names)} tensors {what} ({names[0]}{', ...' if names[1:] else ''})"
                                for names, what in ((kept, "keep their initial values"), (unknown, "of it are passed over")) if names)
        return wanted


def _read_into(checkpoint: Checkpoint, name: str, box: tuple[tuple[int, ...], tuple[int, ...]], target: Tensor) -> None:
    """Straight into place, or by way of the stored dtype: at most one box of memory more."""
    if STORED_DTYPES[checkpoint.manifest.tensors[name].dtype] == target.dtype:
        checkpoint.read_into(name, box, target)
    else:
        target.copy_(checkpoint.read(name, *box).view(target.shape))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _stored(kind: str, name: str) -> str:
    """The name under which a checkpoint keeps one kind of a parameter's tensors."""
    return f"model.{name}" if kind == "model" else f"optim.{kind}.{name}"


def _where(name: str, stored: Mapping[str, object], *, rounded: bool) -> str:
    """Where a tensor is found when the checkpoint was written in another dtype: a wide run keeps no separate master weights."""
    master = name.replace("model.", "optim.master.", 1)
    if name.startswith("model.") and master in stored and not rounded:
        return master
    if name.startswith("optim.master.") and name not in stored:
        return name.replace("optim.master.", "model.", 1)
    return name
