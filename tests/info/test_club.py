"""CLUB's bound and its conditional Gaussian against loops over torch.distributions in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.distributions import Normal

from ssl_ib.info.club import FLOOR, ConditionalGaussian, club, club_sampled, log_likelihood

B, N, D, K, DX = 3, 4, 5, 6, 7


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussians() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw(B, N, D), draw(B, N, D, seed=1), draw(B, N, D, seed=2).exp()


def bound_by_loops(z, mean, variance, negatives: str) -> torch.Tensor:
    """log q(z_j|x_j) minus its mean over the candidates, per image, mask and dimension; written as equation 10 is."""
    bound = torch.empty_like(z)
    for b in range(B):
        for j in range(N):
            q = Normal(mean[b, j], variance[b, j].sqrt())
            images = [b] if negatives == "siblings" else range(B)
            candidates = [q.log_prob(z[i, k]) for i in images for k in range(N)]
            bound[b, j] = q.log_prob(z[b, j]) - sum(candidates) / len(candidates)
    return bound


def test_log_likelihood_is_that_of_a_normal_distribution():
    z, mean, variance = gaussians()
    torch.testing.assert_close(log_likelihood(z, mean, variance), Normal(mean, variance.sqrt()).log_prob(z))


@pytest.mark.parametrize("negatives", ["siblings", "batch"])
def test_club_never_forms_the_pairs_that_it_compares(negatives):
    z, mean, variance = gaussians()
    expected = bound_by_loops(z, mean, variance, negatives)
    torch.testing.assert_close(club(z, mean, variance, negatives), expected, rtol=1e-12, atol=1e-13)
    # Far from the origin, where a difference of means of squares would have lost its digits.
    far = club(z.float() + 1000, mean.float() + 1000, variance.float(), negatives)
    torch.testing.assert_close(far.double(), expected, rtol=1e-2, atol=1e-2)


def test_club_default_candidates_are_the_siblings():
    z, mean, variance = gaussians()
    assert torch.equal(club(z, mean, variance), club(z, mean, variance, "siblings"))
    assert (club(z, mean, variance) - club(z, mean, variance, "batch")).abs().min() > 1e-6


def test_the_log_determinants_cancel():
    """With one variance for all dimensions, the bound is a difference of squared distances over it: nothing else."""
    z, mean, _ = gaussians()
    bounds = [club(z, mean, torch.full_like(z, scale)) * scale for scale in (0.01, 1.0, 100.0)]
    torch.testing.assert_close(bounds[0], bounds[1])
    torch.testing.assert_close(bounds[0], bounds[2])
    likelihoods = [log_likelihood(z, mean, torch.full_like(z, scale)) * scale for scale in (0.01, 1.0)]
    assert (likelihoods[0] - likelihoods[1]).abs().max() > 0.1  # they do not cancel in the likelihood


def test_club_of_latents_that_are_alike_is_zero_and_of_means_that_are_alike_too():
    z, mean, variance = gaussians()
    alike = z[:, :1].expand(-1, N, -1)
    torch.testing.assert_close(club(alike, mean, variance), torch.zeros_like(z))
    same = club(z, mean[:, :1].expand(-1, N, -1), variance[:, :1].expand(-1, N, -1))
    torch.testing.assert_close(same.mean(dim=1), torch.zeros(B, D).double())
    assert same.abs().max() > 0.1


def test_club_of_a_network_that_knows_the_latents_is_their_spread():
    """With means at the latents only the candidates' distances are left: mean over pairs of (z_j - z_k)^2 / (2 v)."""
    z, _, variance = gaussians()
    pairs = (z[:, :, None] - z[:, None]).square().mean(dim=2) / (2 * variance)
    torch.testing.assert_close(club(z, z, variance), pairs)
    assert club(z, z, variance).min() >= 0


def test_club_with_one_candidate_a_pair():
    """It is the difference of two likelihoods; its mean over all candidates is CLUB."""
    z, mean, variance = (t.flatten(0, 1) for t in gaussians())
    shifts = [torch.arange(B * N).roll(shift) for shift in range(B * N)]
    each = [club_sampled(z, mean, variance, other) for other in shifts]
    expected = log_likelihood(z, mean, variance) - log_likelihood(z[shifts[2]], mean, variance)
    torch.testing.assert_close(each[2], expected)
    torch.testing.assert_close(torch.stack(each).mean(dim=0), club(*gaussians(), "batch").flatten(0, 1))


