"""A dense transformer over two ranks: how it is spread, and what each rank sees of it."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import BOUNDS, WORLD, gradients, step, wholes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import lpcompile
from lpcompile.pipeline import observe

DIM, HIDDEN, HEADS, BATCH, TOKENS = 128, 256, 4, 2, 128
WEIGHTS = {  # of a block: N, K
    **{f"attention.w{c}": (DIM, DIM) for c in "qkvo"},
    "ffn.w1": (HIDDEN, DIM),
    "ffn.w3": (HIDDEN, DIM),
    "ffn.w2": (DIM, HIDDEN),
}
ROW_PARALLEL = {"attention.wo", "ffn.w2"}  # contracted over what a rank has


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("wq", "wk", "wv", "wo"):
            self.add_module(name, nn.Linear(DIM, DIM, bias=False))

    def forward(self, x):
        b, t, _ = x.shape
        heads = (b, t, -1, DIM // HEADS)
        q, k, v = (w(x).view(heads).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.wo(y.reshape(b, t, -1))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, checkpoints):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention, self.ffn = Attention(), FeedForward()
        self.checkpoints = checkpoints

    def body(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpoints else self.body(x)


class Model(nn.Module):
    def __init__(self, case, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(case.checkpoints) for _ in range(case.num_layers))
        self.to(torch.bfloat16)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Case:
    """How a model is spread over two ranks, and what it is narrowed to.

    masters: fp32 parameters, all-gathered and computed with in bf16.
    converted: by ``lpcompile.convert``, not compiled.
    """

    name: str
    spread: str  # "fsdp", "tp" or "sp"
    recipe: str = "fp8_rowwise"
    codegen: str = "eager"
    masters: bool = False
    checkpoints: bool = False
    converted: bool = False
    num_layers: int = 1


SPREADS = ("fsdp", "tp", "sp")
CHECKPOINTED = [Case(f"{spread} of two layers", spread, num_layers=2) for spread in SPREADS]
CASES = [
    *CHECKPOINTED,
    *(Case(f"{at} {recipe}", at, recipe) for recipe in [*BOUNDS][1:] for at in SPREADS),
    Case("fsdp over fp32 masters", "fsdp", masters=True),
    Case("fsdp with checkpointing", "fsdp", checkpoints=True),
    Case("fsdp in full Inductor", "fsdp", codegen="inductor"),
    *(
        Case(f"{at} {recipe} converted", at, recipe, converted=True)
        for recipe in ("mxfp8", "nvfp4")
        for at in SPREADS
    ),
]
SWITCHED = Case("fsdp with checkpointing, switched", "fsdp", "bf16", checkpoints=True, num_layers=2)


def compile_layers(model, case, mesh=None):
    if case.converted:
        lpcompile.convert(model, case.recipe)
        return
    options = {"recipe": case.recipe, "rewrite": "all", "codegen": case.codegen}
    for layer in model.layers:
        layer.compile(backend="lowprec", options=options, fullgraph=True)


def fsdp(model, case, mesh):
    policy = MixedPrecisionPolicy()
    if case.masters:
        model.float()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def tensor_parallel(model, case, mesh):
    sequence = case.spread == "sp"
    out = {"output_layouts": Shard(1), "use_local_output": False} if sequence else {}
    plan = {n: RowwiseParallel(**out) if n in ROW_PARALLEL else ColwiseParallel() for n in WEIGHTS}
    if sequence:
        plan |= {"attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel()}
        for name in ("attention", "ffn"):
            layouts = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
            plan[name] = PrepareModuleInput(**layouts)
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)


def parallel(case, mesh, seed=0):
    model = Model(case, seed).to(mesh.device_type)
    changes = [fsdp if case.spread == "fsdp" else tensor_parallel, compile_layers]
    for change in reversed(changes) if case.converted else changes:
        change(model, case, mesh)
    return model


def batch(device):
    torch.manual_seed(1)
    return tuple(torch.randn(2, BATCH, TOKENS, DIM).bfloat16().to(device))


def share(case, mesh):
    """This rank's x and target."""
    x, target = batch(mesh.device_type)
    if case.spread == "fsdp":
        x, target = (t.chunk(WORLD)[mesh.get_rank()] for t in (x, target))
    if case.spread == "sp":
        x = distribute_tensor(x, mesh, [Shard(1)])
    return x.requires_grad_(), target  # like the second layer's, so that one compile serves both


def run_case(case, mesh):
    """What a rank sees of one step: loss and gradients of the whole, the GEMMs of its shard."""
    torch._dynamo.reset()
    model = parallel(case, mesh)
    with observe() as compiles:
        loss = step(model, *share(case, mesh))
    dist.all_reduce(loss)
    return {
        "loss": loss.item() / WORLD,
        "gradients": gradients(model),
        "rows": [tuple(row) for c in compiles for row in c.rows],
        "keys": list(model.state_dict()),
    }


def run_checkpoint(case, mesh, folder, recipe=None):
    """A step after save and load, into a model of another seed, and the step without them.

    recipe: what the model that goes on is switched to, and the loaded one begins with.
    """

    def start(seed, case=case):
        model = parallel(case, mesh, seed)
        # One by one: torch 2.11's loops over many, the default on a GPU, take no DTensors (of what
        # TP cuts) beside plain tensors (the norms).
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)

    def train(model, optimizer):
        loss = step(model, *share(case, mesh))
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model, optimizer = start(seed=0)
    with observe() as first:
        train(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    saved = wholes(model.named_parameters())
    if recipe is not None:
        lpcompile.switch(model, recipe)
    with observe() as second:
        on = train(model, optimizer), wholes(model.named_parameters())
    if recipe is not None:
        lpcompile.switch(model, case.recipe)
    with observe() as third:
        train(model, optimizer)

    torch._dynamo.reset()
    model, optimizer = start(7, replace(case, recipe=recipe or case.recipe))
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    resumed = train(model, optimizer), wholes(model.named_parameters())
    recipes = [[{row.recipe for row in c.rows} for c in cs] for cs in (first, second, third)]
    return {"saved": saved, "on": on, "resumed": resumed, "recipes": recipes}


def jobs(mesh, folder):
    """What a rank runs: functions by the name of what they leave."""
    made = {case.name: (run_case, case, mesh) for case in CASES}
    for case in CHECKPOINTED:
        place = str(folder / f"checkpoint {case.spread}")
        made[f"checkpoint {case.spread}"] = (run_checkpoint, case, mesh, place)
    made[SWITCHED.name] = (run_checkpoint, SWITCHED, mesh, str(folder / "switched"), "mxfp8")
    return made
