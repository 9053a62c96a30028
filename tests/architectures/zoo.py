"""Tiny, randomly weighted models of the `transformers` package, and their per-sample losses on drawn batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

N, S, D, VOCAB = 5, 9, 32, 61
PAD, BOS, EOS = 0, 1, 2
MELS, LETTERS, CLASSES = 6, 11, 7
IGNORED = -100  # the label that counts for nothing
SPREAD = 0.1  # what is added to every weight: no bias is zero and no norm is one
BOTH = ("eager", "sdpa")

Batch = dict[str, Tensor]  # all of the samples in their first dimension; numbers are float64


@dataclass(frozen=True)
class Architecture:
    """One model class with one kind of attention: `losses(model, batch(seed))` are [N]."""

    name: str
    make: Callable[[str], nn.Module]
    batch: Callable[[int], Batch]
    losses: Callable[[nn.Module, Batch], Tensor]
    attention: str

    def build(self) -> nn.Module:
        """A model without dropout, the same at every call."""
        torch.manual_seed(0)
        model = self.make(self.attention)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(SPREAD * torch.randn_like(p))
        return model.eval()


ARCHITECTURES: list[Architecture] = []


def register(
    name: str,
    make: Callable[[str], nn.Module],
    batch: Callable[[int], Batch],
    losses: Callable[[nn.Module, Batch], Tensor],
    attentions: tuple[str, ...] = BOTH,
) -> None:
    """One case an attention implementation."""
    for attention in attentions:
        label = f"{name}-{attention}" if len(attentions) > 1 else name
        ARCHITECTURES.append(Architecture(label, make, batch, losses, attention))


def by_name(name: str) -> Architecture:
    """The case registered under `name`."""
    return next(case for case in ARCHITECTURES if case.name == name)


def attending(model: Any, attention: str) -> nn.Module:
    """The model with that attention."""
    model.set_attn_implementation(attention)
    return model


class Wide(TorchFunctionMode):
    """What is cast to float32 inside becomes float64: softmax, norms, rotations, scans."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        wider = {torch.float32: torch.float64}
        changed = [wider.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        named = {
            k: wider.get(a, a) if isinstance(a, torch.dtype) else a
            for k, a in (kwargs or {}).items()
        }
        return function(*changed, **named)


def doubled(model: Any) -> nn.Module:
    """The model in float64; grouped products have no such kernel, so its experts are run one by one."""
    if "grouped_mm" in getattr(model, "get_experts_implementation", dict)().values():
        model.set_experts_implementation("eager")
    return model.double()


# ---- batches and losses --------------------------------------------------------------------------


def text(seed: int, length: int = S, left: bool | None = None) -> Batch:
    """Tokens and their mask [N, length]; one sample is whole, odd seeds pad on the left."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB - 1, (N, length), generator=draw)
    lengths = torch.randint(3, length + 1, (N,), generator=draw).index_fill(
        0, torch.tensor(seed % N), length
    )
    place = torch.arange(length)
    left = bool(seed % 2) if left is None else left
    mask = place >= length - lengths[:, None] if left else place < lengths[:, None]
    return {"input_ids": tokens.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def noise(seed: int, *shape: int) -> Tensor:
    """Numbers that bfloat16 holds, so that every precision sees the same."""
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def output(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """What the model makes of all but the labels."""
    precision = next(model.parameters()).dtype
    given = {
        name: x.to(precision) if x.is_floating_point() else x
        for name, x in batch.items()
        if name != "labels"
    }
    return model(**given, **more)


def wide(logits: Tensor) -> Tensor:
    """Half precision as float32, as the losses of `transformers` take it."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of every sample over the tokens that have a label."""
    each = F.cross_entropy(
        wide(logits).transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return each.sum(1) / (labels != IGNORED).sum(1)


def causal_text(seed: int) -> Batch:
    batch = text(seed)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """What each token says of the one after it."""
    return per_token(output(model, batch, use_cache=False).logits[:, :-1], batch["labels"][:, 1:])


def hidden_text(seed: int) -> Batch:
    """Half of the tokens are hidden and asked for; two kinds of segments."""
    batch = text(seed)
    tokens, there, place = batch["input_ids"], batch["attention_mask"] == 1, torch.arange(S)
    hidden = there & (place % 2 == seed % 2)
    return batch | {
        "input_ids": tokens.masked_fill(hidden, EOS),
        "token_type_ids": (place >= S // 2).long().expand(N, S),
        "labels": tokens.masked_fill(~hidden, IGNORED),
    }


def answer(seed: int) -> Batch:
    """Targets of different lengths, and what a decoder is given for them."""
    target = text(seed + 50, S - 2, left=False)
    return {
        "decoder_input_ids": F.pad(target["input_ids"][:, :-1], (1, 0), value=BOS),
        "labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED),
    }


def two_texts(seed: int) -> Batch:
    return text(seed) | answer(seed)


def spectrograms(seed: int) -> Batch:
    return {"input_features": noise(seed, MELS, 2 * S)} | answer(seed)


def labelled(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy of every sample at the labels' places."""
    return per_token(output(model, batch).logits, batch["labels"])


def waves(seed: int) -> Batch:
    """Waves of different lengths, and letters said in them."""
    length = torch.randint(56, 81, (N, 1), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(80) < length
    letters = text(seed + 50, 5, left=False)
    labels = (letters["input_ids"] % (LETTERS - 1) + 1).masked_fill(
        letters["attention_mask"] == 0, IGNORED
    )
    return {"input_values": noise(seed, 80) * mask, "attention_mask": mask.long(), "labels": labels}


def connectionist(model: nn.Module, batch: Batch) -> Tensor:
    """CTC, for every letter."""
    frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(1))
    letters = (batch["labels"] != IGNORED).sum(1)
    log_p = wide(output(model, batch).logits).log_softmax(-1).transpose(0, 1)
    return (
        F.ctc_loss(log_p, batch["labels"].clamp(min=0), frames, letters, reduction="none") / letters
    )


def images(seed: int) -> Batch:
    labels = torch.randint(0, CLASSES, (N,), generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": noise(seed, 3, 16, 16), "labels": labels}


def classified(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(wide(output(model, batch).logits), batch["labels"], reduction="none")


def captions(seed: int) -> Batch:
    """Images and texts that end in their last token."""
    batch = text(seed, left=False)
    last = batch["attention_mask"].sum(1, keepdim=True) - 1
    return batch | {
        "input_ids": batch["input_ids"].scatter(1, last, VOCAB - 1),
        "pixel_values": noise(seed, 3, 12, 12),
    }


def matched(model: nn.Module, batch: Batch) -> Tensor:
    """How well image and caption of one sample match, whatever the others are."""
    found = output(model, batch)
    return -wide((found.image_embeds * found.text_embeds).sum(-1) * model.logit_scale.exp())


def contrasted(model: nn.Module, batch: Batch) -> Tensor:
    """Every image against all captions and every caption against all images: CLIP's own loss."""
    found, own = output(model, batch), torch.arange(N)
    one, other = (wide(logits) for logits in (found.logits_per_image, found.logits_per_text))
    return (
        F.cross_entropy(one, own, reduction="none") + F.cross_entropy(other, own, reduction="none")
    ) / 2


# ---- models --------------------------------------------------------------------------------------

SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
BLOCKS: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
DECODER: dict[str, Any] = BLOCKS | SPECIAL | {
    "vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip
ENCODER: dict[str, Any] = BLOCKS | {"hidden_act": "gelu"}


def llama(attention: str) -> nn.Module:
    return attending(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), attention)


def qwen3(attention: str) -> nn.Module:
    return attending(
        hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, tie_word_embeddings=False)), attention
    )


def gemma3(attention: str) -> nn.Module:
    """One layer with a sliding window, one without; scaled, tied embeddings."""
    layers = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(
        **DECODER, layer_types=layers, sliding_window=4, query_pre_attn_scalar=8
    )
    return attending(hf.Gemma3ForCausalLM(config), attention)


def mixtral(experts: str | None) -> Callable[[str], nn.Module]:
    """Four experts, two of them a token; None is the package's own choice of how to run them."""

    def make(attention: str) -> nn.Module:
        chosen = {} if experts is None else {"experts_implementation": experts}
        config = hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, **chosen)
        return attending(hf.MixtralForCausalLM(config), attention)

    return make


def gpt2(attention: str) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_positions=S, n_embd=D, n_layer=2, n_head=4, **SPECIAL
    )
    return attending(hf.GPT2LMHeadModel(config), attention)


def bert(attention: str) -> nn.Module:
    config = hf.BertConfig(vocab_size=VOCAB, max_position_embeddings=S, pad_token_id=PAD, **ENCODER)
    return attending(hf.BertForMaskedLM(config), attention)


def t5(gated: bool) -> Callable[[str], nn.Module]:
    """As first published (ReLU, tied), or as version 1.1 (gated GELU, a head of its own)."""

    def make(attention: str) -> nn.Module:
        config = hf.T5Config(
            vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD,
            relative_attention_num_buckets=6, relative_attention_max_distance=8,
            feed_forward_proj="gated-gelu" if gated else "relu", tie_word_embeddings=not gated, **SPECIAL,
        )  # fmt: skip
        return attending(hf.T5ForConditionalGeneration(config), attention)

    return make


def whisper(attention: str) -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=MELS, d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=S,
        max_target_positions=S, decoder_start_token_id=BOS, suppress_tokens=None, begin_suppress_tokens=None, **SPECIAL,
    )  # fmt: skip
    return attending(hf.WhisperForConditionalGeneration(config), attention)


def wav2vec2(norm: str) -> Callable[[str], nn.Module]:
    """Base ("group": group norm, norms after the blocks) or large ("layer": layer norms, before the blocks)."""

    def make(attention: str) -> nn.Module:
        config = hf.Wav2Vec2Config(
            vocab_size=LETTERS, conv_dim=(8, 8), conv_kernel=(5, 3), conv_stride=(3, 2), num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, feat_extract_norm=norm, conv_bias=norm == "layer",
            do_stable_layer_norm=norm == "layer", **SPECIAL, **ENCODER,
        )  # fmt: skip
        return attending(hf.Wav2Vec2ForCTC(config), attention)

    return make


def vit(attention: str) -> nn.Module:
    config = hf.ViTConfig(image_size=16, patch_size=4, num_labels=CLASSES, **ENCODER)
    return attending(hf.ViTForImageClassification(config), attention)


def swin(attention: str) -> nn.Module:
    """Two stages of a plain and a shifted block."""
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0,
        num_labels=CLASSES,
    )  # fmt: skip
    return attending(hf.SwinForImageClassification(config), attention)


