"""DeepSpeed's ZeRO 1, 2 and 3 behind Zero1's interface (parallel.engine = "deepspeed"), for machines that do not hold the state.

DeepSpeed owns the memory and the traffic, we own the arithmetic: the update is our AdamW (zaya/kernels) on DeepSpeed's flat fp32
partitions, the schedule, the clipping, the verdict and the checkpoint are the trainer's. The only file that imports deepspeed, and where
the version is pinned (setup.py): what DeepSpeed does not publish is read in `_fragments`, `_gradients` and `publish`, nowhere else.

    stage   every rank keeps a 1 / ranks share of
    1       master weights and moments (with offload: in the memory of the host)
    2       these, and gradients
    3       these, and parameters: a module's are gathered before it runs, forward and backward, and let go afterwards

Per step, on every rank:

1. `start_step(n)`; n times: the model's forward, `backward`. DeepSpeed reduces gradients to the rank that owns them: at stage 1 in the n-th
   backward, else in each one. It takes their mean over ranks; the loss is scaled by the ranks, so that they are those of the summed loss.
2. `squared_norm`: of the partitions here; summed over all ranks, every element is in it once.
3. `update`: DeepSpeed flattens each partition's gradient and calls our rule, then all-gathers the parameters (stage 3: the next forward
   does). It skips a step whose gradients are not finite; where `commit` is false for another reason, the rule changes nothing.

Not here, ValueErrors of the recipe (zaya/config.py): tensor, context and expert parallelism, Muon, fp64.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zaya.config import OptimConfig
from zaya.kernels import reference
from zaya.kernels.backend import ops
from zaya.parallel import partition
from zaya.parallel.mesh import Mesh
from zaya.plan import ParameterPlan
from zaya.shard import Box, flat_boxes


class _Fragment(NamedTuple):
    """The interval of a parameter that this rank owns."""

    flat: Tensor
    """The fp32 partition that holds it, key of the rule's state."""
    offset: int
    """Where it starts in there."""
    start: int
    """Where it starts in the parameter."""
    numel: int


class _Rule(torch.optim.Optimizer):
    """AdamW as DeepSpeed calls it: on whatever partitions its groups hold at that moment. `update` sets the numbers of the step."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.config = config
        self.numbers: dict[str, Any] = {}
        """lr, grad_scale, step and commit."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # DeepSpeed passes no closure
        config = self.config
        for group in self.param_groups:
            for master in group["params"]:
                # Offloaded partitions lie on the host, where no Triton kernel runs; the scalars follow them.
                adamw_ = ops().adamw_ if master.device == self.numbers["step"].device else reference.adamw_
                numbers: dict[str, Any] = {name: value.to(master.device) if isinstance(value, Tensor) else value
                                           for name, value in self.numbers.items()}
                moments = self.moments(master)
                adamw_(master, master.grad, moments["exp_avg"], moments["exp_avg_sq"], beta1=config.beta1, beta2=config.beta2,
                       eps=config.eps, weight_decay=group["weight_decay"], **numbers)

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[master]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(master, requires_grad=False)
        return state


