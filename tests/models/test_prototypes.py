"""Prototypes: vectors whose length does not count, and the head that ends in them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_ib.models.prototypes import Prototypes
from ssl_ib.models.student_teacher import ProjectionHead

N, K, D = 4, 6, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosines():
    prototypes, x = Prototypes(K, D).double(), F.normalize(draw(N, D), dim=1)
    assert torch.allclose(prototypes.weight.norm(dim=1), torch.ones(K, dtype=torch.float64))
    with torch.no_grad():
        prototypes.weight.copy_(draw(K, D, seed=1) * torch.arange(1, K + 1)[:, None])
    prototypes.rescale()
    found = prototypes(x)
    for n in range(N):
        for k in range(K):
            expected = F.cosine_similarity(x[n], prototypes.weight[k], dim=0)
            assert found[n, k].item() == pytest.approx(expected.item())


def test_a_run_keeps_them_at_length_1():
    """One step with the hooks around it is one step of SGD on vectors that are normalised in the forward."""
    prototypes, x = Prototypes(K, D), F.normalize(draw(N, D), dim=1).float()
    assert prototypes.unit() is prototypes.weight
    free = prototypes.weight.detach().clone().requires_grad_()
    F.linear(x, F.normalize(free, dim=1)).square().sum().backward()
    prototypes(x).square().sum().backward()
    prototypes.before_step(None)
    torch.testing.assert_close(prototypes.weight.grad, free.grad, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        prototypes.weight -= 0.1 * prototypes.weight.grad
        free -= 0.1 * free.grad
    prototypes.after_step(None)
    assert prototypes.unit() is prototypes.weight
    torch.testing.assert_close(prototypes.weight.detach(), F.normalize(free.detach(), dim=1))


def test_loaded_vectors_are_of_length_1():
    """Those that a run has saved are so already, and keep their last bits; each of the others is scaled."""
    prototypes = Prototypes(2000, D)
    # Among so many there are some that scaling once more would move.
    assert not torch.equal(prototypes.weight, F.normalize(prototypes.weight, dim=1))
    given = prototypes.state_dict()["weight"].clone()
    given[:K] = 5 * draw(K, D).float()
    prototypes.load_state_dict({"weight": given})
    torch.testing.assert_close(prototypes.weight[:K].detach(), F.normalize(draw(K, D).float(), dim=1))
    assert torch.equal(prototypes.weight[K:], given[K:])


def test_who_writes_the_same_values_changes_nothing():
    """As DDP does when it is made: a run that continues has the bits of one that went on."""
    prototypes = Prototypes(2000, D)
    before = prototypes.unit().clone()
    with torch.no_grad():
        prototypes.weight.copy_(prototypes.weight.clone())
    assert torch.equal(prototypes.unit(), before)


def test_another_type_has_vectors_of_length_1():
    moved = Prototypes(K, D).double()
    torch.testing.assert_close(moved.unit().norm(dim=1), torch.ones(K, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_compiled_graph_serves_every_step():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    prototypes, x = Prototypes(K, D), F.normalize(draw(N, D), dim=1).float()
    compiled = torch.compile(prototypes, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        loss = compiled(x).square().sum()
        torch.testing.assert_close(loss, prototypes(x).square().sum())
        loss.backward()
        with torch.no_grad():
            prototypes.weight -= 0.1 * prototypes.weight.grad
        prototypes.after_step(None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_length_is_no_degree_of_freedom():
    prototypes, x = Prototypes(K, D).double(), F.normalize(draw(N, D), dim=1)
    prototypes.rescale()
    before = prototypes(x).detach()
    prototypes(x).square().sum().backward()
    prototypes.before_step(None)
    across = (prototypes.weight * prototypes.weight.grad).sum(dim=1)
    assert prototypes.weight.grad.norm() > 0.1 and across.abs().max() < 1e-12
    with torch.no_grad():
        prototypes.weight *= 3.0
    prototypes.rescale()
    torch.testing.assert_close(prototypes(x), before)


def test_a_gradient_that_is_not_tangent():
    """SwAV's: the gradient at vectors of length 1 that the forward does not normalise."""
    tangent, whole = Prototypes(K, D).double(), Prototypes(K, D, tangent=False).double()
    whole.load_state_dict(tangent.state_dict())
    for prototypes in (tangent, whole):
        prototypes.rescale()
    x = F.normalize(draw(N, D), dim=1)
    for prototypes in (tangent, whole):
        prototypes(x).square().sum().backward()
        prototypes.before_step(None)
    free = whole.weight.detach().clone().requires_grad_()
    (x @ free.T).square().sum().backward()
    torch.testing.assert_close(whole.weight.grad, free.grad)
    across = (free * free.grad).sum(dim=1, keepdim=True)
    assert across.abs().min() > 1e-3
    torch.testing.assert_close(tangent.weight.grad, (free.grad - across * free).detach())


def test_cosines_are_not_rounded_under_autocast():
    prototypes, x = Prototypes(K, D), F.normalize(draw(N, D), dim=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = prototypes(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, prototypes(x), rtol=1e-6, atol=1e-6)


def test_they_start_in_all_directions():
    torch.manual_seed(0)
    weight = Prototypes(4000, 16).weight
    assert weight.mean(dim=0).norm() < 0.05
    assert torch.allclose(weight.T @ weight / 4000, torch.eye(16) / 16, atol=0.01)


def test_unit_vectors_are_float32_for_half_weights():
    assert Prototypes(K, D).bfloat16().unit().dtype == torch.float32
    assert Prototypes(K, D).double().unit().dtype == torch.float64


@pytest.mark.parametrize("layers, linear", [(1, [(7, 5)]), (2, [(7, 9), (9, 5)]), (3, [(7, 9), (9, 9), (9, 5)])])
@pytest.mark.parametrize("norm", [False, True])
def test_head(layers, linear, norm):
    head = ProjectionHead(7, 9, 5, layers, norm, 0).double()
    assert [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)] == linear
    assert sum(isinstance(m, nn.GELU) for m in head.modules()) == layers - 1
    assert sum(isinstance(m, nn.BatchNorm1d) for m in head.modules()) == (layers - 1 if norm else 0)
    assert head.last is None
    z = head(draw(N, 7))
    assert z.shape == (N, 5)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(N, dtype=torch.float64))


def test_head_is_a_plain_mlp():
    head, x = ProjectionHead(7, 9, 5, 3, False, K).double(), draw(N, 7)
    first, second, third = (m for m in head.mlp if isinstance(m, nn.Linear))
    hidden = F.gelu(F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    z = hidden @ third.weight.T + third.bias
    cosines = (z / z.norm(dim=1, keepdim=True)) @ (head.last.weight / head.last.weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head.last(head(x)), cosines)


def test_unit_vectors_are_of_length_1_under_autocast():
    head = ProjectionHead(7, 9, 5, 2, False, 0)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(draw(N, 7).float())
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(N))
