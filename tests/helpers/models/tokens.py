"""Tokens: embeddings, attention, encoders, class tokens and position embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.models.base import Net, Parts, case


@case()
def embedding(n: int) -> Parts:
    """A padding index, and tokens that repeat within and across samples."""
    index = torch.randint(0, 7, (n, 5))
    index[:, 0], index[:, 1] = 2, 3
    return Parts(nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3)), (index,))


@case()
def embedding_one_token(n: int) -> Parts:
    return Parts(nn.Sequential(nn.Embedding(6, 4), nn.Tanh()), (torch.randint(0, 6, (n,)),))


@case()
def embedding_sparse(n: int) -> Parts:
    """The gradient of the table is a sparse tensor."""
    return Parts(
        nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3)),
        (torch.randint(0, 6, (n, 5)),),
    )


@case()
def embedding_scaled_by_frequency(n: int) -> Parts:
    net = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Tanh())
    return Parts(net, (torch.randint(0, 4, (n, 5)),))


@case()
def embedding_bag(n: int) -> Parts:
    def run(self: Net, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        summed = self.sum(index, offsets, per_sample_weights=weights)
        return torch.tanh(torch.cat([self.mean(index, offsets), summed], 1))

    parts = {"mean": nn.EmbeddingBag(7, 4, mode="mean"), "sum": nn.EmbeddingBag(7, 3, mode="sum")}
    sizes = torch.arange(n) % 3 + 1
    inputs = (
        torch.randint(0, 7, (int(sizes.sum()),)),
        sizes.cumsum(0) - sizes,
        torch.rand(int(sizes.sum())),
    )
    return Parts(Net(run, **parts), inputs)


@case()
def indexed_parameter(n: int) -> Parts:
    """Rows of a parameter read by indexing, index_select and gather."""

    def run(self: Net, index: Tensor) -> Tensor:
        # [N, S, 4]
        h = self.table[index] + self.other.index_select(0, index.flatten()).unflatten(
            0, index.shape
        )
        return torch.tanh(h) * self.scalars.gather(0, index.flatten()).view_as(index).unsqueeze(-1)

    parts = {"table": torch.randn(6, 4), "other": torch.randn(6, 4), "scalars": torch.randn(6)}
    return Parts(
        Net(run, **{k: nn.Parameter(v) for k, v in parts.items()}), (torch.randint(0, 6, (n, 5)),)
    )


@case()
def vit(n: int) -> Parts:
    """Patches, an expanded class token and an added position embedding, both on the root module."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)  # [N, 4, 6]
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), h], 1) + self.position  # [N, 5, 6]
        h = h + self.attention(self.norm(h), self.norm(h), self.norm(h), need_weights=False)[0]
        return self.last(h + self.mlp(h))[:, 0]

    parts = {
        "patch": nn.Conv2d(3, 6, 2, stride=2),
        "token": nn.Parameter(torch.randn(1, 1, 6)),
        "position": nn.Parameter(torch.randn(1, 5, 6)),
        "attention": nn.MultiheadAttention(6, 2, batch_first=True),
        "norm": nn.LayerNorm(6),
        "mlp": nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6)),
        "last": nn.LayerNorm(6),
    }
    return Parts(Net(run, **parts), (torch.randn(n, 3, 4, 4),))


@case()
def broadcast_positions(n: int) -> Parts:
    """Position embeddings without a batch dimension, and one expanded by `repeat`."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = x + self.position + self.channel.expand_as(x)
        return torch.tanh(torch.cat([h, self.query.repeat(x.shape[0], 2, 1)], 1))  # [N, 9, 3]

    parts = {"position": torch.randn(5, 3), "channel": torch.randn(3), "query": torch.randn(2, 3)}
    return Parts(
        Net(run, **{k: nn.Parameter(v) for k, v in parts.items()}), (torch.randn(n, 5, 3),)
    )


@case(dropout=True)
def self_attention(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]

    attention = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)
    return Parts(Net(run, attention=attention), (torch.randn(n, 5, 6),))


@case(dropout=True)
def cross_attention(n: int) -> Parts:
    """Queries and keys of unequal width and length, extra key and value biases, sequence first."""

    def run(self: Net, x: Tensor, memory: Tensor) -> Tensor:
        q, kv = x.transpose(0, 1), memory.transpose(0, 1)
        return self.attention(q, kv, kv, need_weights=False)[0].transpose(0, 1)

    attention = nn.MultiheadAttention(6, 3, dropout=0.2, kdim=4, vdim=4, add_bias_kv=True)
    return Parts(Net(run, attention=attention), (torch.randn(n, 5, 6), torch.randn(n, 3, 4)))


@case()
def fused_attention(n: int) -> Parts:
    """A packed projection split by chunk, scaled_dot_product_attention, a causal mask."""

    def run(self: Net, x: Tensor) -> Tensor:
        # [N, 2, S, 3] each
        q, k, v = self.packed(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h.transpose(1, 2).flatten(2))

    return Parts(Net(run, packed=nn.Linear(4, 18), out=nn.Linear(6, 4)), (torch.randn(n, 5, 4),))


@case()
def encoder_batch_first(n: int) -> Parts:
    layer = nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True)
    return Parts(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(n, 5, 6),)
    )


@case(dropout=True)
def encoder_sequence_first(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        return self.encoder(x.transpose(0, 1)).transpose(0, 1)

    layer = nn.TransformerEncoderLayer(6, 3, 7, dropout=0.1, norm_first=True)
    return Parts(
        Net(run, encoder=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)),
        (torch.randn(n, 5, 6),),
    )


@case()
def transformer_decoder(n: int) -> Parts:
    layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    return Parts(nn.TransformerDecoder(layer, 1), (torch.randn(n, 5, 4), torch.randn(n, 3, 4)))
