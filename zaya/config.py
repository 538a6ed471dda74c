"""Recipes: every knob of a run as frozen dataclasses, read from one flat TOML file and checked in one place.

First stage of a batch's path: everything downstream receives these objects and nothing else (no environment, no globals).
Knows the standard library, tables.py and cli.py only: no torch, no files but the recipe itself.

    python -m zaya.config recipes/quickstart.toml --train.steps=20     # validate and print the resolved recipe
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zaya.cli import end_in_one_line
from zaya.shares import blend_rows
from zaya.tables import apply_override, build_section, check_known, hints, to_toml

DTYPES = ("fp32", "bf16", "fp64")
ATTENTION_KINDS = ("full", "sliding")
MOST_BATCH_SIZES = 1000
"""Of a ramp: far more than anyone needs, few enough to go through."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a ZAYA1 model (arXiv 2511.17127, section 3). Sizes are counts of elements unless said otherwise."""

    vocab_size: int
    """Token ids; embedding rows. ZAYA1: 262,272 (Gemma 3 tokenizer)."""
    hidden_size: int
    """Width D of the residual stream."""
    num_layers: int
    """Blocks, each one attention then one mixture of experts."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Channels per head; RoPE turns the first half of them."""
    num_experts: int
    """Experts per block; a token visits one (top-1)."""
    moe_intermediate_size: int
    """Width of an expert after SwiGLU."""
    router_hidden_size: int
    """Width R of the router's state, which is averaged over depth."""
    skip_expert: bool = True
    """One router class more than experts: a token that picks it gets a zero MoE output."""
    attention_pattern: tuple[str, ...] = ("full",)
    """"full" or "sliding" per block, repeated over the depth. ZAYA1-74B: ["sliding", "full"]."""
    sliding_window: int = 0
    """Tokens a sliding block sees, itself included. 0 where no block slides."""
    rope_theta: float = 1e4
    """RoPE base of full blocks: 1e4 in pretraining, 1e6 at 32k, 5e6 at 131k."""
    rope_theta_sliding: float = 1e4
    """RoPE base of sliding blocks."""
    init_std: float = 0.02
    """Standard deviation of initial matrices; output projections get init_std / sqrt(2 * num_layers)."""
    router_init_std: float = 0.02
    """Standard deviation of the router's matrices (docs/decisions.md records the sweep)."""
    temperature_init: float = 1.0
    """Initial key temperature; the released code starts at 0, which makes all keys zero."""

    @property
    def num_router_classes(self) -> int:
        return self.num_experts + int(self.skip_expert)

    def attention_kind(self, block: int) -> str:
        return self.attention_pattern[block % len(self.attention_pattern)]

    def validate(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "num_experts", "moe_intermediate_size",
                 "router_hidden_size")
        # Tables have a line per layer.
        for name, least, bits in (*((name, 1, 31) for name in sizes), ("num_layers", 1, 16), ("sliding_window", 0, 31)):
            _at_least(f"model.{name}", getattr(self, name), least)
            if getattr(self, name) >= 2**bits:
                raise ValueError(f"model.{name} = {getattr(self, name)} is beyond any machine; keep it below 2^{bits}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads}; "
                             f"use num_heads = {_next_multiple(self.num_heads, self.num_kv_heads)}")
        if self.head_dim % 4:
            raise ValueError(f"model.head_dim = {self.head_dim} is not a multiple of 4 (RoPE turns pairs in half of it); "
                             f"use {_next_multiple(self.head_dim, 4)}")
        if not self.attention_pattern:
            raise ValueError('model.attention_pattern is empty; use ["full"]')
        for kind in self.attention_pattern:
            _one_of("model.attention_pattern", kind, ATTENTION_KINDS)
        slides = any(self.attention_kind(i) == "sliding" for i in range(self.num_layers))
        if slides and self.sliding_window < 1:
            raise ValueError(f"model.attention_pattern has sliding blocks but model.sliding_window = {self.sliding_window}; "
                             "set it to the tokens a block may see, e.g. 4096")
        for name in ("rope_theta", "rope_theta_sliding", "init_std", "router_init_std"):
            _positive(f"model.{name}", getattr(self, name))
        for name in ("init_std", "router_init_std"):
            if getattr(self, name) > 10:  # an fp32 of 1e38 would train on infinities; nobody means more than 1
                raise ValueError(f"model.{name} = {getattr(self, name)} is no standard deviation of weights; use 0.02 or so")
        if abs(self.temperature_init) > 1e30:
            raise ValueError(f"model.temperature_init = {self.temperature_init} is beyond fp32; keep it below 1e30")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from. A batch is a pure function of these keys, train.seed and an integer position."""

    train: tuple[str, ...]
    """Corpus prefixes: each names PREFIX.bin and PREFIX.idx (Megatron's format), and PREFIX.mask if there is a loss mask."""
    weights: tuple[float, ...] = ()
    """Share of the rows drawn from each corpus of train, any scale; empty = in proportion to their tokens."""
    valid: str = ""
    """Prefix of the held-out corpus; empty = no evaluation."""
    tokenizer: str = ""
    """A Hugging Face tokenizer.json, used to sample and to export; empty = none."""
    source: str = ""
    """"stdlib": make train and valid of Python's standard library where neither exists, and the tokenizer; empty = they must exist."""

    def validate(self) -> None:
        if not self.train or "" in self.train:
            raise ValueError(f"data.train = {list(self.train)} names no corpus; name at least one prefix (tools.tokenize_corpus makes one)")
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(f"data.weights has {len(self.weights)} entries for {len(self.train)} corpora in data.train; give one each")
        for weight in self.weights:
            _positive("data.weights", weight)
            if weight > 1e30:  # their sum would be infinite
                raise ValueError(f"data.weights = {weight} is beyond any share; only their ratios count: use smaller ones")
        files = [os.path.abspath(name) for name in self.train]
        twice = next((name for name, file in zip(self.train, files) if files.count(file) > 1), None)
        if twice is not None:
            raise ValueError(f"data.train names corpus {twice} {files.count(os.path.abspath(twice))} times; name it once and give it a "
                             "larger share in data.weights")
        if self.weights:
            blend_rows(self.train, self.weights)
        for key, paths in (("train", self.train), ("valid", (self.valid,)), ("tokenizer", (self.tokenizer,))):
            for path in paths:
                _plain(f"data.{key}", path)
        _one_of("data.source", self.source, ("", "stdlib"))
        if self.source and (len(self.train) != 1 or not self.valid or not self.tokenizer):
            raise ValueError(f"data.source = {self.source!r} builds one train corpus, one valid corpus and a tokenizer, "
                             f"but data.train has {len(self.train)} entries, data.valid = {self.valid!r}, "
                             f"data.tokenizer = {self.tokenizer!r}; name one of each")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: batch, length, arithmetic."""

    steps: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Rows per optimizer step over all ranks."""
    micro_batch_size: int
    """Rows per forward pass on one rank, at most: the rest of a rank's share is accumulated, a smaller share is one pass."""
    seq_len: int
    """Tokens per row."""
    batch_ramp: tuple[int, ...] = ()
    """[start, increment, rows]: the first optimizer steps have `start` rows, growing by `increment` to global_batch_size over so many rows
    of the run (Megatron's --rampup-batch-size); empty: global_batch_size from the first step on."""
    seed: int
    """Seed of initial weights (with the parameter's name) and of the data order."""
    dtype: str = "fp32"
    """fp32 | bf16 (with fp32 masters) | fp64; Newton-Schulz runs in it too."""
    device: str = "auto"
    """auto | cuda (ROCm too) | cpu."""
    kernels: str = "auto"
    """auto (triton on a GPU, cpu on a CPU, reference where they cannot run; environment ZAYA_KERNELS decides first) | triton | cpu (C,
    by the machine's compiler: head dims 32, 64 and 128, no fp64) | reference (plain torch)."""
    recompute: str = "none"
    """none | selective (attention and expert activations) | full (whole blocks) are recomputed in backward."""
    eval_interval: int = 0
    """Steps between evaluations on data.valid, the last step always included; 0 = never."""
    eval_rows: int = 64
    """Rows of data.valid per evaluation."""
    log_interval: int = 1
    """Steps between log lines; metrics.jsonl has every step."""

    def validate(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size", "seq_len", "eval_rows", "log_interval"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("seed", "eval_interval"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("steps", "global_batch_size", "micro_batch_size", "seq_len", "seed", "eval_interval", "eval_rows", "log_interval"):
            if getattr(self, name) >= 2**31:
                raise ValueError(f"train.{name} = {getattr(self, name)} is beyond any run; keep it below 2^31")
        if self.batch_ramp:
            self._validate_ramp()
        _one_of("train.dtype", self.dtype, DTYPES)
        _one_of("train.device", self.device, ("auto", "cuda", "cpu"))
        _one_of("train.kernels", self.kernels, ("auto", "triton", "cpu", "reference"))
        _one_of("train.recompute", self.recompute, ("none", "selective", "full"))

    def _validate_ramp(self) -> None:
        if len(self.batch_ramp) != 3 or not all(1 <= number < 2**62 for number in self.batch_ramp):
            raise ValueError(f"train.batch_ramp = {list(self.batch_ramp)} must be [start, increment, rows], three numbers of at least 1")
        start, increment, _ = self.batch_ramp
        if len(self.batch_sizes()) > MOST_BATCH_SIZES:
            raise ValueError(f"train.batch_ramp = {list(self.batch_ramp)} makes {len(self.batch_sizes())} sizes of batches; use a larger "
                             f"increment, for at most {MOST_BATCH_SIZES}")
        if start > self.global_batch_size or (self.global_batch_size - start) % increment:
            raise ValueError(f"train.batch_ramp = {list(self.batch_ramp)}: {start} rows and a number of increments of {increment} do not "
                             f"make train.global_batch_size = {self.global_batch_size}")

    def batch_sizes(self) -> range:
        """Rows of an optimizer step, every number that occurs, ascending."""
        start, increment = self.batch_ramp[:2] or (self.global_batch_size, 1)
        return range(start, self.global_batch_size + 1, increment)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and its schedule. Which parameter gets which rule is the plan's business (zaya/plan.py)."""

    name: str
    """muon (matrices by Muon, the rest by AdamW) | adamw (everything by AdamW)."""
    lr: float
    """Peak learning rate, of both rules: Muon's update is scaled to AdamW's RMS."""
    min_lr: float
    """Learning rate at the end of the decay."""
    warmup_steps: int
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """cosine (from the warm-up to the last step) | wsd (constant, then linear to min_lr over decay_steps)."""
    decay_steps: int = 0
    """Length of the wsd decay in steps; unused by cosine."""
    weight_decay: float = 0.1
    """Decoupled; on matrices and the embedding only."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.95
    """AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's denominator."""
    momentum: float = 0.95
    """Muon's Nesterov momentum."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 = never."""
    balance_lr: float = 1e-3
    """Learning rate of the router's balance bias (an AdamW of its own)."""

    def validate(self, steps: int) -> None:
        _one_of("optim.name", self.name, ("muon", "adamw"))
        _one_of("optim.schedule", self.schedule, ("cosine", "wsd"))
        _positive("optim.lr", self.lr)
        _positive("optim.eps", self.eps)
        for name in ("min_lr", "warmup_steps", "decay_steps", "weight_decay", "clip", "balance_lr"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"optim.{name} = {value} is outside [0, 1)")
        for name, hint in hints(OptimConfig).items():
            if hint is float and getattr(self, name) > 1e30:
                raise ValueError(f"optim.{name} = {getattr(self, name)} is beyond fp32; keep it below 1e30")
        if self.warmup_steps > steps:
            raise ValueError(f"optim.warmup_steps = {self.warmup_steps} is more than train.steps = {steps}: the peak rate is never "
                             f"reached; set optim.warmup_steps to at most {steps}")
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr = {self.min_lr} is above optim.lr = {self.lr}; lower it")
        if self.schedule == "wsd" and not 0 < self.decay_steps <= steps - self.warmup_steps:
            raise ValueError(f"optim.decay_steps = {self.decay_steps} must lie between 1 and train.steps - optim.warmup_steps = "
                             f"{steps - self.warmup_steps} for the wsd schedule")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks divide the work. Data parallelism is what is left of the world size."""

    tp: int = 1
    """Tensor (and sequence) parallel ranks."""
    cp: int = 1
    """Context parallel ranks."""
    ep: int = 1
    """Expert parallel ranks."""
    pp: int = 1
    """Pipeline parallelism does not exist here: anything but 1 is an error."""
    zero_size: int = 0
    """Ranks that share one set of optimizer shards, with replicas beyond, so that the exchange can stay inside a node; 0 = all."""
    grad_dtype: str = "fp32"
    """Dtype in which gradients are summed over ranks: fp32 (fp64 where train.dtype is) | bf16 (half the traffic)."""
    engine: str = "zaya"
    """zaya | deepspeed (docs/deepspeed.md; AdamW and data parallelism only)."""
    zero_stage: int = 1
    """What DeepSpeed cuts over the ranks: 1 = optimizer state, 2 = and gradients, 3 = and parameters. Unused by zaya, which does 1."""
    offload: bool = False
    """DeepSpeed keeps master weights and optimizer state in the memory of the host and updates them there."""

    def validate(self, world_size: int, model: ModelConfig, seq_len: int) -> None:
        """ValueError names the two numbers that do not fit, and what would."""
        _one_of("parallel.engine", self.engine, ("zaya", "deepspeed"))
        for name in ("tp", "cp", "ep", "pp"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        _at_least("parallel.zero_size", self.zero_size, 0)
        if self.pp > 1:
            raise ValueError(f"parallel.pp = {self.pp}: there is no pipeline parallelism; use pp = 1")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"parallel.zero_stage = {self.zero_stage} is not one of 1, 2, 3")
        if self.engine == "zaya" and (self.zero_stage != 1 or self.offload):
            raise ValueError(f"parallel.zero_stage = {self.zero_stage} and parallel.offload = {str(self.offload).lower()} need "
                             'parallel.engine = "deepspeed": the engine "zaya" does stage 1 on the device')
        _one_of("parallel.grad_dtype", self.grad_dtype, ("fp32", "bf16"))
        misfit = self._misfit(world_size, model)
        if misfit:
            problem, key, candidates = misfit
            changes: Iterator[dict[str, typing.Any]] = ({key: n} for n in candidates)
            fits = [change[key] for change in changes if dataclasses.replace(self, **change)._misfit(world_size, model) is None]
            advice = f"use {key} = {_nearest(getattr(self, key), fits)}" if fits else "no other value of it fits the rest; start from 1"
            raise ValueError(f"{problem}; {advice}")
        # Zig-zag: 2 cp chunks of at least the convolutions' halo of two tokens; each rank's two are cut over tp once more.
        tp, cp = self.tp, self.cp
        parts = cp * math.lcm(2, tp) if cp > 1 else tp
        if seq_len % parts or (cp > 1 and seq_len < 4 * cp):
            least = max(_next_multiple(seq_len, parts), _next_multiple(4 * cp, parts) if cp > 1 else 0)
            raise ValueError(f"train.seq_len = {seq_len} cannot be cut into the {parts} equal parts that parallel.cp = {cp} and "
                             f"parallel.tp = {tp} need; use seq_len = {least}")

    def _misfit(self, world_size: int, model: ModelConfig) -> tuple[str, str, range] | None:
        """The first pair of numbers that does not fit, the key to change, and the values it could have; None: all fit."""
        tp, cp, ep, zero = self.tp, self.cp, self.ep, self.zero_size
        heads, kv_heads, experts = model.num_heads, model.num_kv_heads, model.num_experts
        tps, cps, eps = range(1, min(heads, world_size) + 1), range(1, world_size + 1), range(1, min(experts, world_size) + 1)
        if kv_heads % tp and (tp % kv_heads or heads % tp):
            return (f"parallel.tp = {tp} neither divides model.num_kv_heads = {kv_heads} nor is a multiple of it that divides "
                    f"model.num_heads = {heads}"), "tp", tps
        if model.vocab_size % tp:
            return f"parallel.tp = {tp} does not divide model.vocab_size = {model.vocab_size}", "tp", tps
        if world_size % tp:
            return f"parallel.tp = {tp} does not divide the {world_size} ranks", "tp", tps
        if world_size % (tp * cp):
            return f"parallel.tp * parallel.cp = {tp} * {cp} = {tp * cp} does not divide the {world_size} ranks", "cp", cps
        if experts % ep:
            return f"parallel.ep = {ep} does not divide model.num_experts = {experts}", "ep", eps
        if world_size % ep:
            return f"parallel.ep = {ep} does not divide the {world_size} ranks", "ep", eps
        for what, holders in (("ranks", world_size), ("holders of a tp piece", world_size // tp),
                              ("holders of an expert", world_size // ep),
                              ("holders of a KV head", world_size // tp * max(tp // kv_heads, 1))):
            if zero and holders > zero and holders % zero:
                return f"parallel.zero_size = {zero} does not divide the {holders} {what}", "zero_size", range(1, world_size + 1)
        return None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, what to start from."""

    interval: int = 0
    """Save at every multiple of it and at the last step; 0 = never."""
    resume: str = "auto"
    """auto (newest complete checkpoint of run.dir, if any) | never | path of a checkpoint."""
    keep: int = 0
    """Newest checkpoints to keep; 0 = all."""
    keep_every: int = 0
    """Checkpoints of its multiples are kept for ever, whatever keep says; 0 = none."""
    asynchronous: bool = True
    """Save while the training goes on, from a copy in memory; false: the training waits."""
    staging_gib: float = 32.0
    """Memory for that copy, per rank, at most (and never more than half of what is free): of a larger state the training waits for the
    part that does not fit."""
    verify: str = "read"
    """read: hash what is read at the start (a checkpoint of up to 1 GiB whole) | all: every byte of it first."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of tensors, as "optim.*", that a checkpoint may lack (they keep their initial values) or have too many. For surgery."""
    local_dir: str = ""
    """A fast directory of each node that saves go to; from there they are copied to run.dir in the background. Empty: straight there."""
    mirror_mb_per_s: float = 0.0
    """What that copying may write to the shared storage (and read back), all ranks together, in 10^6 bytes a second; 0 = all it gets."""

    def validate(self) -> None:
        _at_least("checkpoint.interval", self.interval, 0)
        _at_least("checkpoint.keep", self.keep, 0)
        _at_least("checkpoint.keep_every", self.keep_every, 0)
        _at_least("checkpoint.staging_gib", self.staging_gib, 0)
        if self.staging_gib > 2**20:
            raise ValueError(f"checkpoint.staging_gib = {self.staging_gib} is beyond any machine; use 1000, of which no more than half of "
                             "what is free is taken")
        _at_least("checkpoint.mirror_mb_per_s", self.mirror_mb_per_s, 0)
        _one_of("checkpoint.verify", self.verify, ("read", "all"))
        if not self.resume:
            raise ValueError('checkpoint.resume is empty; use "auto", "never" or the path of a checkpoint')
        _plain("checkpoint.resume", self.resume)
        _plain("checkpoint.local_dir", self.local_dir)
        for pattern in self.allow_missing:
            _plain("checkpoint.allow_missing", pattern)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives."""

    dir: str
    """Directory of recipe.toml, metrics.jsonl, checkpoints/, logs/, plots/."""

    def validate(self) -> None:
        if not self.dir:
            raise ValueError("run.dir is empty; name the directory of the run")
        _plain("run.dir", self.dir)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What the weights start from."""

    checkpoint: str = ""
    """A checkpoint whose weights (not optimizer state) a fresh run starts from; empty = random."""

    def validate(self) -> None:
        _plain("init.checkpoint", self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `load_recipe` makes it, `validate(world_size)` checks it, `to_toml` prints it."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    run: RunConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def validate(self, world_size: int) -> None:
        """Raise ValueError naming the keys, their values and the fix, for anything that cannot run on world_size ranks."""
        self.model.validate()
        self.data.validate()
        self.train.validate()
        self.optim.validate(self.train.steps)
        self.parallel.validate(world_size, self.model, self.train.seq_len)
        if self.parallel.engine == "deepspeed":
            self._validate_deepspeed()
        self.checkpoint.validate()
        self.run.validate()
        self.init.validate()
        dp = world_size // (self.parallel.tp * self.parallel.cp)
        rows = self.train.global_batch_size
        if rows % dp:
            share = -(-rows // dp)  # and then a share that is one micro-batch, or several
            share = share if share <= self.train.micro_batch_size else _next_multiple(share, self.train.micro_batch_size)
            raise ValueError(f"train.global_batch_size = {rows} is not a multiple of the {dp} data-parallel ranks; use {share * dp}")
        micro = min(self.train.micro_batch_size, rows // dp)
        if rows // dp % micro:
            raise ValueError(f"train.micro_batch_size = {micro} does not divide a rank's share of {rows // dp} rows "
                             f"(train.global_batch_size = {rows} over {dp} data-parallel ranks); use {math.gcd(rows // dp, micro)}")
        if any(number % dp for number in self.train.batch_ramp[:2]):
            raise ValueError(f"train.batch_ramp = {list(self.train.batch_ramp)}: its batches must be multiples of the {dp} data-parallel "
                             "ranks; make start and increment such")
        if self.train.eval_interval and not self.data.valid:
            raise ValueError(f"train.eval_interval = {self.train.eval_interval} but data.valid is empty; name a held-out corpus")
        if self.train.eval_interval and self.train.eval_rows % dp:
            raise ValueError(f"train.eval_rows = {self.train.eval_rows} is not a multiple of the {dp} data-parallel ranks; "
                             f"use {_next_multiple(self.train.eval_rows, dp)}")

    def _validate_deepspeed(self) -> None:
        """What the DeepSpeed engine does not do."""
        for axis in ("tp", "cp", "ep"):
            size = getattr(self.parallel, axis)
            if size > 1:
                raise ValueError(f'parallel.{axis} = {size}: parallel.engine = "deepspeed" has data parallelism only; use {axis} = 1, '
                                 'or parallel.engine = "zaya"')
        if self.parallel.zero_size:
            raise ValueError(f'parallel.zero_size = {self.parallel.zero_size}: parallel.engine = "deepspeed" cuts the state over all '
                             'ranks; use zero_size = 0, or parallel.engine = "zaya"')
        if self.train.batch_ramp:
            raise ValueError(f'train.batch_ramp = {list(self.train.batch_ramp)}: parallel.engine = "deepspeed" takes the same number of '
                             'micro-batches in every step; leave it out, or use parallel.engine = "zaya"')
        if self.optim.name != "adamw":
            raise ValueError(f'optim.name = "{self.optim.name}": parallel.engine = "deepspeed" does not support Muon (DeepSpeed\'s '
                             'computes another update: half precision, joined matrices as one, another scale); use '
                             'optim.name = "adamw", or parallel.engine = "zaya"')
        if self.train.dtype == "fp64":
            raise ValueError('train.dtype = "fp64": parallel.engine = "deepspeed" keeps its state in fp32; use "fp32" or "bf16", '
                             'or parallel.engine = "zaya"')

    def micro_batches(self, dp: int) -> int:
        """Forward passes of a full batch on each of dp data-parallel ranks."""
        return self.train.global_batch_size // dp // self.micro_batch_rows(dp)

    def micro_batch_rows(self, dp: int, rows: int | None = None) -> int:
        """Rows of one forward pass on each of dp data-parallel ranks, of a batch of so many (by default a full one): at most
        train.micro_batch_size, and a divisor of a rank's share."""
        share = (rows or self.train.global_batch_size) // dp
        return next(n for n in range(min(self.train.micro_batch_size, share), 0, -1) if share % n == 0)

    def identity(self) -> dict[str, object]:
        """What makes two recipes the same run: model, data, optim, seed and sequence length. Everything else may change."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in ("model", "data", "optim")}
        return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()} | {
            "train.seed": self.train.seed, "train.seq_len": self.train.seq_len}

    def to_toml(self) -> str:
        return to_toml(self)


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply `--section.key=value` overrides. ValueError: one line, naming the key and the nearest known one."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"cannot read recipe {path}: {reason}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"recipe {path} is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tables, override, hints(Recipe))
    return recipe_from_tables(tables)


def recipe_from_tables(tables: dict[str, typing.Any]) -> Recipe:
    """A Recipe from nested dicts, as read from TOML or a manifest. ValueError for unknown, missing or mistyped keys."""
    sections = hints(Recipe)
    for name in tables:
        check_known(name, sections, "section")
    return Recipe(**{name: build_section(cls, name, tables.get(name, {})) for name, cls in sections.items()})


def model_from_tables(tables: dict[str, typing.Any]) -> ModelConfig:
    """The model of a recipe that may lack everything else, as a checkpoint's manifest keeps it. ValueError if it does not describe one."""
    model = build_section(ModelConfig, "model", tables.get("model", {}))
    model.validate()
    return model


def _next_multiple(value: int, of: int) -> int:
    return max(1, -(-value // of)) * of


def _nearest(value: int, fits: list[int]) -> str:
    """The fitting numbers on both sides of value."""
    below, above = [n for n in fits if n < value], [n for n in fits if n > value]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{key} = {value} must be at least {least}")


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{key} = {value} must be above 0")


def _one_of(key: str, value: str, allowed: typing.Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} = {value!r} is not one of {', '.join(map(repr, allowed))}")


def _plain(key: str, value: str) -> None:
    """No control characters, which break lines and paths, and nothing that is no text."""
    if any(ord(character) < 32 or character == "\x7f" or "\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{key} = {value!r} holds control characters, or bytes that are no text; use others")


def check_recipe(recipe: Recipe) -> None:
    """ValueError: neither the fewest ranks that the axes need can run it, nor a multiple of them up to zero_size (at most 1,024) times."""
    fewest = math.lcm(recipe.parallel.tp * recipe.parallel.cp, recipe.parallel.ep)
    first: ValueError | None = None
    for multiple in range(1, min(max(recipe.parallel.zero_size, 1), 1024) + 1):  # a tensor's holders must be whole sets of shards
        try:
            return recipe.validate(fewest * multiple)
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def main(argv: list[str]) -> int:
    end_in_one_line("zaya.config")
    if not argv or {"-h", "--help"} & set(argv):
        usage = "usage: python -m zaya.config RECIPE.toml [--section.key=value ...]\n\nValidate a recipe and print it resolved."
        print(usage) if argv else print("zaya.config: name a recipe; see --help", file=sys.stderr)
        return 0 if argv else 2
    try:
        recipe = load_recipe(argv[0], argv[1:])
        check_recipe(recipe)
    except ValueError as error:
        print(f"zaya.config: {error}", file=sys.stderr)
        return 2
    print(recipe.to_toml(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
