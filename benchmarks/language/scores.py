"""What a model is judged by: exact match, ROUGE-L, truth ratio, perplexity, membership inference, gap to retraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.language import model
from benchmarks.language.case import Case, exact, likelihood, targets
from benchmarks.language.facts import Fact
from benchmarks.language.texts import BEGIN, PAD, Texts
from mtu_fast.losses import causal_lm
from mtu_fast.unlearning import metrics

SPLITS = ("forget", "retain", "general", "test")
SHOWN = 40  # facts of a split that are generated and asked about, at most
ANSWER = 10  # tokens


def judge(case: Case, request: str, net: nn.Module, retrained: nn.Module) -> dict[str, Any]:
    """Every score of one model, as one flat row.

    `em_*`: share of answers said exactly, of each split; `rouge_*`; `truth_*`: mean of min(R, 1/R)
    on forget (1: it does not know), of max(0, 1 − R) elsewhere (1: it knows); `quality`: the
    p-value with which a Kolmogorov-Smirnov test tells the forget truth ratios from the retrained
    model's; `ppl_*`; `auc` of membership; `gap`: mean distance of the likelihoods to the retrained
    model's, over splits and tasks.
    """
    net, retrained = net.eval(), retrained.eval()
    parts, told = case.parts[request], case.told[request]
    found: dict[str, Any] = {}
    for split in ("forget", "retain", "general"):
        right = exact(net, parts[split])
        some = told[split][:: max(1, len(told[split]) // SHOWN)]
        ratios = truth(case.texts, net, some)
        found |= {
            f"em_{split}": right["answer"],
            f"next_{split}": right["next"],
            f"category_{split}": right["category"],
            f"rouge_{split}": rouge(case.texts, net, some),
            f"truth_{split}": _truthful(split, ratios),
            f"ppl_{split}": perplexity(net, parts[split]),
        }
        if split == "forget":
            ideal = truth(case.texts, retrained, some)
            found["quality"] = float(stats.ks_2samp(ratios.numpy(), ideal.numpy()).pvalue)
    tables = [{s: likelihood(m, parts[s]) for s in SPLITS} for m in (net, retrained)]
    return found | {"gap": metrics.mean_gap(*tables), "auc": _attack(case, request, net)}


def _truthful(split: str, ratios: Tensor) -> float:
    if split == "forget":
        return float(torch.minimum(ratios, 1 / ratios.clamp(min=1e-12)).mean())
    return float((1 - ratios).clamp(min=0).mean())


@torch.no_grad()
def truth(texts: Texts, net: nn.Module, facts: Sequence[Fact]) -> Tensor:
    """The truth ratio of each answer, [N] float64."""
    pairs = []
    for fact in facts:
        pairs += [texts.pair(fact.question, said) for said in (fact.answer, *fact.wrong)]
    tokens, labels = (torch.stack(side) for side in zip(*pairs, strict=True))
    reader: Any = net
    logits = reader.lm(input_ids=tokens, use_cache=False).logits
    losses = causal_lm(logits, labels, ignore_index=-1).view(len(facts), -1)
    return metrics.truth_ratio(losses[:, 0], losses[:, 1:])


@torch.no_grad()
def rouge(texts: Texts, net: nn.Module, facts: Sequence[Fact]) -> float:
    """Mean ROUGE-L of the answers that the model gives, greedily."""
    prompts = [[BEGIN, *texts.tokenizer.encode(fact.question).ids] for fact in facts]
    longest = max(map(len, prompts))
    padded = [[PAD] * (longest - len(prompt)) + prompt for prompt in prompts]
    tokens = torch.tensor(padded)
    reader: Any = net
    said = reader.lm.generate(
        input_ids=tokens,
        attention_mask=(tokens != PAD).long(),
        max_new_tokens=ANSWER,
        do_sample=False,
    )
    scores = []
    for fact, ids in zip(facts, said[:, longest:].tolist(), strict=True):
        scores.append(metrics.rouge_l(texts.text(ids), fact.answer))
    return sum(scores) / len(scores)


@torch.no_grad()
def perplexity(net: nn.Module, data: Any) -> float:
    """exp of the mean loss a token, over answers and next sentences."""
    sums = model.losses(net(data.image), data.labels, reduction="sum")
    total = sum(float(sums[task].sum()) for task in model.STATES)
    count = sum(int((data.labels[task] != -1).sum()) for task in model.STATES)
    return float(torch.tensor(total / count).exp())


@torch.no_grad()
def _attack(case: Case, request: str, net: nn.Module) -> float:
    """Mean over target tasks of the AUC with which a sample's loss tells forget from test data; 0.5 is chance."""
    sides = []
    for split in ("forget", "test"):
        data = case.parts[request][split]
        sides.append(model.losses(net(data.image), data.labels))
    found = [metrics.membership(sides[0][task], sides[1][task]).auc for task in targets(request)]
    return sum(found) / len(found)
