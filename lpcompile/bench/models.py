"""The models that are measured, defined once: sizes, linears, and modules in plain PyTorch.

A Block has no rotary embedding and an FFN has its norm and its residual, as published comparisons
of FP8 training have them: what is left out costs every variant the same.
"""

from collections.abc import Callable
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


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Sizes of the SwiGLU experts that one GPU holds, and the rows that reach them in a step."""

    name: str
    num_experts: int
    rows: int
    dim: int
    hidden: int

    def with_tokens(self, rows: int) -> "Experts":
        """The same experts on that many rows."""
        return replace(self, rows=rows)

    def offsets(self, *, ragged: bool) -> Tensor:
        """Where the rows of each expert end, int32; group sizes differ by up to 4 times.

        Sizes are multiples of 16, or of 1 where ragged.
        """
        generator = torch.Generator().manual_seed(1)
        share = torch.rand(self.num_experts, generator=generator) + 0.3
        step = 1 if ragged else 16
        sizes = (share / share.sum() * self.rows / step).long() * step
        sizes[-1] += self.rows - sizes.sum()
        return sizes.cumsum(0).to(torch.int32)


EXPERTS = {
    name: Experts(name=name, num_experts=e, rows=rows, dim=dim, hidden=hidden)
    for name, e, rows, dim, hidden in (
        ("deepseek-v3-16b", 64, 98304, 2048, 1408),
        ("deepseek-v3-16b-ep8", 8, 196608, 2048, 1408),
        ("deepseek-v3-671b", 8, 65536, 7168, 2048),
        ("llama4-scout", 4, 65536, 5120, 8192),
        ("qwen3-30b", 128, 131072, 2048, 768),
        ("tiny", 4, 256, 64, 128),
    )
}


class Linear(NamedTuple):
    """W[n, k]."""

    name: str
    n: int
    k: int


def linears(model: Llama, part: str) -> tuple[Linear, ...]:
    """The linears of an "ffn" or a "block"."""
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    ffn = (
        Linear("w1, w3", model.hidden, model.dim),
        Linear("w1, w3", model.hidden, model.dim),
        Linear("w2", model.dim, model.hidden),
    )
    attention = (
        Linear("wq", heads, model.dim),
        Linear("wk, wv", kv_heads, model.dim),
        Linear("wk, wv", kv_heads, model.dim),
        Linear("wo", model.dim, heads),
    )
    return ffn if part == "ffn" else (*attention, *ffn)


def linear(k: int, n: int) -> nn.Linear:
    """A linear of the models: without a bias."""
    return nn.Linear(k, n, bias=False)


class FFN(nn.Module):
    """x[B, T, dim] -> x + w2(silu(w1 n) * w3 n), n = RMSNorm(x)."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(model.dim)
        self.w1 = linear(model.dim, model.hidden)
        self.w3 = linear(model.dim, model.hidden)
        self.w2 = linear(model.hidden, model.dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Attention(nn.Module):
    """x[B, T, dim] -> x + wo(causal grouped-query attention of RMSNorm(x))."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.norm = nn.RMSNorm(model.dim)
        self.wq = linear(model.dim, model.num_heads * model.head_dim)
        self.wk = linear(model.dim, model.num_kv_heads * model.head_dim)
        self.wv = linear(model.dim, model.num_kv_heads * model.head_dim)
        self.wo = linear(model.num_heads * model.head_dim, model.dim)

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
        self.head = linear(model.dim, model.vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))  # [B, T, vocabulary]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Routed(nn.Module):
    """x[rows, dim], offs[E] -> SwiGLU experts, each on its own rows."""

    def __init__(self, model: Experts) -> None:
        super().__init__()
        self.experts = GroupedSwiGLU(model.num_experts, model.dim, model.hidden)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return self.experts(x, offs)


class GroupedSwiGLU(nn.Module):
    """x[T, D] -> w2[e] (silu(w1[e] x) * w3[e] x), e the group of the row."""

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, hidden, dim) * dim**-0.5)
        self.w3 = nn.Parameter(torch.randn(num_experts, hidden, dim) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(num_experts, dim, hidden) * hidden**-0.5)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        def grouped(x: Tensor, w: Tensor) -> Tensor:
            return torch._grouped_mm(x, w.transpose(-2, -1), offs=offs)

        return grouped(F.silu(grouped(x, self.w1)) * grouped(x, self.w3), self.w2)


@dataclass(frozen=True)
class Layer:
    """Something to take a forward and a backward through.

    inputs: of which the first needs a gradient, as a function of the device.
    is_ragged: whether it has groups of rows that are no multiples of 16.
    """

    model: str
    tokens: int
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.device], tuple[Tensor, ...]]
    is_ragged: bool = False


def llama_layer(part: str, model: Llama) -> Layer:
    """An "ffn" or a "block" on [batch, sequence, dim]."""
    shape = (model.batch, model.sequence, model.dim)
    return Layer(
        model.name,
        model.tokens,
        lambda: {"ffn": FFN, "block": Block}[part](model),
        lambda device: (leaf(shape, device),),
    )


def experts_layer(model: Experts, *, ragged: bool) -> Layer:
    """Experts on [rows, dim], the rows sorted by expert."""
    offs = model.offsets(ragged=ragged)
    return Layer(
        f"{model.name} ragged" if ragged else model.name,
        model.rows,
        lambda: Routed(model),
        lambda device: (leaf((model.rows, model.dim), device), offs.to(device)),
        ragged,
    )


def built(layer: Layer, device: torch.device) -> nn.Module:
    """The layer's module in bf16 on the device, from seed 0."""
    torch.manual_seed(0)
    with torch.device(device):
        return layer.build().to(torch.bfloat16)


def drawn(layer: Layer, device: torch.device) -> tuple[Tensor, ...]:
    """The layer's inputs, from seed 1.

    From the weights' own seed a row of x would be a row of a weight, and their product an outlier
    that most of a gradient then comes from.
    """
    torch.manual_seed(1)
    return layer.inputs(device)


def leaf(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A random input that needs a gradient."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
