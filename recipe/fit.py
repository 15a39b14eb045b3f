"""Routers in closed form, and the steps of ridge regression that move their logits."""

import torch
import torch.nn.functional as F

from recipe.measure import log_costs

STEP_RIDGE = 1.0  # strength of the ridge in the default recipe's steps, in mean eigenvalues of the inputs' covariance
PRIOR_RIDGE = 1.0  # and where routers are fitted in closed form, in variances of the inputs
MOMENTUM = 0.9  # of the same


def ridge(features: torch.Tensor, target: torch.Tensor, strength: float = PRIOR_RIDGE) -> torch.Tensor:
    """Weights w (D,) that minimise |features w - target|^2 + strength * N * variance * |w|^2, in the dual. features (N,D), target (N,).

    variance is the features' mean square about their mean. Along that mean w costs almost nothing, so that it serves as the intercept that a router lacks.
    """
    features = features.double()
    mean = features.mean(dim=0)
    variance = (features - mean).square().sum(dim=1).mean()
    pull = 100.0 ** 0.5 * F.normalize(mean, dim=0)  # (D,): weight along the mean's direction costs a hundredth
    along = features @ pull  # (N,)
    kernel = features @ features.T + along[:, None] * along  # (N, N)
    kernel.diagonal().add_(strength * variance + 1e-9 * kernel.diagonal().mean())
    dual = torch.linalg.solve(kernel, target.double())  # (N,)
    return (features.T @ dual + (along @ dual) * pull).float()


def benefit_prior(benefits: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sequence routers (R,D) in closed form: the logit is what running the place is worth to the sequence, by what it counts in the budget.
    benefits (R,N), inputs (R,N,D), weights (R,)."""
    return unit_spread(torch.stack([ridge(x, y) for x, y in zip(inputs, benefits / weights[:, None])]), inputs)


def token_prior(costs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Token routers (R,D) in closed form: the logit is a token's log Fisher cost. costs (R,N), inputs (R,N,D)."""
    return unit_spread(torch.stack([ridge(x, y) for x, y in zip(inputs, log_costs(costs))]), inputs)


def order_prior(ranks: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Routers (R,D) whose logit is the rank at which the layer falls in a drop order. ranks (R,N), inputs (R,N,D).

    With the same ranks for everyone this is the static order itself, to within the fit: the normalised inputs share a strong mean, which
    serves as the intercept.
    """
    return unit_spread(torch.stack([ridge(x, y, 0.1 * PRIOR_RIDGE) for x, y in zip(inputs, ranks)]), inputs)


def unit_spread(weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Routers (R,D) scaled so that all their logits on inputs (R,N,D) have mean square 1 about their mean."""
    return weights / torch.einsum("rnd,rd->rn", inputs, weights).std().clamp(min=1e-12)


def ranks_of(order: list[int]) -> torch.Tensor:
    """(R,) rank of each place in an order; 0 is dropped first."""
    return torch.tensor(order).argsort().float()


class RidgeDescent(torch.optim.Optimizer):
    """Steps in the space of logits: each router moves by the ridge regression of its units' prices on their inputs, not along the raw gradient.

    With prices p = -d loss / d logit of units with inputs X, the gradient is -X^T p and ridge regression gives (X^T X + e I)^-1 X^T p. So the
    gradient (with momentum) is multiplied by (C + e I)^-1, C = X^T X / N of a fixed sample of inputs and e = STRENGTH times its mean
    eigenvalue: a few massive dimensions of the residual stream no longer decide alone. A step is scaled so that the logits of that sample
    move by `lr` (root mean square, over all routers together); the scale of the loss does not matter. inputs (R,N,D); weights R x (1,D);
    counts (R,): what each router's units count in the budget; prices are taken by it.
    """

    def __init__(self, weights: list[torch.Tensor], inputs: torch.Tensor, lr: float, counts: torch.Tensor):
        super().__init__(weights, {"lr": lr})
        self.inputs, self.counts = inputs.to(weights[0].device), counts
        kernel = self.inputs @ self.inputs.transpose(1, 2)  # (R, N, N)
        self.ridge = STEP_RIDGE * kernel.diagonal(dim1=1, dim2=2).sum(1) / inputs.shape[2]  # (R,) N e: the trace of X^T X is that of X X^T
        self.factor = torch.linalg.cholesky(kernel + torch.diag_embed(self.ridge[:, None].expand(-1, inputs.shape[1])))
        for w in weights:
            self.state[w] = {"exp_avg": torch.zeros_like(w)}

    @torch.no_grad()
    def step(self) -> float:
        """Move the weights; returns by how much the sample's logits rose on average, which a cut should follow."""
        weights = self.param_groups[0]["params"]
        for w in weights:
            self.state[w]["exp_avg"].lerp_(w.grad, 1 - MOMENTUM)
        mean = (torch.cat([self.state[w]["exp_avg"] for w in weights]) / self.counts[:, None])[..., None]  # (R, D, 1)
        inner = torch.cholesky_solve(self.inputs @ mean, self.factor)  # (R, N, 1)
        move = (mean - self.inputs.transpose(1, 2) @ inner) / self.ridge[:, None, None]  # (R, D, 1), by Woodbury's identity
        change = self.inputs @ move  # (R, N, 1)
        scale = self.param_groups[0]["lr"] / change.square().mean().sqrt().clamp(min=1e-20)
        for w, m in zip(weights, move):
            w -= scale * m.T
        return -(scale * change.mean()).item()
