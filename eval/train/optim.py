"""Muon for the matrices, AdamW for the embedding and the norms.

Muon: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024): the momentum of a matrix is
replaced by its nearest semi-orthogonal matrix, found by five Newton-Schulz steps of degree five.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz on a stack of matrices [n, rows <= columns, columns]; singular values end near one."""
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


class Optimizer:
    """Steps float32 master weights from the gradients of their working copies.

    A stack that holds several matrices side by side (queries, keys and values; gate and up) is split by rows first.
    """

    def __init__(self, weights: dict[str, torch.Tensor], splits: dict[str, list[int]], muon_rate=0.02, adam_rate=0.004):
        self.master = weights
        self.splits = splits
        self.rates = (muon_rate, adam_rate)
        self.momentum = {n: torch.zeros_like(weights[n]) for n in splits}
        self.adam = {n: (torch.zeros_like(w), torch.zeros_like(w)) for n, w in weights.items() if n not in splits}
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: dict[str, torch.Tensor], scale: float) -> None:
        """One step; `scale` multiplies both rates."""
        self.steps += 1
        self.muon_step(gradients, self.rates[0] * scale)
        self.adam_step(gradients, self.rates[1] * scale)

    def muon_step(self, gradients: dict[str, torch.Tensor], rate: float) -> None:
        """Nesterov momentum 0.95, update times sqrt(max(1, rows / columns)), weight decay 0.02 times the rate."""
        same: dict[tuple[int, int], list] = {}
        for name, rows in self.splits.items():
            gradient, momentum = gradients[name].float(), self.momentum[name]
            momentum.lerp_(gradient, 0.05)
            update = gradient.lerp(momentum, 0.95)
            for part, weight in zip(update.split(rows, 1), self.master[name].split(rows, 1)):
                flip = part.shape[1] > part.shape[2]
                shaped = part.mT if flip else part
                same.setdefault(tuple(shaped.shape[1:]), []).append((shaped, weight, flip))
        for parts in same.values():
            updates = orthogonalize(torch.cat([p for p, _, _ in parts]))
            at = 0
            for part, weight, flip in parts:
                update = updates[at : at + len(part)]
                at += len(part)
                factor = max(1.0, weight.shape[1] / weight.shape[2]) ** 0.5
                weight.mul_(1 - 0.02 * rate).add_(update.mT if flip else update, alpha=-rate * factor)

    def adam_step(self, gradients: dict[str, torch.Tensor], rate: float) -> None:
        """Betas 0.9 and 0.95, no weight decay."""
        for name, (mean, square) in self.adam.items():
            gradient = gradients[name].float()
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.05)
            corrected = (square / (1 - 0.95**self.steps)).sqrt_().add_(1e-8)
            self.master[name].addcdiv_(mean, corrected, value=-rate / (1 - 0.9**self.steps))

    def state(self) -> dict:
        """Everything a resumed run needs besides the weights."""
        return {"momentum": self.momentum, "adam": self.adam, "steps": self.steps}

    def load(self, state: dict) -> None:
        """Takes a saved state over."""
        for name, value in state["momentum"].items():
            self.momentum[name].copy_(value)
        for name, pair in state["adam"].items():
            for mine, value in zip(self.adam[name], pair):
                mine.copy_(value)
        self.steps = state["steps"]
