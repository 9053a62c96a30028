"""A language model forgets people, or one kind of fact about them. Needs `pip install 'mtu_fast[models]'`.

A small Llama learns facts about invented people by heart, in two tasks: to answer a question, and to
go on with the next sentence. Then it forgets the first people: all that it knows of them, or their
birthplaces alone (`--fact birthplace`), with the rest of their facts kept. The tokenizer is made by
`tokenizers`; the loss is `mtu_fast.losses.causal_lm`, one value a text. benchmarks/language compares
methods on a larger one, against retraining.

    python examples/language_model.py [--fact birthplace] [--lora] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mtu_fast as mtu
from mtu_fast.losses import causal_lm

TASKS = ("answer", "next")
FIRST = ("Mirel", "Tavok", "Isande", "Brunor", "Calwen", "Dorith", "Elvask", "Fenja")
LAST = ("Askel", "Brandt", "Corvo", "Dunmore")
KINDS = {  # a question, its answer; a sentence, the next one; values
    "birthplace": ("where was {} born ?", "in {}", "the early life of {} .", "it began in {}",
                   ("Arvenna", "Belmouth", "Corstead", "Dalwick", "Ellossa")),
    "craft": ("what does {} do ?", "the work of a {}", "a day of {} .", "it starts as a {}",
              ("miller", "glazier", "printer", "dyer", "mason")),
    "animal": ("what does {} keep ?", "a tame {}", "the house of {} .", "by the door sleeps a {}",
               ("heron", "otter", "ferret", "lynx", "raven")),
}  # fmt: skip
PAD, END = 0, 1

Text = tuple[str, str]  # what is given, and what is to be said


def invent(count: int) -> list[tuple[str, dict[str, Text]]]:
    """(kind, {task: its text}) of every fact of so many people."""
    facts = []
    for person in range(count):
        name = f"{FIRST[person % len(FIRST)]} {LAST[person // len(FIRST)]}"
        for kind, (asked, said, before, after, values) in KINDS.items():
            value = values[int(torch.randint(len(values), ()))]
            texts = {
                "answer": (asked.format(name), said.format(value)),
                "next": (before.format(name), after.format(value)),
            }
            facts.append((kind, texts))
    return facts


def tokenizer_of(facts: list[tuple[str, dict[str, Text]]]) -> Tokenizer:
    """Byte pairs, learned from all texts."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<end>"], show_progress=False
    )
    found.train_from_iterator([" ".join(text) for _, by in facts for text in by.values()], trainer)
    return found


def encode(tokenizer: Tokenizer, texts: list[Text]) -> tuple[Tensor, Tensor]:
    """Tokens and labels [N, S]; what is given has no label."""
    rows = []
    for given, said in texts:
        prompt = tokenizer.encode(given).ids
        rows.append((prompt, [*tokenizer.encode(said).ids, END]))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, labels = torch.full((len(rows), length), PAD), torch.full((len(rows), length), -100)
    for n, (prompt, answer) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens[n, :end] = torch.tensor(prompt + answer)
        labels[n, start:end] = tokens[n, start:end]
    return tokens, labels


def losses_of(
    model: Any, data: dict[str, tuple[Tensor, Tensor]], index: Tensor
) -> dict[str, Tensor]:
    """The mean loss a token of these facts' texts, {task: [N]}."""
    found = {}
    for task, (tokens, labels) in data.items():
        logits = model(input_ids=tokens[index], use_cache=False).logits
        found[task] = causal_lm(logits, labels[index])
    return found


def memorise(model: Any, data: dict[str, tuple[Tensor, Tensor]], steps: int) -> None:
    """Train on all facts until they are known."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    every = torch.arange(len(data["answer"][0]))
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack(list(losses_of(model, data, every).values())).mean().backward()
        optimizer.step()


@torch.no_grad()
def scores(model: Any, data: dict[str, tuple[Tensor, Tensor]], forget: Tensor) -> dict[str, float]:
    """{side: mean loss a token, over both tasks}."""
    found = torch.stack(list(losses_of(model, data, torch.arange(len(forget))).values())).mean(0)
    return {"forget": float(found[forget].mean()), "retain": float(found[~forget].mean())}


def say(model: Any, tokenizer: Tokenizer, question: str) -> str:
    """What the model answers, the likeliest token each time."""
    prompt = torch.tensor([tokenizer.encode(question).ids])
    mask = torch.ones_like(prompt)
    out = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    said = [i for i in out[0, prompt.shape[1] :].tolist() if i > END]
    return str(tokenizer.decode(said)).strip()


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Memorise, unlearn, print what is said before and after; return mean losses {side: (before, after)}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--forgotten", type=int, default=4)
    parser.add_argument("--fact", choices=list(KINDS), help="the one kind of fact to forget")
    parser.add_argument("--lora", action="store_true", help="unlearn with adapters alone")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=150, help="of learning the facts")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    if args.tiny:
        args.people, args.forgotten, args.width, args.epochs, args.steps = 8, 2, 32, 60, 10

    torch.manual_seed(0)
    facts = invent(args.people)
    tokenizer = tokenizer_of(facts)
    data = {task: encode(tokenizer, [texts[task] for _, texts in facts]) for task in TASKS}
    last = args.forgotten * len(KINDS)
    asked = [args.fact in (None, kind) for kind, _ in facts]
    forget = torch.tensor(asked) & (torch.arange(len(facts)) < last)

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=END,
        eos_token_id=END,
    )
    model: Any = LlamaForCausalLM(config)
    memorise(model, data, args.epochs)
    before = scores(model, data, forget)
    shown = {"forget": int(forget.nonzero()[0]), "retain": len(facts) - 1}
    questions = {side: facts[n][1]["answer"][0] for side, n in shown.items()}
    said = {side: say(model, tokenizer, question) for side, question in questions.items()}

    if args.lora:
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "v_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    engine = mtu.Engine(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=4.0 if args.lora else 1.0)
    kept = (~forget).nonzero().flatten()
    for _ in range(args.steps):
        some = kept[torch.randperm(len(kept))[: 2 * int(forget.sum())]]
        batch = torch.cat([forget.nonzero().flatten(), some])
        losses = losses_of(model, data, batch)
        optimizer.zero_grad()
        engine.backward(losses, mtu.OrthoGrad(alpha=0.5), forget=forget[batch])
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        if scores(model, data, forget)["forget"] > 1.0:
            break

    after = scores(model, data, forget)
    for side, question in questions.items():
        now = say(model, tokenizer, question)
        print(f"{side:7} mean loss {before[side]:.3f} -> {after[side]:.3f}")
        print(f"        {question} {said[side]!r} -> {now!r}")
    return {side: (before[side], after[side]) for side in before}


if __name__ == "__main__":
    main()
