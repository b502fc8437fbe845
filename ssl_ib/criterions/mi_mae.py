"""MI-MAE: reconstruction, with the information that an image's masked latents share pushed up, and what each holds of
its own visible patches pushed down (Huang et al., "Learning Mask Invariant Mutual Information for Masked Image
Modeling", ICLR 2025).

Shapes: B images, N masks an image, K visible patches, L patches, Dx width of a visible token, D width of a latent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed, ops
from ..config.hints import Count, NonNegative, Positive, PositiveInt, Probability
from ..config.registry import register_criterion
from ..errors import UserError
from ..info.club import ConditionalGaussian, Variance, club, log_likelihood
from ..ops.distributed import info_nce
from ..part import Context, Criterion, Nats, ParamGroup, RunInfo
from ..types import Batch, Loss, Progress
from .gate import Gate, GateMode
from .mae import MAE
from .pair import image_labels, shares, unit

_logger = logging.getLogger(__name__)


@register_criterion("mi_mae")
class MIMAE(Criterion):
    """w_rec L_rec + w_max L_max + w_min L_min + w_approx L_approx, in one backward.

    L_rec    the loss of `reconstruction`, a criterion of its own: `mae`, or `simmim` for MI-SimMIM.
    L_max    equation 8: each latent picks the other latents of its image out of all latents, by cosine similarity.
    L_min    equation 10: CLUB's bound on what latent z_j holds of its visible patches X_j. Its gradient reaches the
             encoder through z_j alone: X_j and the approximation network are constants.
    L_approx equation 9: minus the log-likelihood of z_j given X_j, both constants: it trains the network and no more.

    Reads `latents` [B, N, D], `visible` [B*N, K, Dx] (unless xj is "pixels"), and what the reconstruction's criterion
    reads. A term whose weight is 0 is still computed and logged, but gives no gradient.

    temperature:    of L_max.
    nce_denom:      the denominator's candidates: "all" other latents, siblings among them, so that the term's least
                    value is (N-1)/N log(N-1); or "no_siblings": the positive and the latents of other images.
    nce_norm:       L_max of an image is its pairs' sum over N^2 ("n2", equation 8) or over N(N-1) ("pairs").
    proj:           head of the latents in L_max: "none", or "mlp" (Linear, GELU, Linear to proj_dim).
    gather:         candidates of L_max, and of L_min with club_neg=batch, from all processes.
    xj:             what the network sees of the visible patches: "token_mlp", an MLP on each embedded patch; "pooled",
                    on their mean; "pixels", an MLP on each patch's pixels.
    var:            the form of its variance (ssl_ib/info/club.py); hidden: its width (null: that of what it reads).
    club_reduce:    "mean" over D in L_min and L_approx, or the "sum", which is nats; watched values are always sums.
    club_neg:       the candidates of L_min: "siblings", or all latents of the "batch" as in CLUB.
    club_clamp0:    L_min counts for no less than 0.
    w_approx:       0 leaves the network at its random start (table 3a, row d).
    approx_lr:      a learning rate of the network's own, or the run's.
    gate:           L_rec trains the encoder alone until it is below gate_eps (section 5.1); the others count "latch":
                    from the first time its running mean is (which forgets at gate_momentum); "instant": in the steps
                    where L_rec itself is; "none": from the start.
    gate_terms:     what the gate holds back: "all" is L_max and L_min, "min" is L_min alone. L_approx, which gives the
                    encoder no gradient, is never held back.
    gate_max_epoch: a gate is open from this epoch on, whatever the loss (null: it waits for the loss alone).

    Watched, in nats: `nce_nats`, log(candidates) - InfoNCE, a lower bound on what two latents of an image share, and
    `nce_ceiling`, its largest value; `club_nats`, the bound of L_min, an upper bound only as far as the network is
    right, and so an estimate; `log_likelihood` of the latents.
    Further `variance_floor` (share of variances at their least value), `negative_bounds` (share of images whose bound
    is below 0), `gate` (0 or 1), `gate_step` (the step at which a latch opened, or -1), and `mask_coverage` (share of
    the patches that some mask shows) and `mask_overlap` (share of its patches that a mask shares with another, mean
    over pairs).
    """

    def __init__(
        self,
        info: RunInfo,
        reconstruction: Criterion | None = None,
        w_rec: NonNegative = 1.0,
        w_max: NonNegative = 1.0,
        w_min: NonNegative = 10.0,
        w_approx: NonNegative = 1.0,
        temperature: Positive = 0.07,
        nce_denom: Literal["all", "no_siblings"] = "all",
        nce_norm: Literal["n2", "pairs"] = "n2",
        proj: Literal["none", "mlp"] = "none",
        proj_dim: PositiveInt = 128,
        gather: bool = True,
        xj: Literal["token_mlp", "pooled", "pixels"] = "token_mlp",
        var: Variance = "relu_floor",
        hidden: PositiveInt | None = None,
        club_reduce: Literal["mean", "sum"] = "mean",
        club_neg: Literal["siblings", "batch"] = "siblings",
        club_clamp0: bool = False,
        approx_lr: Positive | None = None,
        gate: GateMode = "latch",
        gate_terms: Literal["all", "min"] = "all",
        gate_eps: Positive = 0.5,
        gate_momentum: Probability = 0.9,
        gate_max_epoch: Count | None = None,
    ):
        super().__init__()
        self.w_rec, self.w_max, self.w_min, self.w_approx = w_rec, w_max, w_min, w_approx
        self.temperature, self.nce_denom, self.nce_norm, self.gather = temperature, nce_denom, nce_norm, gather
        self.xj, self.club_reduce, self.club_neg, self.club_clamp0 = xj, club_reduce, club_neg, club_clamp0
        self._approx_lr = approx_lr  # not under its own name, so a schedule of it is refused: it is read once
        # Fixed here, because scheduled weights may pass through 0 while what they train must stay in the graph.
        self.reconstructs, self.maximises, self.minimises = bool(w_rec), bool(w_max), bool(w_min)
        self.approximates, self.bounds = bool(w_approx), bool(w_min or w_approx)
        if not (w_rec or w_max or w_min):
            raise UserError("w_rec, w_max and w_min are all 0: nothing would train the encoder")
        held_back = w_min or (w_max and gate_terms == "all")
        if held_back and not w_rec and gate != "none":
            raise UserError(f"gate={gate!r} waits for the reconstruction, which w_rec=0 leaves out: use gate=none")
        self._check_masks(info)
        if reconstruction is not None and (
            isinstance(reconstruction, MIMAE) or "reconstruction" not in reconstruction.requires
        ):
            raise UserError(
                "reconstruction: expected a criterion that scores reconstructions, such as mae or simmim, got a "
                f"{type(reconstruction).__name__}"
            )
        self.reconstruction = (MAE(info) if reconstruction is None else reconstruction) if self.reconstructs else None
        width = info.width("latents")
        self.projection = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, proj_dim))
            if proj == "mlp" and w_max
            else None
        )
        in_width = self._pixels_a_patch(info) if xj == "pixels" else info.width("visible")
        self.approximation = (
            ConditionalGaussian(in_width, width, hidden or in_width, var, xj == "pooled") if self.bounds else None
        )
        if self.approximation is not None and not w_approx:
            self.approximation.requires_grad_(False)
        self.gate, self.gated = Gate(gate, gate_eps, gate_momentum, gate_max_epoch), bool(held_back)
        self.gate_terms = gate_terms
        self.nats = {"nce_nats": Nats("lower bound", "what two masked latents of an image share", "nce_ceiling")}
        if self.bounds:
            # An upper bound as far as the network knows the latents' distribution, and all latents are candidates.
            self.nats["club_nats"] = Nats("estimate", "what a latent holds of its visible patches (CLUB)")
        self.requires = frozenset({"latents"} if xj == "pixels" or not self.bounds else {"latents", "visible"})
        self.requires |= self.reconstruction.requires if self.reconstruction is not None else frozenset()

    @staticmethod
    def _check_masks(info: RunInfo) -> None:
        for grid in filter(None, map(info.grid, info.view_shapes)):
            masks = info.masks(grid)
            if masks is None or masks[0] < 2:
                has = "none" if masks is None else "1"
                raise UserError(
                    "criterion 'mi_mae' compares the latents of at least 2 masks an image, and the masker gives "
                    f"{has}: use masker=orthogonal or masker=independent"
                )

    @staticmethod
    def _pixels_a_patch(info: RunInfo) -> int:
        channels, height, width = info.view_shapes[0]
        rows, columns = info.grid(info.view_shapes[0]) or (height, width)
        return channels * (height // rows) * (width // columns)

    def param_groups(self) -> Iterable[ParamGroup]:
        """The approximation network, which does not decay, and the projection head."""
        for name, module, more in (
            ("approximation", self.approximation, {"lr": self._approx_lr, "weight_decay": 0.0}),
            ("projection", self.projection, {}),
        ):
            params = [] if module is None else [(n, p) for n, p in module.named_parameters() if p.requires_grad]
            if params:
                yield ParamGroup(name, params, **more)

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        terms: dict[str, tuple[Tensor, float | Tensor]] = {}
        watched: dict[str, Tensor] = {}
        if self.reconstruction is not None:
            inner = self.reconstruction(outputs, batch, progress)
            watched |= inner.terms
            terms["reconstruction"] = (inner.total, self.w_rec)
        # One view as a rule; the terms of several are averaged.
        views = [
            self._information(z, visible) | self._mask_statistics(masks.mask)
            for z, visible, masks in zip(outputs["latents"], self._visible(outputs, batch), batch.masks, strict=True)
        ]
        means = {name: sum(view[name] for view in views) / len(views) for name in views[0]}
        weights = {"max": self.w_max, "approximation": self.w_approx}
        if self.gated:
            gate = self.gate(terms.get("reconstruction", (None,))[0], progress)
            weights |= {"max": self.w_max * gate} if self.gate_terms == "all" else {}
            weights["min"] = self.w_min * gate
            watched |= {"gate": gate, "gate_step": self.gate.opened_at.to(torch.float32)}
        for name in ("max", "min", "approximation"):
            if name in means:
                terms[name] = (means.pop(name), weights[name])
        loss = Loss.weighted(**terms)
        return replace(loss, terms=watched | means | loss.terms)

    def _visible(self, outputs: dict[str, list[Tensor]], batch: Batch) -> list[Tensor | None]:
        """X_j of each view, [B*N, K, Dx], a constant."""
        if not self.bounds:
            return [None] * len(batch.views)
        if self.xj != "pixels":
            return [visible.detach() for visible in outputs["visible"]]
        found = []
        for view, masks in zip(batch.views, batch.masks, strict=True):
            num_patches = masks.mask.shape[2]
            side = math.isqrt(view.shape[2] * view.shape[3] // num_patches)
            pixels = ops.token_gather(ops.patchify(view, side), masks.keep.flatten(1))
            found.append(pixels.unflatten(1, masks.keep.shape[1:]).flatten(0, 1))
        return found

    def _information(self, z: Tensor, visible: Tensor | None) -> dict[str, Tensor]:
        """The terms of one view, and what is watched of them: z [B, N, D], visible [B*N, K, Dx]."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        found = self._max(z if self.maximises else z.detach())
        if visible is None:
            return found
        mean, variance = (x.unflatten(0, z.shape[:2]).to(z.dtype) for x in self.approximation(visible))
        likelihood = log_likelihood(z.detach(), mean, variance)
        # Where L_min does not count, it is a watched number and no more.
        bound = club(z if self.minimises else z.detach(), mean.detach(), variance.detach(), self.club_neg, self.gather)
        images = bound.detach().sum(dim=2).mean(dim=1)
        found |= {
            "club_nats": images.mean(),
            "negative_bounds": (images < 0).to(z.dtype).mean(),
            "log_likelihood": likelihood.detach().sum(dim=2).mean(),
            "variance_floor": (variance.detach() <= 1.01 * self.approximation.least).to(z.dtype).mean(),
        }
        if self.minimises:
            value = self._reduced(bound)
            # The whole batch's bound decides, so that processes which share it agree.
            counts = distributed.all_reduce_mean(value.detach()) > 0 if self.club_clamp0 else 1
            found["min"] = value * counts
        if self.approximates:
            found["approximation"] = -self._reduced(likelihood)
        return found

    def _reduced(self, x: Tensor) -> Tensor:
        """Mean over images and masks of the sum or the mean over dimensions: [B, N, D] -> scalar."""
        return x.mean() if self.club_reduce == "mean" else x.sum(dim=2).mean()

    def _max(self, z: Tensor) -> dict[str, Tensor]:
        """Equation 8 on latents [B, N, D], and the bound it implies in nats."""
        num_images, num_masks, _ = z.shape
        rows = unit((z if self.projection is None else self.projection(z)).flatten(0, 1))
        world = distributed.world_size() if self.gather else 1
        if self.nce_denom == "all":
            value = self._siblings_among_all(rows, num_masks)
            candidates = num_images * world * num_masks - 1
        else:
            value = self._siblings_one_by_one(rows, num_masks)
            candidates = (num_images * world - 1) * num_masks + 1
        scale = (num_masks - 1) / num_masks if self.nce_norm == "n2" else 1.0
        # Siblings among the candidates leave a loss of log(N - 1) at least.
        ceiling = math.log(candidates) - (math.log(num_masks - 1) if self.nce_denom == "all" else 0.0)
        return {
            "max": scale * value,
            "nce_nats": math.log(candidates) - value.detach(),
            "nce_ceiling": torch.full_like(value.detach(), ceiling),
        }

    def _siblings_among_all(self, rows: Tensor, num_masks: int) -> Tensor:
        """Mean over ordered pairs of siblings of -log(exp(s/t) / sum of exp over all but the row): rows [B*N, d]."""
        labels, itself = self._labels(rows, num_masks), torch.arange(len(rows), device=rows.device)
        if self.gather:
            among = info_nce(rows, None, labels, None, self.temperature, itself, shares(rows))
        else:
            among = ops.info_nce(rows, None, labels, None, self.temperature, itself)
        return among.mean()

    def _siblings_one_by_one(self, rows: Tensor, num_masks: int) -> Tensor:
        """The same with a denominator of the positive itself and other images' latents: rows [B*N, d]."""
        labels = self._labels(rows, num_masks)
        gather = distributed.gather if self.gather else lambda x: x
        others, _ = ops.info_nce_parts(rows, gather(rows), labels, gather(labels), self.temperature, drop_group=True)
        siblings = rows.unflatten(0, (-1, num_masks))
        # Autocast would round the logits to bfloat16: an error of some hundredths at small temperatures.
        with torch.autocast(rows.device.type, enabled=False):
            similarity = siblings @ siblings.mT / self.temperature
        losses = F.softplus(others.unflatten(0, (-1, num_masks))[..., None] - similarity)
        pairs = ~torch.eye(num_masks, dtype=torch.bool, device=rows.device)
        return losses[:, pairs].mean()

    @staticmethod
    def _labels(rows: Tensor, num_masks: int) -> Tensor:
        return image_labels(rows[::num_masks]).repeat_interleave(num_masks)

    def after_forward(
        self, outputs: dict[str, list[Tensor]], batch: Batch, terms: dict[str, Tensor], ctx: Context
    ) -> None:
        if "reconstruction" in terms:
            self.gate.update(terms["reconstruction"], ctx.progress)

    def on_epoch_end(self, ctx: Context) -> None:
        gate, progress = self.gate, ctx.progress
        if not self.gated or gate.mode != "latch":
            return
        waiting = "L_max and L_min" if self.gate_terms == "all" else "L_min"
        if gate.opened_in(progress):
            _logger.info("mi_mae: the gate opened at step %d: %s count from here on", int(gate.opened_at), waiting)
        elif int(gate.opened_at) < 0 and progress.epoch + 1 == progress.total_epochs:
            _logger.warning(
                "mi_mae: the gate never opened, so %s never counted: the running mean of L_rec ended at %.3f, and "
                "gate_eps is %g; gate_max_epoch opens it in any case",
                waiting, float(gate.running_mean), gate.threshold,
            )  # fmt: skip

    @staticmethod
    def _mask_statistics(mask: Tensor) -> dict[str, Tensor]:
        """Coverage and overlap of the visible sets: mask bool [B, N, L], True = hidden."""
        num_masks = mask.shape[1]
        seen = (~mask).sum(dim=1).to(torch.float32)
        pairs = num_masks * (num_masks - 1) * (~mask[0, 0]).sum()
        return {
            "mask_coverage": (seen > 0).to(torch.float32).mean(),
            "mask_overlap": (seen * (seen - 1)).sum(dim=1).mean() / pairs,
        }

    def pixels(self, outputs: dict[str, list[Tensor]], batch: Batch) -> list[Tensor] | None:
        return None if self.reconstruction is None else self.reconstruction.pixels(outputs, batch)

    @property
    def pixels_note(self) -> str:
        return "" if self.reconstruction is None else self.reconstruction.pixels_note
