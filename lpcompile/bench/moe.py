"""A mixture-of-experts block, as large pretraining has them: DeepSeek's attention and experts.

As in ``models``, the rotary embedding is left out. Routing is decided beforehand: a bias that the
router adds to its scores, as it does to balance experts, is so large that every variant sends every
token to the same experts, in groups of the sizes that are compared.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile.bench.models import EXPERTS, Experts, GroupedSwiGLU, Layer, leaf, linear
from lpcompile.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Sizes of a block, and the tokens of a step: each goes to ``top_k`` of the experts.

    kv_rank: what keys and values are projected to and from; rope_dim: of head_dim, what a rotary
    embedding would turn, one for all heads in the keys. shared: the hidden size of the expert that
    sees every token.
    """

    experts: Experts
    top_k: int
    shared: int
    num_heads: int
    head_dim: int
    rope_dim: int
    value_dim: int
    kv_rank: int
    sequence: int

    @property
    def name(self) -> str:
        return self.experts.name

    @property
    def dim(self) -> int:
        return self.experts.dim

    @property
    def tokens(self) -> int:
        return self.experts.rows // self.top_k

    def with_tokens(self, tokens: int) -> "MoE":
        """The same block on that many tokens."""
        if tokens % min(tokens, self.sequence):
            raise ShapeError(f"tokens come in sequences of {self.sequence}: got {tokens}")
        sequence = min(tokens, self.sequence)
        experts = replace(self.experts, rows=tokens * self.top_k)
        return replace(self, experts=experts, sequence=sequence)

    def bias(self, *, ragged: bool) -> Tensor:
        """[tokens, E] fp32: so large at ``top_k`` experts of each token that they are chosen.

        An expert gets the rows that ``Experts.offsets`` says, from tokens at random.
        """
        offs = self.experts.offsets(ragged=ragged).long()
        sizes = offs.diff(prepend=offs.new_zeros(1))
        if sizes.max() > self.tokens:
            raise ShapeError(f"one of {self.name}'s experts has more rows than there are tokens")
        expert = torch.arange(len(sizes)).repeat_interleave(sizes)  # [tokens * top_k], sorted
        # A token's rows lie ``tokens`` apart and no expert's run is longer: they are different.
        chosen = expert.view(self.top_k, self.tokens).t()
        generator = torch.Generator().manual_seed(2)
        chosen = chosen[torch.randperm(self.tokens, generator=generator)]
        return torch.zeros(self.tokens, len(sizes)).scatter_(1, chosen, 1e3)


MOES = {
    m.name: m
    for m in (
        MoE(
            experts=EXPERTS["deepseek-v3-16b"],
            top_k=6,
            shared=2 * 1408,
            num_heads=16,
            head_dim=192,
            rope_dim=64,
            value_dim=128,
            kv_rank=512,
            sequence=4096,
        ),
        MoE(  # to run the tools anywhere; no model
            experts=replace(EXPERTS["tiny"], name="tiny-moe"),
            top_k=2,
            shared=96,
            num_heads=2,
            head_dim=48,
            rope_dim=16,
            value_dim=32,
            kv_rank=32,
            sequence=64,
        ),
    )
}


class LatentAttention(nn.Module):
    """x[B, T, dim] -> x + wo(causal attention of RMSNorm(x)), keys and values of low rank.

    arXiv 2405.04434, section 2.1, without a low rank of the queries.
    """

    def __init__(self, model: MoE) -> None:
        super().__init__()
        self.num_heads, self.value_dim = model.num_heads, model.value_dim
        self.nope_dim, self.rope_dim = model.head_dim - model.rope_dim, model.rope_dim
        self.kv_rank = model.kv_rank
        self.norm = nn.RMSNorm(model.dim)
        self.wq = linear(model.dim, model.num_heads * model.head_dim)
        self.wkv_a = linear(model.dim, model.kv_rank + model.rope_dim)
        self.kv_norm = nn.RMSNorm(model.kv_rank)
        self.wkv_b = linear(model.kv_rank, model.num_heads * (self.nope_dim + model.value_dim))
        self.wo = linear(model.num_heads * model.value_dim, model.dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        h = self.norm(x)
        q = self.wq(h).unflatten(-1, heads)  # [B, T, heads, head_dim]
        latent, shared = self.wkv_a(h).split((self.kv_rank, self.rope_dim), dim=-1)
        kv = self.wkv_b(self.kv_norm(latent)).unflatten(-1, heads)
        k, v = kv.split((self.nope_dim, self.value_dim), dim=-1)
        shared = shared.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        k = torch.cat((k, shared), dim=-1)  # [B, T, heads, head_dim]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.wo(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """x[..., dim] -> w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = linear(dim, hidden), linear(dim, hidden), linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TokenChoice(nn.Module):
    """x[B, T, dim], bias[B * T, E] -> x + the top k experts of each token + the shared one.

    Softmax scores weigh what the experts give. The steps are those of torchtitan's MoE.
    """

    def __init__(self, model: MoE) -> None:
        super().__init__()
        sizes = model.experts
        self.num_experts, self.top_k = sizes.num_experts, model.top_k
        self.norm = nn.RMSNorm(sizes.dim)
        self.gate = linear(sizes.dim, sizes.num_experts)
        self.experts = GroupedSwiGLU(sizes.num_experts, sizes.dim, sizes.hidden)
        self.shared = SwiGLU(sizes.dim, model.shared)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm(x).flatten(0, 1)  # [tokens, dim]
        scores = F.softmax(self.gate(h).float(), dim=-1)
        chosen = torch.topk(scores + bias, self.top_k, dim=-1).indices  # [tokens, top_k]
        counts = torch.histc(chosen.float(), self.num_experts, 0, self.num_experts)
        order = torch.argsort(chosen.flatten(), stable=True)
        offs = counts.cumsum(0, dtype=torch.int32)
        routed = self.experts(h[order // self.top_k], offs)  # [tokens * top_k, dim]
        out = torch.zeros_like(routed)
        out[order] = routed
        weighted = out.unflatten(0, (-1, self.top_k)) * scores.gather(1, chosen)[..., None]
        y = weighted.sum(1).to(x.dtype) + self.shared(h)
        return x + y.view_as(x)


class MoEBlock(nn.Module):
    """x[B, T, dim], bias[B * T, E] -> TokenChoice(LatentAttention(x))."""

    def __init__(self, model: MoE) -> None:
        super().__init__()
        self.attention = LatentAttention(model)
        self.moe = TokenChoice(model)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.moe(self.attention(x), bias)


def moe_layer(part: str, model: MoE, *, ragged: bool) -> Layer:
    """An "ffn" or a "block" on [batch, sequence, dim]."""
    shape = (model.tokens // model.sequence, model.sequence, model.dim)
    bias = model.bias(ragged=ragged)
    return Layer(
        f"{model.name} ragged" if ragged else model.name,
        model.tokens,
        lambda: {"ffn": TokenChoice, "block": MoEBlock}[part](model),
        lambda device: (leaf(shape, device), bias.to(device)),
        ragged,
    )
