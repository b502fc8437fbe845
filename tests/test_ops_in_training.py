"""What a training step runs on its hot path, and that the backend does not matter for what is learnt."""

import pytest
import torch
from harness import parts

from ssl_ib import ops
from ssl_ib.config.config import resolve
from ssl_ib.ops import backend as backends
from ssl_ib.run import build_run
from ssl_ib.trainer import Trainer

SMALL = ["model.decoder_dim=24", "model.decoder_depth=1", "model.decoder_heads=3", "batch_size=32", "masker.ratio=0.5"]
# One linear layer as the head, and no Adam: a ReLU's kink and a division by a gradient's own size would make much of
# the last bit, in which backends differ.
SMALL += ["model.contrastive.projector_layers=1", "optim.name=momentum", "optim.lr=1e-2", "optim.warmup_epochs=0"]


@pytest.fixture(autouse=True)
def _choice():
    """A run's choice of backend holds for the process; here it ends with the test."""
    before = backends._current
    yield
    backends._current = before


def steps(backend: str, *overrides: str, count: int = 8) -> tuple[list[dict], set, torch.Tensor]:
    """Rows of the first steps of a small MRCL run, what ran, and the weights after them."""
    parts()
    trainer = Trainer(build_run(resolve("mrcl_digits", [*SMALL, f"ops.backend={backend}", *overrides], ())), None)
    batches = trainer.loader.epoch(0)
    with ops.record() as ran:
        rows = [trainer.train_step(next(batches)) for _ in range(count)]
    weights = torch.cat([p.detach().flatten() for p in trainer.state.parameters()])
    return rows, ran, weights


def test_a_run_on_the_reference_and_one_on_chunked_give_the_same_losses():
    (expected, plain, weights), (rows, fused, others) = steps("reference"), steps("chunked")
    for number, (a, b) in enumerate(zip(rows, expected, strict=True)):
        for name in ("loss", "loss/info_nce", "loss/reconstruction_masked", "loss/reconstruction_unmasked"):
            assert a[name] == pytest.approx(b[name], rel=5e-6), (number, name)
    assert torch.linalg.vector_norm(others - weights) < 5e-3 * torch.linalg.vector_norm(weights - weights.mean())
    # Views have no chunked version.
    fused.remove(("augment", "reference"))
    assert {name for _, name in plain} == {"reference"} and {name for _, name in fused} == {"chunked"}


def test_the_hot_path_of_mrcl_makes_no_logits_no_targets_and_no_hidden_patches():
    _, ran, _ = steps("chunked", count=1)
    forward = {"patch_embed_gather", "token_scatter", "masked_patch_mse", "lse"}
    backward = {f"{name}_backward" for name in forward - {"lse"}} | {"lse_backward_symmetric"}
    assert {function for function, _ in ran} == forward | backward | {"augment"}
