"""Losses with one value a sample, for what has many positions a sample: language models, taggers, frozen models."""

from mtu_fast.losses.frozen import kl_to_frozen, npo
from mtu_fast.losses.tokens import causal_lm, seq2seq, token_classification

__all__ = ["causal_lm", "kl_to_frozen", "npo", "seq2seq", "token_classification"]
