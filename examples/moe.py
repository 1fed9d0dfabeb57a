"""The GPT of gpt.py with a mixture of experts in every block, where each token chooses its own.

A router, a linear like any other in the code, picks ``top_k`` of the experts for a token by their
softmax; rows are sorted by expert, and each product of all experts is one grouped GEMM. A further
expert sees every token. The balancing loss of arXiv 2101.03961 keeps the load even.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpt import GPT, Block, FeedForward, Shape
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class MoEShape(Shape):
    """``hidden`` is that of the expert which sees every token."""

    num_experts: int
    top_k: int
    expert_hidden: int
    balance: float = 0.01  # of each layer's balancing loss

    def build(self) -> "MoEGPT":
        return MoEGPT(self)


class Experts(nn.Module):
    """x[T, dim], offs[E] -> the SwiGLU of each row's expert; expert e has the rows to offs[e]."""

    def __init__(self, s: MoEShape) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(s.num_experts, s.expert_hidden, s.dim))
        self.w3 = nn.Parameter(torch.empty(s.num_experts, s.expert_hidden, s.dim))
        self.w2 = nn.Parameter(torch.empty(s.num_experts, s.dim, s.expert_hidden))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        def multiply(x: Tensor, w: Tensor) -> Tensor:
            # Autocast knows linears, not this.
            return F.grouped_mm(x.bfloat16(), w.bfloat16().transpose(-2, -1), offs=offs)

        return multiply(F.silu(multiply(x, self.w1)) * multiply(x, self.w3), self.w2)


class MoE(nn.Module):
    """x[B, T, dim] -> its experts' outputs, weighed, and how uneven their load is: 1 when even."""

    def __init__(self, s: MoEShape) -> None:
        super().__init__()
        self.num_experts, self.top_k = s.num_experts, s.top_k
        self.gate = nn.Linear(s.dim, s.num_experts, bias=False)
        self.experts = Experts(s)
        self.shared = FeedForward(s)
        load = torch.zeros(s.num_experts, dtype=torch.long)  # tokens of each expert so far
        self.register_buffer("load", load, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.flatten(0, 1).bfloat16()  # [T, dim]
        scores = self.gate(h).float().softmax(-1)  # [T, E]
        weights, chosen = scores.topk(self.top_k)  # [T, top_k]
        which = torch.arange(self.num_experts, device=x.device)
        counts = (chosen[..., None] == which).sum((0, 1))  # [E]
        self.load += counts

        order = chosen.flatten().argsort(stable=True)  # [T * top_k]
        sorted_rows = h[order // self.top_k]
        made = self.experts(sorted_rows, counts.cumsum(0).int())
        made = torch.empty_like(made).index_copy(0, order, made)  # row t * top_k + i: t's i-th
        routed = (made.unflatten(0, (-1, self.top_k)) * weights[..., None]).sum(1)

        share = counts / chosen.numel()
        uneven = self.num_experts * (share * scores.mean(0)).sum()
        return (routed + self.shared(h)).view_as(x), uneven


class MoEBlock(Block):
    feed_forward = MoE

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, uneven = self.ffn(self.ffn_norm(x))
        return x + y, uneven


class MoEGPT(GPT):
    """As GPT: the balancing loss adds its gradient, and nothing to the value."""

    block = MoEBlock

    def __init__(self, s: MoEShape) -> None:
        super().__init__(s)
        self.balance = s.balance

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x, uneven = self.embedding(tokens), []
        for block in self.blocks:
            x, u = block(x, self.cos, self.sin)
            uneven.append(u)
        penalty = self.balance * torch.stack(uneven).sum()
        return self.loss(x, targets) + (penalty - penalty.detach())
