"""The 818k-parameter GPT that the speed of Hessian-vector products is measured on, attention written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """A pre-norm transformer block of GPT-2's layout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        parts = self.mix(self.norms[0](hidden)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, length, width)
        hidden = hidden + self.out(mixed)
        return hidden + self.down(functional.gelu(self.up(self.norms[1](hidden))))


class Gpt(nn.Module):
    """GPT-2's shape at 818k parameters: 4 layers, width 128, tied embedding of 128 tokens, 64 positions."""

    def __init__(self, *, layers: int = 4, width: int = 128, heads: int = 4, vocabulary: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (rows, vocabulary, length), as cross-entropy takes them."""
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        hidden = self.tokens(ids) + self.places.weight[:length]
        for block in self.blocks:
            hidden = block(hidden, mask)
        return functional.linear(self.norm(hidden), self.tokens.weight).transpose(1, 2)


def gpt() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The 818k-parameter GPT and a minibatch of 16 sequences of 64 tokens."""
    ids = torch.randint(0, 128, (16, 65))
    return Gpt(), (ids[:, :-1], ids[:, 1:].contiguous())
