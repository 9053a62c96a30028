"""The models that steps are timed on: a shared backbone, one head per task, and a batch of random samples.

    mlp           784 -> 3 x 1024 -> 10, ReLU                                                     N = 64
    transformer   token and position embedding, 4 pre-norm layers, d = 256, 64 tokens, mean pool   N = 16
    resnet        ResNet-18 with GroupNorm(32), stem 3x3 of stride 1 without max-pool, 64x64       N = 16
    vit           8x8 patches of 64x64, class token, 4 pre-norm layers, d = 192                    N = 16
    depthwise     inverted residuals: 1x1, depthwise 3x3, 1x1 convolutions, GroupNorm, 32x32       N = 16
    dense         ResNet-18 with BatchNorm in eval, last stages dilated, 64x64; pixels at 1/4      N = 8

On a GPU (`size="gpu"`) the batches are 256, 32 and 128, the MLP is 2048 wide, the transformer d =
768 with 6 layers and 256 tokens; the others are as on a CPU, with batches of 128, 128 and 32.

With one task every parameter is a row parameter, the head's too; with several tasks the backbone's
are and the heads stay outside, as in multi-task learning. "quick" shrinks everything to
milliseconds and keeps the structure.

`smooth` puts SiLU for ReLU, to compare two ways of computing a step: their forwards round
differently, and one ReLU that opens in only one of them moves a row's gradient by as much as a
hundredth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10

# In eval mode torch may take an encoder layer's inference path, which has no derivative, for
# parameters under vmap.
torch.backends.mha.set_fastpath_enabled(False)


Activation = Callable[[], nn.Module]
Norm = Callable[[int], nn.Module]


class MultiHead(nn.Module):
    """{task: logits [N, C] or [N, C, H, W]} of x [N, ...]: one linear head per task on the features of one backbone."""

    def __init__(self, backbone: nn.Module, width: int, tasks: int, pixels: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        heads = [
            nn.Conv2d(width, CLASSES, 1) if pixels else nn.Linear(width, CLASSES)
            for _ in range(tasks)
        ]
        self.heads = nn.ModuleDict({f"task{t}": head for t, head in enumerate(heads)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {name: head(features) for name, head in self.heads.items()}


class Transformer(nn.Module):
    """Features [N, d] of token ids [N, S]: pre-norm encoder layers without dropout, then the mean over positions."""

    def __init__(
        self, vocabulary: int, width: int, layers: int, positions: int, activation: Activation
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width))
        heads, wide = max(1, width // 64), 4 * width
        layer = nn.TransformerEncoderLayer(
            width, heads, wide, 0.0, activation(), batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(self.tokens(x) + self.positions)
        return features.mean(-2)


class ViT(nn.Module):
    """Features [N, d] of images [N, 3, H, W], those of a class token, which is a parameter of this module."""

    def __init__(
        self, patches: int, patch: int, width: int, layers: int, activation: Activation
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(patches + 1, width))
        layer = nn.TransformerEncoderLayer(
            width,
            max(1, width // 64),
            4 * width,
            0.0,
            activation(),
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(-2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        features: Tensor = self.encoder(tokens)
        return features[:, 0]


class Block(nn.Module):
    """y = act(f(x) + shortcut(x)), f two 3x3 convolutions with norms; the shortcut is 1x1 where shapes differ."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        activation: Activation,
        norm: Norm,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False),
            norm(outputs),
            activation(),
            nn.Conv2d(outputs, outputs, 3, 1, dilation, dilation, bias=False),
            norm(outputs),
        )
        self.activation = activation()
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y


class Inverted(nn.Module):
    """x + f(x), f a 1x1 convolution to four times the channels, a depthwise 3x3 and a 1x1 back, each with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        wide = 4 * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), _norm(wide), activation(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), _norm(wide), activation(),
            nn.Conv2d(wide, outputs, 1, bias=False), _norm(outputs),
        )  # fmt: skip
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 2), channels)


class Sizes(NamedTuple):
    """What is asked for in place of a model's own sizes: N, features, tokens."""

    samples: int | None = None
    width: int | None = None
    positions: int | None = None


DEFAULT = Sizes()


def _mlp(size: str, activation: Activation, sizes: Sizes) -> tuple[nn.Module, int, Tensor]:
    width, default = {"quick": (32, 8), "cpu": (1024, 64), "gpu": (2048, 256)}[size]
    width = sizes.width or width
    layers = [m for inputs in (784, width, width) for m in (nn.Linear(inputs, width), activation())]
    return nn.Sequential(*layers), width, torch.randn(sizes.samples or default, 784)


def _transformer(size: str, activation: Activation, sizes: Sizes) -> tuple[nn.Module, int, Tensor]:
    width, layers, positions, default = {
        "quick": (32, 2, 8, 8), "cpu": (256, 4, 64, 16), "gpu": (768, 6, 256, 32),
    }[size]  # fmt: skip
    width, positions = sizes.width or width, sizes.positions or positions
    tokens = torch.randint(1000, (sizes.samples or default, positions))
    return Transformer(1000, width, layers, positions, activation), width, tokens


