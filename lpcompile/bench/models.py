"""The models that are measured, defined once: sizes, linears, and modules in plain PyTorch.

A Block has no rotary embedding and an FFN has its norm and its residual, as published comparisons
of FP8 training have them: what is left out costs every variant the same.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class Llama:
    """Sizes of a Llama3, and the tokens of a step: batch sequences of ``sequence``."""

    name: str
    dim: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    vocabulary: int
    batch: int
    sequence: int
    head_dim: int = 128

    @property
    def tokens(self) -> int:
        """Rows of every linear."""
        return self.batch * self.sequence

    def with_tokens(self, tokens: int) -> "Llama":
        """The same model on that many tokens, in sequences of at most 8192."""
        sequence = min(tokens, 8192)
        if tokens % sequence:
            raise ShapeError(f"tokens above 8192 come in sequences of 8192: got {tokens}")
        return replace(self, batch=tokens // sequence, sequence=sequence)

    def shard(self, ranks: int) -> "Llama":
        """What one of ``ranks`` tensor-parallel ranks computes; the communication is left out."""
        if ranks == 1:
            return self
        if any(n % ranks for n in (self.hidden, self.num_heads, self.num_kv_heads)):
            raise ShapeError(f"{self.name} cannot be cut over {ranks} ranks: its heads do not tile")
        return replace(
            self,
            name=f"{self.name} tp{ranks}",
            hidden=self.hidden // ranks,
            num_heads=self.num_heads // ranks,
            num_kv_heads=self.num_kv_heads // ranks,
        )


LLAMAS = {
    m.name: m
    for m in (
        Llama(
            name="llama3-8b",
            dim=4096,
            hidden=14336,
            num_heads=32,
            num_kv_heads=8,
            num_layers=32,
            vocabulary=128256,
            batch=2,
            sequence=8192,
        ),
        Llama(
            name="llama3-70b",
            dim=8192,
            hidden=28672,
            num_heads=64,
            num_kv_heads=8,
            num_layers=80,
            vocabulary=128256,
            batch=1,
            sequence=8192,
        ),
        Llama(  # to run the tools anywhere; no model
            name="tiny",
            dim=64,
            hidden=128,
            num_heads=4,
            num_kv_heads=2,
            num_layers=2,
            vocabulary=96,
            batch=2,
            sequence=16,
            head_dim=16,
        ),
    )
}


class Linear(NamedTuple):
    """W[n, k], and how many linears read the same input."""

    name: str
    n: int
    k: int
    readers: int


def linears(model: Llama, part: str) -> tuple[Linear, ...]:
    """The linears of an "ffn" or a "block"."""
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    ffn = (
        Linear("w1, w3", model.hidden, model.dim, 2),
        Linear("w1, w3", model.hidden, model.dim, 2),
        Linear("w2", model.dim, model.hidden, 1),
    )
    attention = (
        Linear("wq", heads, model.dim, 3),
        Linear("wk, wv", kv_heads, model.dim, 3),
        Linear("wk, wv", kv_heads, model.dim, 3),
        Linear("wo", model.dim, heads, 1),
    )
    return ffn if part == "ffn" else (*attention, *ffn)


def _linear(k: int, n: int) -> nn.Linear:
    return nn.Linear(k, n, bias=False)


class FFN(nn.Module):
    """x[B, T, dim] -> x + w2(silu(w1 n) * w3 n), n = RMSNorm(x)."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(model.dim)
        self.w1 = _linear(model.dim, model.hidden)
        self.w3 = _linear(model.dim, model.hidden)
        self.w2 = _linear(model.hidden, model.dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Attention(nn.Module):
    """x[B, T, dim] -> x + wo(causal grouped-query attention of RMSNorm(x))."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.norm = nn.RMSNorm(model.dim)
        self.wq = _linear(model.dim, model.num_heads * model.head_dim)
        self.wk = _linear(model.dim, model.num_kv_heads * model.head_dim)
        self.wv = _linear(model.dim, model.num_kv_heads * model.head_dim)
        self.wo = _linear(model.num_heads * model.head_dim, model.dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            w(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
            for w in (self.wq, self.wk, self.wv)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.wo(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x[B, T, dim] -> FFN(Attention(x))."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.attention = Attention(model)
        self.ffn = FFN(model)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.attention(x))


class Transformer(nn.Module):
    """tokens[B, T] -> the mean cross-entropy of predicting targets[B, T]."""

    def __init__(self, model: Llama, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocabulary, model.dim)
        self.layers = nn.ModuleList(Block(model) for _ in range(num_layers))
        self.norm = nn.RMSNorm(model.dim)
        self.head = _linear(model.dim, model.vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))  # [B, T, vocabulary]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build(part: str, model: Llama, device: torch.device) -> nn.Module:
    """An "ffn" or a "block" in bf16 on the device, from the seed in force."""
    with torch.device(device):
        return {"ffn": FFN, "block": Block}[part](model).to(torch.bfloat16)