class DeepSpeedEngine:
    """The plan's AdamW over the parameters of `module`, which DeepSpeed partitions in place: from now on its hooks gather and reduce.

    All ranks make it together. Each step has `micro_batches` backward passes. `reduce_dtype`: gradients are summed in it (None: fp32).
    ValueError: deepspeed is not installed.
    """

    def __init__(self, module: nn.Module, table: Mapping[str, ParameterPlan], config: OptimConfig, mesh: Mesh, *, stage: int,
                 offload: bool = False, micro_batches: int = 1, reduce_dtype: torch.dtype | None = None) -> None:
        assert config.name == "adamw" and mesh.layout.dp == mesh.layout.edp == mesh.world_size
        self.mesh, self.table, self.stage, self.offload = mesh, table, stage, offload
        self.parameters = {name: module.get_parameter(name) for name in table}
        self.train_dtype = next(iter(self.parameters.values())).dtype
        self.step = torch.zeros((), dtype=torch.float32, device=mesh.device)
        self._micro_batches, self._seen, self._left = micro_batches, 0, 0
        groups = [{"params": [p for name, p in self.parameters.items() if table[name].decay is decay],
                   "weight_decay": config.weight_decay if decay else 0.0} for decay in (True, False)]
        self._rule = _Rule([group for group in groups if group["params"]], config)
        deepspeed = _import_deepspeed(mesh)
        self._engine = deepspeed.initialize(model=module, optimizer=self._rule, config=self._settings(reduce_dtype))[0]
        self._zero = self._engine.optimizer
        self._fragments = dict(self._find_fragments())
        for fragment in self._fragments.values():
            self._rule.moments(fragment.flat)
        # The trainer calls the module itself, not DeepSpeed's wrapper of it, whose forward does this and `backward`'s prologue.
        module.register_forward_pre_hook(lambda *_: self._zero.clear_backward_seen_flag())
        self.publish()

    def _settings(self, reduce_dtype: torch.dtype | None) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": partition.BUCKET_ELEMENTS}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.mesh.device.type == "cuda"}
        if self.stage == 3:
            # Norms and scales are read by other modules than their own (a residual join computes the next norm): they stay whole.
            zero["stage3_param_persistence_threshold"] = max(p.numel() for p in self.parameters.values() if p.dim() == 1)
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed counts samples with it, nothing else
            "gradient_accumulation_steps": self._micro_batches,
            "zero_optimization": zero,
            "bf16": {"enabled": self.train_dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "bf16" if reduce_dtype == torch.bfloat16 else "fp32",
            "gradient_clipping": 0.0,  # enters with grad_scale
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    # ------------------------------------------------------------------------------------------------------------ gradients

    def start_step(self, micro_batches: int = 1) -> None:
        """The next gradients replace the old ones; the micro_batches-th backward completes them."""
        assert micro_batches == self._micro_batches, (micro_batches, self._micro_batches)
        self._left = micro_batches

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch's summed loss."""
        self._left -= 1
        self._engine.set_gradient_accumulation_boundary(self._left == 0)
        self._engine._backward_prologue()
        self._engine.backward(loss * self.mesh.world_size, scale_wrt_gas=False)

    def finish_gradients(self) -> None:
        """Every partition's gradient is summed."""
        assert self._left == 0, f"{self._left} micro-batches are missing"
        if self.offload and self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)  # gradients are on their way to the host

    def _gradients(self) -> list[Tensor]:
        """This rank's partitions of the summed gradient; padding is zero."""
        if self.offload:
            return [flat.grad for flat in {id(f.flat): f.flat for f in self._fragments.values()}.values() if flat.grad is not None]
        if self.stage == 1 and self.train_dtype == torch.bfloat16:  # DeepSpeed has an optimizer of its own for this case
            return list(self._zero.fp32_groups_gradient_flat_partition)
        return [gradient for gradients in self._zero.averaged_gradients.values() for gradient in gradients]

    def squared_norm(self) -> Tensor:
        """Squared L2 norm, fp64, of the gradient elements that count here: summed over all ranks each element counts once."""
        norms = [torch.linalg.vector_norm(gradient) for gradient in self._gradients()]
        return torch.stack(norms).double().square().sum().to(self.mesh.device)

    # ------------------------------------------------------------------------------------------------------------ update

    def update(self, *, lr: float, grad_scale: Tensor, commit: Tensor) -> None:
        """One step from grad * grad_scale (0-dim); nothing changes where commit (0-dim bool) is false."""
        self._rule.numbers = {"lr": lr, "grad_scale": grad_scale, "step": self.step, "commit": commit}
        self._engine.step()
        self.step += commit
        if self._zero.overflow:  # a step that it skips leaves vectors in pieces at stage 3
            self.publish()

    def wait(self, names: Iterable[str] | None = None) -> None:
        """The parameters are the updated ones: DeepSpeed has waited (stage 3: its hooks will gather them)."""

    @torch.no_grad()
    def publish(self) -> None:
        """Parameters from the master weights, after these were written (collective)."""
        zero = self._zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    # ------------------------------------------------------------------------------------------------------------ state

    def _find_fragments(self) -> Iterator[tuple[str, _Fragment]]:
        for name, parameter in self.parameters.items():
            if self.stage == 3:  # every parameter is cut alone, into equal parts, the last ones padded
                group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = self.mesh.rank * length
                fragment = _Fragment(self._zero.fp32_partitioned_groups_flat[group], offset, start,
                                     min(length, parameter.ds_numel - start))  # type: ignore[attr-defined]
                if fragment.numel > 0:
                    yield name, fragment
            elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]  # cut in one flat buffer per group
                flat = self._rule.param_groups[mapping.param_group_index]["params"][0]
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield name, _Fragment(flat, here.start, there.start, there.numel)

    def kinds(self, name: str) -> list[str]:
        """What a checkpoint keeps of a parameter: model, master (where the model's is rounded), and the rule's state."""
        return ["model", *(["master"] if self.train_dtype == torch.bfloat16 else []), "exp_avg", "exp_avg_sq"]

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return self.train_dtype if kind == "model" else torch.float32

    def parts(self, name: str, kind: str) -> Iterator[tuple[Box, Tensor]]:
        """This rank's part of one tensor of the state, as boxes of the logical tensor, each with the memory that holds it."""
        fragment = self._fragments.get(name)
        if fragment is None:
            return
        values, start = self._values(name, fragment, kind), 0
        for box in flat_boxes(fragment.start, fragment.start + fragment.numel, self.table[name].shape):
            numel = math.prod(box[1])
            yield box, values[start : start + numel].view(box[1])
            start += numel

    own_parts = parts
    """What this rank saves: all of it, as no other holds the same."""

    def _values(self, name: str, fragment: _Fragment, kind: str) -> Tensor:
        parameter = self.parameters[name]
        if kind == "model" and self.train_dtype == torch.bfloat16:
            if self.stage == 3:
                return parameter.ds_tensor.data[: fragment.numel]  # type: ignore[attr-defined]
            return parameter.data.view(-1)[fragment.start : fragment.start + fragment.numel]
        flat = fragment.flat.data if kind in ("model", "master") else self._rule.moments(fragment.flat)[kind]
        return flat[fragment.offset : fragment.offset + fragment.numel]


def _import_deepspeed(mesh: Mesh) -> Any:
    """The package, told which device to use. It wants a process group even where one process is alone."""
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)  # else it takes a GPU that it finds, whatever train.device says
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f'parallel.engine = "deepspeed" but deepspeed cannot be imported ({error}); docs/deepspeed.md says how to '
                         'install it, or use parallel.engine = "zaya"') from None
    deepspeed.utils.logger.setLevel(logging.WARNING)  # it tells every buffer it makes
    deepspeed.ops.__compatible_ops__ = {}  # else it compiles an all-reduce of its own for CPUs, minutes of g++, in place of gloo's
    if not dist.is_initialized():
        dist.init_process_group("nccl" if mesh.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return deepspeed