def _resnet(size: str, activation: Activation, sizes: Sizes) -> tuple[nn.Module, int, Tensor]:
    base, side, default = {"quick": (8, 32, 8), "cpu": (64, 64, 16), "gpu": (64, 64, 128)}[size]
    layers: list[nn.Module] = [nn.Conv2d(3, base, 3, 1, 1, bias=False), _norm(base), activation()]
    width = base
    for stage in range(4):
        stride = 1 if stage == 0 else 2
        layers += [Block(width, stride * width, stride, activation, _norm)]
        width *= stride
        layers += [Block(width, width, 1, activation, _norm)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers), width, torch.randn(sizes.samples or default, 3, side, side)


def _vit(size: str, activation: Activation, sizes: Sizes) -> tuple[nn.Module, int, Tensor]:
    side, patch, width, layers, default = {
        "quick": (16, 4, 32, 2, 8), "cpu": (64, 8, 192, 4, 16), "gpu": (64, 8, 192, 4, 128),
    }[size]  # fmt: skip
    model = ViT((side // patch) ** 2, patch, width, layers, activation)
    return model, width, torch.randn(sizes.samples or default, 3, side, side)


def _depthwise(size: str, activation: Activation, sizes: Sizes) -> tuple[nn.Module, int, Tensor]:
    base, side, default = {"quick": (8, 16, 8), "cpu": (32, 32, 16), "gpu": (32, 32, 128)}[size]
    layers: list[nn.Module] = [nn.Conv2d(3, base, 3, 1, 1, bias=False), _norm(base), activation()]
    for stage in range(3):
        width = base << stage
        layers += [Inverted(width, width, 1, activation), Inverted(width, 2 * width, 2, activation)]
    layers += [activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers), 8 * base, torch.randn(sizes.samples or default, 3, side, side)


def _dense(size: str, activation: Activation, sizes: Sizes) -> tuple[nn.Module, int, Tensor]:
    base, side, default = {"quick": (8, 32, 4), "cpu": (64, 64, 8), "gpu": (64, 64, 32)}[size]
    norm = nn.BatchNorm2d
    layers: list[nn.Module] = [nn.Conv2d(3, base, 3, 2, 1, bias=False), norm(base), activation()]
    width = base
    for stage, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
        wide = base << stage
        layers += [Block(width, wide, stride, activation, norm, dilation)]
        layers += [Block(wide, wide, 1, activation, norm, dilation)]
        width = wide
    return nn.Sequential(*layers), width, torch.randn(sizes.samples or default, 3, side, side)


MODELS: dict[str, Callable[[str, Activation, Sizes], tuple[nn.Module, int, Tensor]]] = {
    "mlp": _mlp,
    "transformer": _transformer,
    "resnet": _resnet,
    "vit": _vit,
    "depthwise": _depthwise,
    "dense": _dense,
}
PIXELS = ("dense",)  # models whose heads say something of every pixel
# the others: samples alone
SIZED = {"mlp": ("samples", "width"), "transformer": ("samples", "width", "positions")}


@dataclass(frozen=True)
class Case:
    """A model with one batch: `inputs` [N, ...], `labels` {task: [N]}, `forget` [N] bool, `params` of the rows."""

    model: MultiHead
    inputs: Tensor
    labels: dict[str, Tensor]
    forget: Tensor
    params: dict[str, nn.Parameter]

    def losses(self) -> dict[str, Tensor]:
        """{task: cross-entropy of each sample [N]}, one forward of the whole batch."""
        outputs = self.model(self.inputs)
        return {t: cross_entropy(outputs[t], y) for t, y in self.labels.items()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample, [N], its mean over pixels where there are some: logits [N, C, *], labels [N, *]."""
    return (
        functional.cross_entropy(logits, labels, reduction="none").reshape(len(labels), -1).mean(1)
    )


def build(
    name: str,
    tasks: int,
    quick: bool = False,
    *,
    sizes: Sizes = DEFAULT,
    smooth: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """The case of one of `MODELS` with `tasks` heads; a quarter of the samples is to be forgotten, every fourth one.

    What `sizes` leaves out is as listed above. The model is in eval mode.

    Raises:
        ValueError: the model is unknown or has no such size, or `tasks` is not positive.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    if tasks < 1:
        raise ValueError(f"tasks is {tasks}; a model needs at least one task")
    for asked, value in sizes._asdict().items():
        if value is not None and (value < 1 or asked not in SIZED.get(name, ("samples",))):
            raise ValueError(
                f"{asked} is {value} for {name!r}; expected a positive number, and of {name!r} one of "
                f"{', '.join(SIZED.get(name, ('samples',)))}"
            )
    torch.manual_seed(0)
    size = "quick" if quick else "gpu" if device.startswith("cuda") else "cpu"
    backbone, width, inputs = MODELS[name](size, nn.SiLU if smooth else nn.ReLU, sizes)
    model = MultiHead(backbone, width, tasks, name in PIXELS).to(device, dtype).eval()
    inputs = inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    count = len(inputs)
    with torch.no_grad():
        shape = model(inputs[:1])["task0"].shape[2:]
    labels = {t: torch.randint(CLASSES, (count, *shape)).to(device) for t in model.heads}
    shared = {n: p for n, p in model.named_parameters() if tasks == 1 or n.startswith("backbone.")}
    return Case(model, inputs, labels, torch.arange(count, device=device) % 4 == 0, shared)
