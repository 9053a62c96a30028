"""What a file holds is put where the run has a place for it; where it has none, the error names what and which file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtu_fast.unlearning.loop.pieces import Place, fill


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"model": {"weight": torch.ones(2)}, "optimizer": {}}, r"model\.weight"),
        (
            {"model": {}, "optimizer": {"state": {3: {"exp_avg": torch.ones(2)}}}},
            r"optimizer\.state\.3\.exp_avg",
        ),
    ],
)
def test_a_tensor_without_a_place_is_an_error(state: dict[str, Any], words: str) -> None:
    """A model, or an optimizer, of fewer tensors than the file has."""
    model, parameters = {"bias": torch.zeros(2)}, [torch.zeros(2)]

    def like(at: Place) -> Any:
        return model[str(at[1])] if at[0] == "model" else parameters[int(at[2])]

    with pytest.raises(ValueError, match=rf"run\.pt does not fit this run.*: {words}: "):
        fill("run.pt", state, like, sliced=True)
