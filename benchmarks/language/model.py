"""A small Llama with three tasks: answer, category (a linear head), next sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.language.facts import GROUPS
from benchmarks.language.texts import BEGIN, END, IGNORED, PAD
from mtu_fast.losses import causal_lm

TASKS = ("answer", "category", "next")
STATES = ("answer", "next")  # the tasks whose text states a fact


class Reader(nn.Module):
    """Logits {answer, next: [N, S, V], category: [N, groups]} of the texts of N facts, in two forwards.

    The category is read where the question ends, from the hidden state there.

    Args:
        vocabulary: the number of tokens.
        ask: the token that ends a question.
        width: of the hidden states.
        layers: of the Transformer.
    """

    def __init__(self, vocabulary: int, ask: int, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            pad_token_id=PAD,
            bos_token_id=BEGIN,
            eos_token_id=END,
        )
        self.lm: Any = LlamaForCausalLM(config)
        self.category = nn.Linear(width, GROUPS)
        self.ask = ask

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Logits of tokens [N, 2, S]."""
        # texts end in padding, which nothing before it attends to
        asked = self.lm(input_ids=tokens[:, 0], output_hidden_states=True, use_cache=False)
        told = self.lm(input_ids=tokens[:, 1], use_cache=False)
        end = (tokens[:, 0] == self.ask).long().argmax(1)
        read = asked.hidden_states[-1][torch.arange(len(tokens)), end]
        return {"answer": asked.logits, "category": self.category(read), "next": told.logits}


def losses(
    out: dict[str, Tensor], labels: dict[str, Tensor], reduction: str = "mean"
) -> dict[str, Tensor]:
    """Unreduced losses {task: [N]}, the mean or the sum over the tokens of a text."""
    found = {}
    for task, logits in out.items():
        if task == "category":
            found[task] = functional.cross_entropy(logits, labels[task], reduction="none")
            continue
        found[task] = causal_lm(logits, labels[task], ignore_index=IGNORED, reduction=reduction)
    return found


def counts(labels: dict[str, Tensor], task: str) -> Tensor | int:
    """The tokens of a text that count, [N]; 1 for a category."""
    return 1 if task == "category" else (labels[task] != IGNORED).sum(1)
