"""A small GPT over tokens[B, T]: RMSNorm, rotary attention, SwiGLU, linears without bias.

The model of today's open pretraining code (Llama's), cut down. Parameters stay fp32 and the caller
runs it under bf16 autocast, as pretraining does: a bf16 weight of size 1 cannot take an update
below 2^-9, and late updates are smaller. The layout of Llama3-8B is here too, for ``explain``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; every one that a GEMM meets is a multiple of 16, as FP8 GEMMs ask."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    context: int
    vocabulary: int = 256  # bytes
    rope_base: float = 10_000.0

    def build(self) -> "GPT":
        """A model of this shape, with new weights."""
        return GPT(self)


TINY = Shape(dim=128, num_layers=2, num_heads=4, num_kv_heads=4, hidden=352, context=128)
SMALL = Shape(dim=512, num_layers=8, num_heads=8, num_kv_heads=8, hidden=1408, context=512)
MEDIUM = Shape(dim=768, num_layers=14, num_heads=12, num_kv_heads=12, hidden=2048, context=1024)
LLAMA3_8B = Shape(
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    hidden=14336,
    context=8192,
    vocabulary=128_256,
    rope_base=500_000.0,
)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.head_dim = s.dim // s.num_heads
        kv = s.num_kv_heads * self.head_dim
        self.grouped_query = s.num_kv_heads != s.num_heads
        self.wq = nn.Linear(s.dim, s.dim, bias=False)
        self.wk = nn.Linear(s.dim, kv, bias=False)
        self.wv = nn.Linear(s.dim, kv, bias=False)
        self.wo = nn.Linear(s.dim, s.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )  # [B, heads, T, head_dim]
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            is_causal=True,
            enable_gqa=self.grouped_query,
        )
        return self.wo(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(s.dim, s.hidden, bias=False)
        self.w3 = nn.Linear(s.dim, s.hidden, bias=False)
        self.w2 = nn.Linear(s.hidden, s.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    feed_forward: type[nn.Module] = FeedForward

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(s.dim, eps=1e-5)
        self.attention = Attention(s)
        self.ffn_norm = nn.RMSNorm(s.dim, eps=1e-5)
        self.ffn = self.feed_forward(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    """tokens[B, T], targets[B, T] -> the mean cross-entropy, in nats per token."""

    block: type[nn.Module] = Block

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(s.vocabulary, s.dim)
        self.blocks = nn.ModuleList(self.block(s) for _ in range(s.num_layers))
        self.norm = nn.RMSNorm(s.dim, eps=1e-5)
        self.head = nn.Linear(s.dim, s.vocabulary, bias=False)
        cos, sin = rotary(s)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset(s)

    def reset(self, s: Shape) -> None:
        """Normal weights; what writes to the residual stream is scaled by its depth (GPT-2)."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("wo.weight", "w2.weight", "experts.w2"))
                nn.init.normal_(p, std=0.02 / (2 * s.num_layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)  # [B, T, dim]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """x[B, T, dim] after the last block, targets[B, T] -> the mean cross-entropy."""
        logits = self.head(self.norm(x))  # [B, T, vocabulary]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def rotary(s: Shape) -> tuple[Tensor, Tensor]:
    """cos[T, head_dim / 2], sin[T, head_dim / 2] of arXiv 2104.09864."""
    head_dim = s.dim // s.num_heads
    frequency = s.rope_base ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(s.context).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x[B, heads, T, head_dim] turned by its position, first half against second half."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
