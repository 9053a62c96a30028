"""Convolutions: one to three dimensions, every geometry option, transposed, frames folded into the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.models.base import Net, Parts, case


def _stack(*layers: nn.Module) -> nn.Sequential:
    out: list[nn.Module] = []
    for layer in layers:
        out += [layer, nn.Tanh()]
    return nn.Sequential(*out)


@case()
def conv1d(n: int) -> Parts:
    net = _stack(
        nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), nn.Conv1d(4, 6, 2, bias=False)
    )
    return Parts(net, (torch.randn(n, 3, 9),))


@case()
def conv2d(n: int) -> Parts:
    net = _stack(
        nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(4, 5, 2, stride=2),  # leaves a row of pixels unread
    )
    return Parts(net, (torch.randn(n, 3, 7, 6),))


@case()
def conv2d_pointwise(n: int) -> Parts:
    return Parts(
        _stack(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1, stride=2)), (torch.randn(n, 3, 3, 5),)
    )


@case()
def conv2d_groups(n: int) -> Parts:
    net = _stack(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(6, 3, 2, groups=3, bias=False))
    return Parts(net, (torch.randn(n, 4, 5, 4),))


@case()
def conv2d_depthwise(n: int) -> Parts:
    net = _stack(
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
        nn.Conv2d(6, 6, 3, stride=2, groups=6),
        nn.Conv2d(6, 4, 1),
    )
    return Parts(net, (torch.randn(n, 3, 5, 6),))


@case()
def conv2d_channels_last(n: int) -> Parts:
    x = torch.randn(n, 3, 5, 4).to(memory_format=torch.channels_last)
    return Parts(_stack(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)), (x,))


@case()
def conv3d(n: int) -> Parts:
    net = _stack(
        nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)),
        nn.Conv3d(4, 6, 2, groups=2),
    )
    return Parts(net, (torch.randn(n, 2, 3, 5, 4),))


@case()
def conv_padding_circular(n: int) -> Parts:
    return Parts(
        _stack(nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular")),
        (torch.randn(n, 3, 4, 5),),
    )


@case()
def conv_padding_reflect(n: int) -> Parts:
    return Parts(
        _stack(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), (torch.randn(n, 3, 4, 5),)
    )


@case()
def conv_padding_replicate(n: int) -> Parts:
    return Parts(
        _stack(nn.Conv1d(3, 4, 3, padding=1, padding_mode="replicate")), (torch.randn(n, 3, 5),)
    )


@case()
def conv_padding_valid(n: int) -> Parts:
    """Torch saves one number for all axes."""
    net = _stack(
        nn.Conv2d(3, 6, 3, padding="valid"), nn.Conv2d(6, 6, 2, padding="valid", groups=6),
        nn.Conv2d(6, 20, (2, 1), stride=(1, 2), padding="valid"), nn.Conv2d(20, 4, 2, padding="valid"),
    )  # fmt: skip
    return Parts(net, (torch.randn(n, 3, 7, 9),))


@case()
def conv_padding_same(n: int) -> Parts:
    """An even kernel: the padding is uneven."""
    return Parts(
        _stack(nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(2, 1))), (torch.randn(n, 3, 4, 5),)
    )


@case()
def conv_frames(n: int) -> Parts:
    """Three frames a sample, folded into the batch: [N*F, C, H, W]."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = self.conv(x.flatten(0, 1)).mean((2, 3))  # [N*F, 4]
        return torch.tanh(self.mix(h).unflatten(0, x.shape[:2]))

    parts = {"conv": nn.Conv2d(2, 4, 3, padding=1), "mix": nn.Linear(4, 5)}
    return Parts(Net(run, **parts), (torch.randn(n, 3, 2, 4, 5),))


