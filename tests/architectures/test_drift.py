"""Gradients while a model is trained: one engine over 200 steps, from ordinary weights and from flat attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.checks import clear, grad_vector, random_weights, trained, truth_of, vector
from tests.helpers.truth import gram_truth, relative_error

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

STEPS, LOOPED = 200, 25  # steps, and after how many the Gram is compared with a backward per row
N, S, D, HEADS, VOCAB = 6, 10, 32, 4, 61
FORGET = torch.tensor([True, False, False, True, False, False])
FLAT = 0.03

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A language model of one block: causal attention of four linear layers on a normed stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = (
            nn.Embedding(VOCAB, D),
            nn.LayerNorm(D),
            nn.Linear(D, VOCAB),
        )
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        h = self.norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.o(mixed.transpose(1, 2).flatten(2)))


class Llama(nn.Module):
    """Two layers of the package's Llama with grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=2, initializer_range=D**-0.5,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def flattened(model: nn.Module) -> None:
    """Queries and keys at FLAT of their size: every token attends to all others nearly alike."""
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name.rpartition(".")[2] in {"q", "k", "q_proj", "k_proj"}:
                for p in layer.parameters():
                    p.mul_(FLAT)


def text(step: int) -> Tensor:
    """Tokens [N, S] of which most follow from the one before, so that there is something to learn."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (N, S), generator=draw)
    follows = torch.rand(N, S, generator=draw) < 0.8
    for t in range(1, S):
        tokens[:, t] = torch.where(follows[:, t], (3 * tokens[:, t - 1] + 1) % VOCAB, tokens[:, t])
    return tokens


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross entropy of every sample."""
    return F.cross_entropy(
        model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    ).mean(1)


def plain(losses: Tensor, params: list[Tensor], w: Tensor) -> tuple[Tensor, ...]:
    """Autograd's gradient of the weighted losses; the graph is kept."""
    return torch.autograd.grad(losses, params, w.to(losses.dtype), retain_graph=True)


@pytest.mark.parametrize("flat", [False, True], ids=["ordinary", "flat"])
@pytest.mark.parametrize("make", [Block, Llama])
def test_gradients_stay_those_of_autograd(make: Callable[[], nn.Module], flat: bool) -> None:
    """`combine` of random weights and the `.grad` of OrthoGrad, to 1e-5 at every step; the Gram now and then.

    What trains is autograd's mean gradient, so that the weights are the same whatever the engine
    finds.
    """
    model = make()
    if flat:
        flattened(model)
    params, engine = trained(model), mtu.Engine(model)
    optimizer, means = torch.optim.AdamW(params, lr=1e-2), []
    for step in range(STEPS):
        tokens, w = text(step), random_weights(N, step)
        losses = next_token(model, tokens)
        means.append(losses.detach().mean().item())
        mean, expected = (
            plain(losses, params, weights) for weights in (torch.full((N,), 1 / N), w)
        )
        J = truth_of({"loss": losses}, params) if step % LOOPED == 0 else None
        rows = engine.rows(losses, forget=FORGET)
        d = rows.vjp(w)
        assert (
            relative_error(vector([d.get(p) for p in params], params), vector(expected, params))
            <= 1e-5
        ), step
        if J is not None:
            assert relative_error(rows.gram(), gram_truth(J)) <= 1e-5, step
        clear(params)
        update = rows.backward(mtu.OrthoGrad(0.5))
        again = plain(next_token(model, tokens), params, update.weights)
        assert relative_error(grad_vector(params), vector(again, params)) <= 1e-5, step
        for p, g in zip(params, mean, strict=True):
            p.grad = g
        optimizer.step()
    assert sum(means[-20:]) < sum(means[:20]) - 20
