"""The models that steps are timed on: a shared backbone, one head per task, and a batch of random samples.

    mlp           784 -> 3 x 1024 -> 10, ReLU                                                     N = 64
    transformer   token and position embedding, 4 pre-norm layers, d = 256, 64 tokens, mean pool   N = 16
    resnet        ResNet-18 with GroupNorm(32), stem 3x3 of stride 1 without max-pool, 64x64       N = 16

On a GPU (`size="gpu"`) the batches are 256, 32 and 128, the MLP is 2048 wide, the transformer d = 768 with 6 layers and
256 tokens.

With one task every parameter is a row parameter, the head's too; with several tasks the backbone's are and the heads
stay outside, as in multi-task learning. "quick" shrinks everything to milliseconds and keeps the structure.

`smooth` puts SiLU for ReLU, to compare two ways of computing a step: their forwards round differently, and one ReLU
that opens in only one of them moves a row's gradient by as much as a hundredth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


Activation = Callable[[], nn.Module]


class MultiHead(nn.Module):
    """{task: logits [N, C]} of x [N, ...]: one linear head per task on the features of one backbone."""

    def __init__(self, backbone: nn.Module, width: int, tasks: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({f"task{t}": nn.Linear(width, CLASSES) for t in range(tasks)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {name: head(features) for name, head in self.heads.items()}


class Transformer(nn.Module):
    """Features [N, d] of token ids [N, S]: pre-norm encoder layers without dropout, then the mean over positions."""

    def __init__(self, vocabulary: int, width: int, layers: int, positions: int, activation: Activation) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width))
        heads, wide = max(1, width // 64), 4 * width
        layer = nn.TransformerEncoderLayer(width, heads, wide, 0.0, activation(), batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(self.tokens(x) + self.positions)
        return features.mean(-2)


class Block(nn.Module):
    """y = act(f(x) + shortcut(x)), f two 3x3 convolutions with GroupNorm; the shortcut is 1x1 where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            _norm(outputs),
            activation(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            _norm(outputs),
        )
        self.activation = activation()
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 2), channels)


def _mlp(size: str, activation: Activation) -> tuple[nn.Module, int, Tensor]:
    width, samples = {"quick": (32, 8), "cpu": (1024, 64), "gpu": (2048, 256)}[size]
    layers = [m for inputs in (784, width, width) for m in (nn.Linear(inputs, width), activation())]
    return nn.Sequential(*layers), width, torch.randn(samples, 784)


def _transformer(size: str, activation: Activation) -> tuple[nn.Module, int, Tensor]:
    sizes = {"quick": (32, 2, 8, 8), "cpu": (256, 4, 64, 16), "gpu": (768, 6, 256, 32)}
    width, layers, positions, samples = sizes[size]
    tokens = torch.randint(1000, (samples, positions))
    return Transformer(1000, width, layers, positions, activation), width, tokens


def _resnet(size: str, activation: Activation) -> tuple[nn.Module, int, Tensor]:
    base, side, samples = {"quick": (8, 32, 8), "cpu": (64, 64, 16), "gpu": (64, 64, 128)}[size]
    layers: list[nn.Module] = [nn.Conv2d(3, base, 3, 1, 1, bias=False), _norm(base), activation()]
    width = base
    for stage in range(4):
        stride = 1 if stage == 0 else 2
        layers += [Block(width, stride * width, stride, activation)]
        width *= stride
        layers += [Block(width, width, 1, activation)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers), width, torch.randn(samples, 3, side, side)


MODELS: dict[str, Callable[[str, Activation], tuple[nn.Module, int, Tensor]]] = {
    "mlp": _mlp,
    "transformer": _transformer,
    "resnet": _resnet,
}


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
        return {t: functional.cross_entropy(outputs[t], y, reduction="none") for t, y in self.labels.items()}


def build(
    name: str,
    tasks: int,
    quick: bool = False,
    *,
    smooth: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """The case of one of `MODELS` with `tasks` heads; a quarter of the samples is to be forgotten, every fourth one.

    Raises:
        ValueError: the model is unknown, or `tasks` is not positive.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    if tasks < 1:
        raise ValueError(f"tasks is {tasks}; a model needs at least one task")
    torch.manual_seed(0)
    size = "quick" if quick else "gpu" if device.startswith("cuda") else "cpu"
    backbone, width, inputs = MODELS[name](size, nn.SiLU if smooth else nn.ReLU)
    model = MultiHead(backbone, width, tasks).to(device, dtype)
    inputs = inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    samples = len(inputs)
    labels = {t: torch.randint(CLASSES, (samples,)).to(device) for t in model.heads}
    shared = {n: p for n, p in model.named_parameters() if tasks == 1 or n.startswith("backbone.")}
    return Case(model, inputs, labels, torch.arange(samples, device=device) % 4 == 0, shared)
