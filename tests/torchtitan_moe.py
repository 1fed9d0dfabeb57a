"""torchtitan's mixture of experts, op by op (pytorch/torchtitan, models/moe/moe.py, of 2026).

    router -> histc -> argsort -> gather -> [score] -> grouped_mm in bf16 -> unsort -> sum
    + a shared expert

with what its configurations choose between, and what its versions do differently around the same
products. ``histc`` takes floats here: the CPU has none of integers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

ALIGN = 16  # rows, where groups are padded


@dataclass(frozen=True)
class MoEArgs:
    """torchtitan's, and two of its versions' ways.

    pads_groups: rows are put in groups of multiples of 16 by index, with a row of zeros between.
    scatters: what experts give is summed by scatter_add, and x read by gather; not by indexing.
    """

    num_experts: int = 8
    top_k: int = 2
    num_shared_experts: int = 1
    score_func: str = "sigmoid"
    route_norm: bool = False
    route_scale: float = 1.0
    score_before_experts: bool = True
    balances: bool = True  # by a bias and no auxiliary loss (arXiv 2408.15664)
    pads_groups: bool = False
    scatters: bool = False


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GroupedExperts(nn.Module):
    """rows[T, dim], counts[E] -> SwiGLU of each group; of what a rank has of the weights."""

    def __init__(self, args, dim, hidden):
        super().__init__()
        self.pads_groups = args.pads_groups
        self.w1 = nn.Parameter(torch.randn(args.num_experts, hidden, dim) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(args.num_experts, dim, hidden) * hidden**-0.5)
        self.w3 = nn.Parameter(torch.randn(args.num_experts, hidden, dim) * dim**-0.5)

    def forward(self, x, counts):
        if not self.pads_groups:
            return self.run(x, counts)
        x = torch.vstack((x, x.new_zeros(x.shape[-1])))
        at, padded = permutation(counts, len(x))
        out = x.new_empty(x.shape)
        out[at, :] = self.run(x[at, :], padded)
        return out[:-1]

    def run(self, x, counts):
        weights = (self.w1, self.w2, self.w3)
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        return run_experts(*weights, x, counts)


def run_experts(w1, w2, w3, x, counts):
    offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
    h = F.silu(torch._grouped_mm(x.bfloat16(), w1.bfloat16().transpose(-2, -1), offs=offs))
    h = h * torch._grouped_mm(x.bfloat16(), w3.bfloat16().transpose(-2, -1), offs=offs)
    return torch._grouped_mm(h, w2.bfloat16().transpose(-2, -1), offs=offs).type_as(x)


def permutation(counts, num_rows):
    """Which row stands at each place when groups are padded, the last one for padding; new counts.

    torchtitan fills this in by a kernel of its own.
    """
    counts = counts.long()
    padded = (counts.clamp_min(ALIGN) + ALIGN - 1) // ALIGN * ALIGN
    length = (num_rows + len(counts) * ALIGN + ALIGN - 1) // ALIGN * ALIGN
    place = torch.arange(length, device=counts.device)
    ends = padded.cumsum(0)
    group = torch.searchsorted(ends, place, right=True).clamp_max(len(counts) - 1)
    within = place - (ends - padded)[group]
    row = (counts.cumsum(0) - counts)[group] + within
    return torch.where(within < counts[group], row, -1), padded


class Router(nn.Module):
    def __init__(self, args, dim):
        super().__init__()
        self.gate = nn.Linear(dim, args.num_experts, bias=False)
        self.args = args

    def forward(self, x, expert_bias):
        args, scores = self.args, self.gate(x)
        if args.score_func == "sigmoid":
            scores = torch.sigmoid(scores.to(torch.float32))
        else:
            scores = F.softmax(scores.to(torch.float32), dim=1)
        if expert_bias is not None:
            _, chosen = torch.topk(scores + expert_bias, k=args.top_k, dim=1)
            top_scores = scores.gather(dim=1, index=chosen)
        else:
            top_scores, chosen = torch.topk(scores, k=args.top_k, dim=1)
        if args.route_norm:
            top_scores = top_scores / (top_scores.sum(dim=-1, keepdim=True) + 1e-20)
        return top_scores * args.route_scale, chosen, histogram(chosen, args.num_experts)


class Reorderer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.num_experts = args.num_experts

    def forward(self, top_scores, chosen):
        order = torch.argsort(chosen.view(-1), stable=True)
        return top_scores.view(-1)[order], order, histogram(chosen, self.num_experts)


def histogram(chosen, num_experts):
    return torch.histc(chosen.view(-1).float(), bins=num_experts, min=0, max=num_experts)


class MoE(nn.Module):
    """x[B, T, dim] -> the sum of the experts of each token, and the shared one."""

    def __init__(self, args, dim, hidden):
        super().__init__()
        self.args = args
        self.experts = GroupedExperts(args, dim, hidden)
        self.router = Router(args, dim)
        self.reorderer = Reorderer(args)
        self.shared_experts = FeedForward(dim, hidden * args.num_shared_experts)
        bias = 0.1 * torch.randn(args.num_experts) if args.balances else None
        self.register_buffer("expert_bias", bias)
        self.register_buffer("tokens_per_expert", torch.zeros(args.num_experts), persistent=False)

    def forward(self, x):
        args, (bs, slen, dim) = self.args, x.shape
        x = x.view(-1, dim)
        top_scores, chosen, counts = self.router(x, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        scores, order, counts = self.reorderer(top_scores, chosen)
        tokens = order // args.top_k
        if args.scatters:
            routed = torch.gather(x, dim=0, index=tokens.reshape(-1, 1).expand(-1, dim))
        else:
            routed = x[tokens]
        if args.score_before_experts:
            routed = (routed.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
        routed = self.experts(routed, counts)
        out = self.shared_experts(x)
        if args.scatters:
            if not args.score_before_experts:
                routed = (routed.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
            index = tokens.reshape(-1, 1).expand(-1, dim)
            return out.scatter_add(dim=0, index=index, src=routed).reshape(bs, slen, dim)
        unsorted = torch.zeros(
            (bs * slen * args.top_k, dim), dtype=routed.dtype, device=routed.device
        )
        unsorted[order] = routed
        unsorted = unsorted.reshape(-1, args.top_k, dim)
        if args.score_before_experts:
            summed = unsorted.sum(dim=1)
        else:
            weights = top_scores.reshape(-1, 1, args.top_k)
            summed = torch.bmm(weights, unsorted.float()).to(x.dtype).squeeze(1)
        return (out + summed).reshape(bs, slen, dim)