@case()
def conv_frames_outermost(n: int) -> Parts:
    """Frames before samples in the folded batch: [F*N, C, L]."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x.transpose(0, 1).flatten(0, 1)))  # [F*N, 4, L']
        return h.unflatten(0, (3, x.shape[0])).transpose(0, 1)

    return Parts(Net(run, conv=nn.Conv1d(2, 4, 3)), (torch.randn(n, 3, 2, 5),))


@case()
def conv_transposed(n: int) -> Parts:
    net = _stack(
        nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=1, groups=2),
        nn.ConvTranspose2d(6, 3, 2, dilation=2, bias=False),
    )
    return Parts(net, (torch.randn(n, 4, 3, 2),))


@case()
def conv_transposed_1d_3d(n: int) -> Parts:
    def run(self: Net, x: Tensor) -> Tensor:
        h = torch.tanh(self.line(x))  # [N, 4, 7]
        return self.volume(h.reshape(-1, 2, 2, 1, 7))

    parts: dict[str, Any] = {
        "line": nn.ConvTranspose1d(3, 4, 3, stride=2),
        "volume": nn.ConvTranspose3d(2, 3, (1, 2, 2), padding=(0, 0, 1)),
    }
    return Parts(Net(run, **parts), (torch.randn(n, 3, 3),))


@case()
def codes_into_convolutions(n: int) -> Parts:
    """A parameter for each sample, as the input of a convolution; one that is input and weight at once."""

    def run(self: Net, x: Tensor) -> Tensor:
        codes, small, both = (t[: len(x)] for t in (self.codes, self.small, self.both))
        h = torch.tanh(self.conv(codes) + self.up(small) + self.depthwise(codes).mean(1, True))
        return h + torch.nn.functional.conv2d(both, self.both[:4]).mean((2, 3), True) + x

    parts: dict[str, Any] = {
        "conv": nn.Conv2d(3, 4, 3, padding=1), "depthwise": nn.Conv2d(3, 3, 3, padding=1, groups=3),
        "up": nn.ConvTranspose2d(2, 4, 2, stride=2), "codes": nn.Parameter(torch.randn(n, 3, 4, 4)),
        "small": nn.Parameter(torch.randn(n, 2, 2, 2)), "both": nn.Parameter(torch.randn(max(n, 4), 3, 1, 1)),
    }  # fmt: skip
    return Parts(Net(run, **parts), (torch.randn(n, 4, 4, 4),))


@case()
def codes_into_norms(n: int) -> Parts:
    """A parameter for each sample, as the input of a norm."""

    def run(self: Net, x: Tensor) -> Tensor:
        codes, features = self.codes[: len(x)], self.features[: len(x)]
        return (
            self.batch(codes).flatten(1) + self.group(codes).flatten(1) + self.layer(features) + x
        )

    parts: dict[str, Any] = {
        "batch": nn.BatchNorm2d(4).eval(), "group": nn.GroupNorm(2, 4), "layer": nn.LayerNorm(16),
        "codes": nn.Parameter(torch.randn(n, 4, 2, 2)), "features": nn.Parameter(torch.randn(n, 16)),
    }  # fmt: skip
    return Parts(Net(run, **parts), (torch.randn(n, 16),))


@case()
def fourier(n: int) -> Parts:
    """Frequencies scaled (by real and complex numbers), shifted and mixed, all by real parameters."""

    def run(self: Net, x: Tensor) -> Tensor:
        f = torch.fft.rfft(self.before(x)) * self.scale + torch.view_as_complex(self.shift)
        f = f * torch.complex(self.filter, self.scale)
        return torch.fft.irfft(f @ self.mixing.to(f.dtype) * (1 + 2j), 8)

    parts = {
        "before": nn.Linear(3, 8),
        "scale": nn.Parameter(torch.randn(5)),
        "filter": nn.Parameter(torch.randn(5)),
    }
    parts |= {"shift": nn.Parameter(torch.randn(5, 2)), "mixing": nn.Parameter(torch.randn(5, 5))}
    return Parts(Net(run, **parts), (torch.randn(n, 6, 3),))
