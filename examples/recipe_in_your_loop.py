"""Use the LayerSkip recipe in your own training loop, on any supported causal LM.

python examples/recipe_in_your_loop.py
"""

import torch

from telltale.models.presets import build
from telltale.train import layerskip


def main() -> None:
    model = build("nano", vocabulary_size=64, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    recipe = layerskip.apply(model, layerskip.LayerSkipConfig(p_max=0.1, e_scale=1.0, rotation=2))
    model.train()
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        start = torch.randint(64, (8, 1), generator=generator)
        batch = (start + 3 * torch.arange(33)) % 64
        loss, details = recipe.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recipe.advance()
        if step % 10 == 9:
            exits = {exit_layer: round(value.item(), 3) for exit_layer, value in details["exit_losses"].items()}
            print(f"step {step + 1}: loss {loss.item():.3f}, active exits {exits}")
    recipe.remove()


if __name__ == "__main__":
    main()
