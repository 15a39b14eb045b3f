"""Routers in closed form, and the steps of ridge regression that move their logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.measure import log_costs

PRIOR_RIDGE = 1.0  # strength of the ridge where routers are fitted in closed form, in variances of the inputs
STEP_RIDGE = 1.0  # and in the steps, in mean eigenvalues of the inputs' covariance
MOMENTUM = 0.9  # of the steps


def ridge(features: Tensor, target: Tensor, strength: float = PRIOR_RIDGE) -> Tensor:
    """Weights w (D,) that minimise |features w - target|^2 + strength * N * variance * |w|^2, in the dual.

    features (N,D), target (N,). variance is the features' mean square about their mean. Along that mean w costs almost
    nothing, so that it serves as the intercept that a router lacks.
    """
    features = features.double()
    mean = features.mean(dim=0)
    variance = (features - mean).square().sum(dim=1).mean()
    pull = 100.0**0.5 * F.normalize(mean, dim=0)  # (D,): weight along the mean's direction costs a hundredth
    along = features @ pull  # (N,)
    kernel = features @ features.T + along[:, None] * along  # (N, N)
    kernel.diagonal().add_(strength * variance + 1e-9 * kernel.diagonal().mean())
    dual = torch.linalg.solve(kernel, target.double())  # (N,)
    return (features.T @ dual + (along @ dual) * pull).float()


def fit_routers(inputs: Tensor, targets: Tensor, strength: float = PRIOR_RIDGE) -> Tensor:
    """Routers (R,D) whose logits on inputs (R,N,D) follow targets (R,N), scaled so that all these logits together have
    mean square 1 about their mean. A target of NaN is none."""
    known = ~targets.isnan()
    pairs = [(x[use], y[use]) for x, y, use in zip(inputs, targets, known)]
    weights = torch.stack([ridge(x, y, strength) if len(y) else x.new_zeros(inputs.shape[2]) for x, y in pairs])
    return weights / torch.einsum("rnd,rd->rn", inputs, weights)[known].std().clamp(min=1e-12)


def benefit_prior(benefits: Tensor, inputs: Tensor, weights: Tensor) -> Tensor:
    """Sequence routers (R,D): the logit is what running the place is worth to the sequence, by what it counts in the
    budget. benefits (R,N), inputs (R,N,D), weights (R,)."""
    return fit_routers(inputs, benefits / weights[:, None])


def token_prior(costs: Tensor, inputs: Tensor) -> Tensor:
    """Token routers (R,D): the logit is a token's log Fisher cost. costs (R,N), inputs (R,N,D)."""
    return fit_routers(inputs, log_costs(costs))


def order_prior(order: list[int], inputs: Tensor) -> Tensor:
    """Routers (R,D) whose logit is the rank of the place in an order, the same for everyone. inputs (R,N,D).

    This is the static list itself, to within the fit: the normalised inputs share a strong mean, which serves as the
    intercept.
    """
    ranks = torch.tensor(order).argsort().float()  # (R,): 0 is skipped first
    return fit_routers(inputs, ranks[:, None].expand(-1, inputs.shape[1]), 0.1 * PRIOR_RIDGE)


class RidgeDescent(torch.optim.Optimizer):
    """Steps in the space of logits: each router moves by ridge regression of its units' prices on their inputs.

    With prices p = -d loss / d logit of units with inputs X, the gradient is -X^T p and ridge regression gives
    (X^T X + e I)^-1 X^T p. So the gradient (with momentum) is multiplied by (C + e I)^-1, C = X^T X / N of a fixed
    sample of inputs and e = STEP_RIDGE times its mean eigenvalue: a few massive dimensions of the residual stream no
    longer decide alone. A step is scaled so that the logits of that sample move by `lr` (root mean square, over all
    routers together); the scale of the loss does not matter.

    weights R x (1,D); inputs (R,N,D); counts (R,): what each router's units count in the budget, prices are taken by
    it.
    """

    def __init__(self, weights: list[Tensor], inputs: Tensor, lr: float, counts: Tensor):
        super().__init__(weights, {"lr": lr})
        self.inputs, self.counts = inputs.to(weights[0].device), counts
        kernel = self.inputs @ self.inputs.transpose(1, 2)  # (R, N, N)
        trace = kernel.diagonal(dim1=1, dim2=2).sum(1)  # (R,): of X X^T, which is that of X^T X
        self.ridge = STEP_RIDGE * trace / inputs.shape[2]  # (R,): N e
        self.factor = torch.linalg.cholesky(kernel + self.ridge[:, None, None] * torch.eye(kernel.shape[1]).to(kernel))
        for w in weights:
            self.state[w] = {"exp_avg": torch.zeros_like(w)}

    @torch.no_grad()
    def step(self) -> float:
        """Move the weights; returns by how much the sample's logits rose on average, which a cut should follow."""
        weights = self.param_groups[0]["params"]
        for w in weights:
            self.state[w]["exp_avg"].lerp_(w.grad, 1 - MOMENTUM)
        mean = torch.cat([self.state[w]["exp_avg"] for w in weights])  # (R, D)
        mean = (mean / self.counts[:, None])[..., None]  # (R, D, 1)
        inner = torch.cholesky_solve(self.inputs @ mean, self.factor)  # (R, N, 1)
        move = (mean - self.inputs.transpose(1, 2) @ inner) / self.ridge[
            :, None, None
        ]  # (R, D, 1), Woodbury's identity
        change = self.inputs @ move  # (R, N, 1)
        scale = self.param_groups[0]["lr"] / change.square().mean().sqrt().clamp(min=1e-20)
        for w, m in zip(weights, move):
            w -= scale * m.T
        return -(scale * change.mean()).item()