def clip(attention: str) -> nn.Module:
    words = dict(
        ENCODER,
        vocab_size=VOCAB,
        max_position_embeddings=S,
        **SPECIAL | {"eos_token_id": VOCAB - 1},
    )
    images = dict(ENCODER, image_size=12, patch_size=4)
    config = hf.CLIPConfig(text_config=words, vision_config=images, projection_dim=16)
    return attending(hf.CLIPModel(config), attention)


def mamba(attention: str) -> nn.Module:
    """No attention: the scan in plain torch."""
    return hf.MambaForCausalLM(
        hf.MambaConfig(
            vocab_size=VOCAB, hidden_size=16, state_size=3, num_hidden_layers=2, **SPECIAL
        )
    )


register("llama", llama, causal_text, next_token)
register("qwen3", qwen3, causal_text, next_token)
register("gemma3", gemma3, causal_text, next_token)
register("mixtral", mixtral(None), causal_text, next_token)
register("mixtral_eager", mixtral("eager"), causal_text, next_token, ("sdpa",))
register("mixtral_batched", mixtral("batched_mm"), causal_text, next_token, ("sdpa",))
register("gpt2", gpt2, causal_text, next_token)
register("bert", bert, hidden_text, labelled)
register("t5", t5(gated=False), two_texts, labelled)
register("t5_gated", t5(gated=True), two_texts, labelled, ("sdpa",))
register("whisper", whisper, spectrograms, labelled)
register("wav2vec2", wav2vec2("group"), waves, connectionist)
register("wav2vec2_layer", wav2vec2("layer"), waves, connectionist, ("sdpa",))
register("vit", vit, images, classified)
register("swin", swin, images, classified)
register("clip", clip, captions, matched)
register("clip_contrastive", clip, captions, contrasted, ("sdpa",))
register("mamba", mamba, causal_text, next_token, ("none",))