def test_gradients_of_club():
    z, mean, variance = (t.requires_grad_() for t in gaussians())
    for negatives in ("siblings", "batch"):
        assert gradcheck(lambda *given, n=negatives: club(*given, n), (z, mean, variance))
        (ours,) = torch.autograd.grad(club(z, mean, variance, negatives).sum(), z)
        (loops,) = torch.autograd.grad(bound_by_loops(z, mean, variance, negatives).sum(), z)
        torch.testing.assert_close(ours, loops)


# --- the conditional Gaussian


def by_hand(network: ConditionalGaussian, tokens: torch.Tensor, pool_first: bool) -> list[torch.Tensor]:
    """Linear, GELU, Linear on every token, then their mean, then the last Linear: raw outputs of both branches."""
    if pool_first:
        tokens = tokens.mean(dim=1, keepdim=True)
    outputs = []
    for first, second, last in (network.mean, network.variance):
        rows = [torch.stack([second(F.gelu(first(token))) for token in row]).mean(dim=0) for row in tokens]
        outputs.append(last(torch.stack(rows)))
    return outputs


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("form", ["relu_floor", "softplus", "tanh_logvar"])
def test_the_mean_over_tokens_commutes_with_the_second_layer(form, pool_first):
    torch.manual_seed(0)
    network, tokens = ConditionalGaussian(DX, D, 8, form, pool_first).double(), 3 * draw(B * N, K, DX, seed=3)
    with torch.no_grad():  # spread the raw variances over both sides of zero
        network.variance[-1].weight.mul_(20)
    raw_mean, raw = by_hand(network, tokens, pool_first)
    assert raw.min() < 0 < raw.max() and raw_mean.min() < 0 < raw_mean.max()
    variance = {
        "relu_floor": raw.clamp(min=0) + 0.001,
        "softplus": (1 + raw.exp()).log() + 0.001,
        "tanh_logvar": torch.exp(torch.tanh(raw)),
    }[form]
    mean = torch.where(raw_mean > 0, raw_mean, 0.01 * raw_mean)
    ours = network(tokens)
    torch.testing.assert_close(ours[0], mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours[1], variance, rtol=1e-10, atol=1e-12)
    bounds = (1 / math.e, math.e) if form == "tanh_logvar" else (FLOOR, math.inf)
    assert ours[1].min() >= bounds[0] and ours[1].max() <= bounds[1]
    if form == "relu_floor":
        assert (ours[1] == FLOOR).any() and (network.float()(tokens.float())[1] <= FLOOR).any()


def test_averaging_first_leaves_nothing_but_the_mean_token():
    torch.manual_seed(0)
    tokens = draw(2, K, DX, seed=4)
    pooled, other = ConditionalGaussian(DX, D, 8, pool_first=True).double(), tokens.clone()
    other[:, 0] += 1
    other[:, 1] -= 1
    torch.testing.assert_close(pooled(tokens), pooled(other))
    each = ConditionalGaussian(DX, D, 8).double()
    assert (each(tokens)[0] - each(other)[0]).abs().max() > 1e-3
    # A set of tokens: their order says nothing.
    torch.testing.assert_close(each(tokens), each(tokens.flip(1)))


@pytest.mark.parametrize("form", ["relu_floor", "softplus", "tanh_logvar"])
def test_the_variance_starts_near_one(form):
    torch.manual_seed(0)
    variance = ConditionalGaussian(96, 96, 96, form)(torch.randn(64, 16, 96))[1]
    assert variance.mean().item() == pytest.approx(1, abs=0.15) and 0.3 < variance.min() and variance.max() < 2.5


def test_branches_share_nothing():
    network = ConditionalGaussian(DX, D, 8)
    network(draw(2, K, DX).float())[0].sum().backward()
    assert all(p.grad is not None for p in network.mean.parameters())
    assert all(p.grad is None for p in network.variance.parameters())


def test_answers_are_float32_under_autocast():
    network = ConditionalGaussian(DX, D, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, variance = network(draw(2, K, DX).float())
    assert mean.dtype == variance.dtype == torch.float32
