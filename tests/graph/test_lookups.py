"""Look-ups as they are read off their nodes."""

from __future__ import annotations

import pytest
import torch

from mtu_fast._graph.lookups import LOOKUPS

OF, AT = torch.arange(4), torch.tensor([1, 4, 0, 2])


@pytest.mark.parametrize("on_host", [(True, True), (True, False), (False, True)])
def test_entries_are_where_gradients_are(on_host: tuple[bool, bool]) -> None:
    """An index on the host serves any device; all that follows from it meets gradients."""
    of, at = (i if host else i.to("meta") for i, host in zip((OF, AT), on_host, strict=True))
    hidden = torch.ones(4, 5, 3, device="meta", requires_grad=True)
    node = hidden[of, at].grad_fn
    assert node is not None
    found = LOOKUPS["Index"](node, tuple(hidden.shape))
    assert found is not None and found.first == (4, 5)
    assert found.entries.device.type == "meta" and found.entries.shape == (4,)


def test_entries_of_several_indices_are_numbered_as_one() -> None:
    node = torch.ones(4, 5, 3, requires_grad=True)[OF - 4, AT].grad_fn
    assert node is not None
    found = LOOKUPS["Index"](node, (4, 5, 3))
    assert found is not None and found.entries.equal(OF * 5 + AT)
