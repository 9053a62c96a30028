"""Facts as tokens: a tokenizer of byte pairs made by `tokenizers`, and tensors for a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from benchmarks.data import Samples
from benchmarks.language.facts import PEOPLE, PLACES, Fact

PAD, BEGIN, END = 0, 1, 2
SPECIAL = ["<pad>", "<begin>", "<end>"]
IGNORED = -1  # labels of positions that do not count
KINDS = {kind.name: index for index, kind in enumerate((*PEOPLE, *PLACES))}


class Texts:
    """A tokenizer learned from facts, and what it makes of facts.

    Args:
        facts: what it is learned from.
        vocabulary: the number of tokens, at most.
    """

    def __init__(self, facts: Sequence[Fact], vocabulary: int = 400) -> None:
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        self.tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False
        )
        self.tokenizer.train_from_iterator(_sentences(facts), trainer)
        self.length = max(map(self._positions, facts))

    def __len__(self) -> int:
        """The number of tokens."""
        return self.tokenizer.get_vocab_size()

    @property
    def ask(self) -> int:
        """The token that ends a question."""
        return self._ids("?")[-1]

    def samples(self, facts: Sequence[Fact]) -> Samples:
        """N facts: `image` [N, 2, S] the tokens of question and answer, and of the two sentences.

        Labels: "answer" and "next" [N, S], "category" [N]. `source` [N, 2]: kind of fact, and the
        position of the question's last token.
        """
        asked = [self.pair(fact.question, fact.answer) for fact in facts]
        told = [self.pair(fact.before, fact.after) for fact in facts]
        kinds = torch.tensor([KINDS[fact.kind.name] for fact in facts])
        ends = torch.tensor([self._prompt(fact.question) for fact in facts])
        tokens = [torch.stack([of[0] for of in side]) for side in (asked, told)]
        labels = {
            "answer": torch.stack([of[1] for of in asked]),
            "category": torch.tensor([fact.group for fact in facts]),
            "next": torch.stack([of[1] for of in told]),
        }
        image = torch.stack(tokens, 1)
        return Samples(image, labels, torch.stack([kinds, ends - 1], 1))

    def pair(self, given: str, said: str) -> tuple[Tensor, Tensor]:
        """Tokens and labels [S] of a text of which `said` counts.

        Raises:
            ValueError: it is longer than S.
        """
        ids = [BEGIN, *self._ids(given), *self._ids(said), END]
        if len(ids) > self.length:
            raise ValueError(f"texts: found {len(ids)} tokens, expected at most {self.length}.")
        tokens = torch.full((self.length,), PAD)
        tokens[: len(ids)] = torch.tensor(ids)
        labels = torch.full_like(tokens, IGNORED)
        start = self._prompt(given)
        labels[start : len(ids)] = tokens[start : len(ids)]
        return tokens, labels

    def text(self, ids: Sequence[int]) -> str:
        """What these tokens say, up to the end."""
        kept = []
        for index in ids:
            if index == END:
                break
            kept.append(index)
        return self.tokenizer.decode(kept)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def _positions(self, fact: Fact) -> int:
        """Of its longest text, a wrong answer even."""
        said = [(fact.question, answer) for answer in (fact.answer, *fact.wrong)]
        sizes = [self._prompt(a) + len(self._ids(b)) for a, b in (*said, (fact.before, fact.after))]
        return 1 + max(sizes)

    def _prompt(self, given: str) -> int:
        return 1 + len(self._ids(given))


def _sentences(facts: Sequence[Fact]) -> list[str]:
    found = []
    for fact in facts:
        found += [fact.question, fact.answer, fact.before, fact.after]
    return found
