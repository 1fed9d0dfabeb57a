"""A mixture of experts over two ranks: how it is spread, and what each rank sees of it.

fsdp       each rank has half of the batch, and gathers every weight
tp         each rank has all tokens, and half of the hidden features of every expert: w1 and w3
           are column-parallel, w2 is row-parallel, and the experts multiply local shards
sp         the same, with half of the sequence outside the experts
dtensors   as tp, with the experts' products called on DTensors
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from ranks import WORLD, gradients, step
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torchtitan_moe import GroupedExperts, MoE, MoEArgs, run_experts

from lpcompile.pipeline import observe

DIM, HIDDEN, BATCH, TOKENS = 64, 96, 2, 64


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.moe = MoE(args, DIM, HIDDEN)

    def forward(self, x):
        return x + self.moe(self.norm(x))


@dataclass(frozen=True)
class Case:
    """How a block is spread over two ranks, and what it is narrowed to.

    masters: fp32 parameters, all-gathered and computed with in bf16.
    """

    name: str
    spread: str
    recipe: str = "fp8_rowwise"
    codegen: str = "eager"
    masters: bool = False
    args: MoEArgs = MoEArgs(num_experts=4)


# As for a dense model; but under one scale for all, an expert's smallest columns have few bits.
BOUNDS = dict(fp8_rowwise=0.1, fp8_tensorwise=0.4, fp8_blockwise=0.1)
AFTER = MoEArgs(num_experts=4, score_func="softmax", score_before_experts=False, balances=False)
CASES = [
    *(Case(f"experts {spread}", spread) for spread in ("fsdp", "tp", "sp", "dtensors")),
    *(
        Case(f"experts {spread} {recipe}", spread, recipe)
        for recipe in ("fp8_tensorwise", "fp8_blockwise")
        for spread in ("fsdp", "tp")
    ),
    *(Case(f"experts {at}, scored after", at, args=AFTER) for at in ("fsdp", "sp")),
    Case("experts fsdp over fp32 masters", "fsdp", masters=True),
    Case("experts tp, padded groups", "tp", args=MoEArgs(num_experts=4, pads_groups=True)),
    Case("experts tp in full Inductor", "tp", codegen="inductor"),
]


def build(case):
    torch.manual_seed(0)
    return Block(case.args).to(torch.bfloat16)


def batch(device):
    torch.manual_seed(1)
    return tuple(torch.randn(2, BATCH, TOKENS, DIM).bfloat16().to(device))


def compile_block(model, case, codegen=None):
    options = {"recipe": case.recipe, "rewrite": "all", "codegen": codegen or case.codegen}
    if options["codegen"] == "inductor":  # fused, a producer's rounding falls away and codes move
        options["emulate_precision_casts"] = True
    model.compile(backend="lowprec", options=options, fullgraph=True)


class ExpertParallel(ParallelStyle):
    """Experts' hidden features over the ranks; every rank sees all rows and gives a partial sum."""

    def _apply(self, module, mesh):
        for name, dim in (("w1", 1), ("w3", 1), ("w2", 2)):
            shard = distribute_tensor(getattr(module, name), mesh, [Shard(dim)])
            module.register_parameter(name, nn.Parameter(shard))

        if not isinstance(module, DTensorExperts):
            module.register_forward_pre_hook(partial(self.enter, mesh))
        return module

    @staticmethod
    def enter(mesh, module, inputs):
        x = DTensor.from_local(inputs[0], mesh, [Replicate()])
        return x.to_local(grad_placements=[Partial()]), *inputs[1:]


class ScoresOfPartialSums(ParallelStyle):
    """A router whose scores weigh partial sums, so that each rank has a part of their gradient."""

    def _apply(self, module, mesh):
        def leave(module, inputs, out):
            scores = DTensor.from_local(out[0], mesh, [Replicate()])
            return scores.to_local(grad_placements=[Partial()]), *out[1:]

        module.register_forward_hook(leave)
        return module


class DTensorExperts(GroupedExperts):
    """The experts with their products called on DTensors."""

    def run(self, x, counts):
        mesh = self.w1.device_mesh
        x, counts = (DTensor.from_local(t, mesh, [Replicate()]) for t in (x, counts))
        out = run_experts(self.w1, self.w2, self.w3, x, counts)
        return out.to_local(grad_placements=[Replicate()])


class ShardedExperts(GroupedExperts):
    """What the ranks' experts give together, in one process: the sum over their hidden features."""

    def run(self, x, counts):
        w1, w3 = (w.chunk(WORLD, 1) for w in (self.w1, self.w3))
        shards = zip(w1, self.w2.chunk(WORLD, 2), w3, strict=True)
        return sum(run_experts(*shard, x, counts) for shard in shards)


def tensor_parallel(model, case, mesh):
    around = Shard(1) if case.spread == "sp" else Replicate()
    plan = {
        "moe": PrepareModuleInputOutput(
            input_layouts=around,
            desired_input_layouts=Replicate(),
            use_local_input=True,
            output_layouts=Partial(),
            desired_output_layouts=around,
            use_local_output=case.spread != "sp",
        ),
        "moe.experts": ExpertParallel(),
        "moe.shared_experts.w1": ColwiseParallel(),
        "moe.shared_experts.w3": ColwiseParallel(),
        "moe.shared_experts.w2": RowwiseParallel(output_layouts=Partial()),
    }
    if not case.args.score_before_experts:
        plan["moe.router"] = ScoresOfPartialSums()
    if case.spread == "sp":
        plan["norm"] = SequenceParallel()
    if case.spread == "dtensors":
        model.moe.experts.__class__ = DTensorExperts
    parallelize_module(model, mesh, plan)


def fsdp(model, case, mesh):
    policy = MixedPrecisionPolicy()
    if case.masters:
        model.float()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def share(case, mesh):
    """This rank's x and target."""
    x, target = batch(mesh.device_type)
    if case.spread == "fsdp":
        x, target = (t.chunk(WORLD)[mesh.get_rank()] for t in (x, target))
    if case.spread == "sp":
        x = distribute_tensor(x, mesh, [Shard(1)])
    return x.requires_grad_(), target


def run_case(case, mesh):
    """What a rank sees of one step: loss and gradients of the whole, the GEMMs of its shard."""
    torch._dynamo.reset()
    model = build(case).to(mesh.device_type)
    (fsdp if case.spread == "fsdp" else tensor_parallel)(model, case, mesh)
    compile_block(model, case)
    with observe() as compiles:
        loss = step(model, *share(case, mesh))
    dist.all_reduce(loss)
    return {
        "loss": loss.item() / WORLD,
        "gradients": gradients(model),
        "rows": [tuple(row) for c in compiles for row in c.rows],
    }


def jobs(mesh):
    """What a rank runs: functions by the name of what they leave."""
    return {case.name: (run_case, case, mesh) for case in CASES}
