"""What an OrthoGrad step costs on architectures of the `transformers` package, and on an LSTM, over the plain step.

    python -m benchmarks.architectures [--models llama bert ...] [--repeats K]

Random weights, d = 128, 2 to 4 layers, N = 16, float32, the default attention. A ratio is the
median over interleaved rounds of a whole step (zero_grad, forward, engine.backward with
OrthoGrad(0.5), a quarter of the samples forgotten) over the plain step of the same losses
(`loss.mean().backward()`). Steps in which the engine checks itself (1, 2, 4, …) are among them. The
first step, in which the plan is made and checked, is told apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks.measure import interleaved

N, D, VOCABULARY = 16, 128, 1000

Losses = Callable[[], Tensor]
MODELS: dict[str, Callable[[Any], tuple[nn.Module, Losses]]] = {}


def _model(
    make: Callable[[Any], tuple[nn.Module, Losses]],
) -> Callable[[Any], tuple[nn.Module, Losses]]:
    MODELS[make.__name__] = make
    return make


def next_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each sample's next tokens, `[N, S, V]` and `[N, S]` -> `[N]`."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").mean(1)


def _language(model: nn.Module, tokens: int) -> tuple[nn.Module, Losses]:
    ids = torch.randint(3, VOCABULARY, (N, tokens))
    mask = torch.ones_like(ids)
    return model, lambda: next_tokens(model(input_ids=ids, attention_mask=mask).logits, ids)


def _images(model: nn.Module, side: int) -> tuple[nn.Module, Losses]:
    pixels, labels = torch.randn(N, 3, side, side), torch.randint(10, (N,))
    return model, lambda: F.cross_entropy(
        model(pixel_values=pixels).logits, labels, reduction="none"
    )


@_model
def llama(hf: Any) -> tuple[nn.Module, Losses]:
    """Grouped queries, RMSNorm, rotary positions, 4 layers, 64 tokens."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return _language(hf.LlamaForCausalLM(config).eval(), 64)


@_model
def bert(hf: Any) -> tuple[nn.Module, Losses]:
    """A tied masked-language head, 4 layers, 64 tokens."""
    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=4 * D,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return _language(hf.BertForMaskedLM(config).eval(), 64)


@_model
def gpt2(hf: Any) -> tuple[nn.Module, Losses]:
    """A tied head, 4 layers, 64 tokens."""
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=D, n_layer=4, n_head=4, use_cache=False)
    return _language(hf.GPT2LMHeadModel(config).eval(), 64)


@_model
def vit(hf: Any) -> tuple[nn.Module, Losses]:
    """8x8 patches of 64x64, 4 layers."""
    config = hf.ViTConfig(
        image_size=64, patch_size=8, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=4, num_attention_heads=4,
        num_labels=10,
    )  # fmt: skip
    return _images(hf.ViTForImageClassification(config).eval(), 64)


@_model
def t5(hf: Any) -> tuple[nn.Module, Losses]:
    """Encoder and decoder of 2 layers, relative positions, 64 tokens to 32."""
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=D, d_kv=32, d_ff=4 * D, num_layers=2, num_heads=4, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config).eval()
    ids, labels = torch.randint(3, VOCABULARY, (N, 64)), torch.randint(3, VOCABULARY, (N, 32))
    return model, lambda: next_tokens(model(input_ids=ids, decoder_input_ids=labels).logits, labels)


@_model
def whisper(hf: Any) -> tuple[nn.Module, Losses]:
    """Encoder and decoder of 2 layers, 128 frames to 32 tokens."""
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=40, d_model=D, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=4 * D, decoder_ffn_dim=4 * D,
        max_source_positions=64, max_target_positions=64, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config).eval()
    sound, labels = torch.randn(N, 40, 128), torch.randint(3, VOCABULARY, (N, 32))
    return model, lambda: next_tokens(
        model(input_features=sound, decoder_input_ids=labels).logits, labels
    )


@_model
def swin(hf: Any) -> tuple[nn.Module, Losses]:
    """4x4 patches of 64x64, shifted windows of 4x4, two stages of 2 layers, d = 64 and 128."""
    config = hf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=64,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=10,
    )
    return _images(hf.SwinForImageClassification(config).eval(), 64)


@_model
def mixtral(hf: Any) -> tuple[nn.Module, Losses]:
    """Routed experts, 2 layers, 32 tokens, drawn anew at each call: an expert's rows differ each time."""
    config = hf.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    model = hf.MixtralForCausalLM(config).eval()

    def losses() -> Tensor:
        ids = torch.randint(3, VOCABULARY, (N, 32))
        return next_tokens(model(input_ids=ids).logits, ids)

    return model, losses


@_model
def mamba(hf: Any) -> tuple[nn.Module, Losses]:
    """2 layers of the scan in plain torch, 32 tokens."""
    config = hf.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        state_size=16,
        num_hidden_layers=2,
        use_cache=False,
        use_mambapy=False,
    )
    return _language(hf.MambaForCausalLM(config).eval(), 32)


@_model
def lstm(_: Any) -> tuple[nn.Module, Losses]:
    """torch.nn.LSTM of 2 layers, fused on the CPU, 32 steps."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(D, D, 2, batch_first=True), nn.Linear(D, 10)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.lstm(x)[0][:, -1])
            return scores

    net, x, labels = Net(), torch.randn(N, 32, D), torch.randint(10, (N,))
    return net, lambda: F.cross_entropy(net(x), labels, reduction="none")


def measure(name: str, repeats: int) -> tuple[float, float, float]:
    """(median, spread) of a later step over the plain one, and the first step over it."""
    import transformers

    torch.manual_seed(0)
    model, losses = MODELS[name](transformers)
    engine, method, forget = mtu.Engine(model), mtu.OrthoGrad(0.5), torch.arange(N) < N // 4

    def plain() -> None:
        model.zero_grad()
        losses().mean().backward()

    def ours() -> None:
        model.zero_grad()
        engine.backward(losses(), method, forget=forget)

    plain()
    plain()
    start = time.perf_counter()
    ours()
    first = 1e3 * (time.perf_counter() - start)
    for _checked in range(5):
        ours()
    times = interleaved({"plain": plain, "ours": ours}, repeats)
    return (*times["ours"].ratio(times["plain"]), first / times["plain"].median)


def main() -> None:
    """Print a line a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    print(f"{'model':<10} {'step over plain':>16} {'first step':>11}")
    for name in given.models:
        ratio, spread, first = measure(name, given.repeats)
        print(f"{name:<10} {ratio:>10.2f} ± {spread:.2f} {first:>11.1f}", flush=True)


if __name__ == "__main__":
    main()
