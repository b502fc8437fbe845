"""The softmax functions over as many columns as the goals have, at the temperature down to which no maximum is taken.

Shapes: N rows, K columns or prototypes, d width.
"""

import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor

K = 65536
#: Unit vectors need no maximum at the first temperature, where 2 / temperature = 87, and one at the second.
TEMPERATURES = (2 / 87, 1 / 60)
NO_MASKS = (None, None, None, False)


def vectors(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Unit rows [4, 24] and columns [K, 24]. The columns lie about one direction: all logits of the first row, which is
    one of them, are near their upper bound, and those of the second, its opposite, near the lower one.
    """
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(24, generator=generator)
    cols = F.normalize(F.normalize(centre, dim=0) + 0.1 * torch.randn(K, 24, generator=generator), dim=1)
    others = torch.randn(2, 24, generator=generator)
    rows = F.normalize(torch.stack([cols[K // 2], -cols[K // 2], *others]), dim=1)
    return rows.to(device, dtype), cols.to(device, dtype)


def _draw(size: int, device: str) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device)


def _compare(answers: dict[str, Tensor], written_out, dtype: torch.dtype, temperature: float) -> None:
    """written_out(dtype) gives the answers in that dtype; d_rows and d_cols are gradients through logits."""
    for (name, answer), plain, true in zip(
        answers.items(), written_out(torch.float32), written_out(torch.float64), strict=True
    ):
        kind = torch.float32 if answer.ndim == 1 else dtype
        scale = 1 / temperature if name in ("d_rows", "d_cols") else 1.0
        assert_close(name, answer, plain.to(answer.dtype), true, kind, 1 / temperature, scale)


def check_answers(posterior, dtype: torch.dtype, temperature: float, device: str = "cpu") -> None:
    """What a backend's `posterior` answers, its forward and its sums over the rows."""
    rows, cols = vectors(dtype, device)
    log_prior = _draw(K, device).log_softmax(dim=0)

    def written_out(kind):
        logits = rows.to(kind) @ cols.to(kind).T / temperature
        p = logits.softmax(dim=1)
        return logits.logsumexp(dim=1), p @ cols.to(kind), p @ log_prior.to(kind), p.sum(dim=0)

    names = ("lse", "mean", "expected log prior", "marginal")
    answers = dict(zip(names, posterior(rows, cols, temperature, log_prior, True), strict=True))
    _compare(answers, written_out, dtype, temperature)


def check_gradients(
    lse, lse_backward, posterior_backward, dtype: torch.dtype, temperature: float, device: str = "cpu"
) -> None:
    """A backend's `lse` and its gradients, and the gradient of a mean's values."""
    rows, cols = vectors(dtype, device)
    grad = _draw(4, device)

    def written_out(kind):
        x, y = rows.to(kind), cols.to(kind)
        logits = x @ y.T / temperature
        p = logits.softmax(dim=1)
        slope = grad.to(kind)[:, None] * p / temperature
        return logits.logsumexp(dim=1), p @ y, slope @ y, slope.T @ x, p.T @ x

    found, mean, *_ = lse(rows, cols, temperature, *NO_MASKS, True)
    gradients = lse_backward(grad, found, None, mean, rows, cols, temperature, *NO_MASKS, True, True)
    only_v = (None, None, None, rows.float(), None, None, None)
    _, of_values = posterior_backward(rows, cols, temperature, found, *only_v, False, True)
    names = ("lse", "mean", "d_rows", "d_cols", "gradient of the values")
    answers = dict(zip(names, (found, mean, *gradients, of_values), strict=True))
    _compare(answers, written_out, dtype, temperature)
