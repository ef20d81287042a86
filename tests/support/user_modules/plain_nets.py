"""Models of plain torch, as people write them."""

from __future__ import annotations

import torch
from torch import nn


class VGG(nn.Module):
    def __init__(self, plan: list[int | str], classes: int = 10) -> None:
        super().__init__()
        self.plan, self.classes = plan, classes
        layers, width = list[nn.Module](), 3
        for step in plan:
            if step == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, int(step), 3, padding=1), nn.ReLU(inplace=True)]
                width = int(step)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class AlexNet(nn.Module):
    def __init__(self, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class ResNet(nn.Module):
    """Made with a class, as torchvision's is."""

    def __init__(self, block: type[nn.Module], layers: list[int], num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layers = nn.Sequential(*(nn.Sequential(*(block(8) for _ in range(count))) for count in layers))
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class Words(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.table = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).mean(1))


class Gated(nn.Module):
    """Goes around a layer."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate * self.original(x)


class Tied(nn.Module):
    """A language model whose head is its embedding, and whose two layers have one weight; tied by its constructor."""

    def __init__(self, vocabulary: int = 40, width: int = 16) -> None:
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.table = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight
        self.layers[2].weight = self.layers[0].weight
        self.mix = nn.Linear(width, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.layers(self.table(ids)).mean(1)))


class Untied(nn.Module):
    """The same layers, which somebody else ties."""

    def __init__(self, vocabulary: int = 40, width: int = 16) -> None:
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.table = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).mean(1))


class Mixed(nn.Module):
    """Holds a number in float64 at its root, beside layers in float32."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.offset = nn.Parameter(torch.full((1,), 0.1, dtype=torch.float64))
        self.layer = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x).double() + self.offset).to(x.dtype)
