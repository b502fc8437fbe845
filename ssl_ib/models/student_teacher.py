"""A student that sees every crop, and its moving average that sees the global ones: what DINO and SVIB train.

Shapes: B images, V views of which the first G are global crops, D encoder width, d embedding, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import get_pretrained_cfg_value
from torch import Tensor, nn

from ..config.hints import Count, Layers, PositiveInt, Probability
from ..config.registry import register_model
from ..errors import UserError
from ..part import Context, RunInfo
from ..types import Batch
from .encoder import Encoder, Pool
from .encoder_model import EncoderModel
from .momentum import MomentumCopy
from .prototypes import Prototypes
from .siamese import encode_views

#: Outputs that take the head of the one network or the other.
STUDENT, TEACHER = frozenset({"student", "student_logits"}), frozenset({"teacher", "teacher_logits"})


class ProjectionHead(nn.Module):
    """An MLP whose output is scaled to length 1, and where asked a last layer of prototypes (DINO, appendix B).

    layers >= 1 linear ones with GELU between them, and batch norm before it where `norm`: [N, in_width] -> [N, width]
    of length 1. `last` gives its cosines with the prototypes, [N, prototypes]; it is None without any.
    """

    def __init__(self, in_width: int, hidden: int, width: int, layers: int, norm: bool, prototypes: int):
        super().__init__()
        widths = [in_width, *[hidden] * (layers - 1)]
        modules: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            modules += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*modules, nn.Linear(widths[-1], width))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last = Prototypes(prototypes, width) if prototypes else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.mlp(x)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)


@register_model("student_teacher")
class StudentTeacher(EncoderModel):
    """An encoder with a head, and a momentum copy of both.

    Gives `features` [B, D] and `student` of all V views, and `teacher` of the G global ones, without gradient: unit
    vectors [B, head_dim]; with `prototypes` also `student_logits` and `teacher_logits`, their cosines with these
    [B, prototypes] (DINO's last layer, which the teacher has a copy of). Consecutive views of one size are one pass of
    the encoder.

    backbone, backbone_args: a timm model. Its dropout and drop path are the student's alone.
    pool, positions:  of a vision transformer. Views of other sizes than the first get resampled positions.
    head_*:           layers (with GELU), their width, the width of the embedding, batch norm between them.
    prototypes:       of the last layer; 0 for a head that ends in unit vectors.
    freeze_last_epochs: the prototypes do not learn before this epoch (DINO: 1).
    momentum:         of the teacher (DINO: .996 to 1, cosine); none leaves the teacher out.
    eval_net:         which of them is evaluated and kept.
    """

    def __init__(
        self,
        info: RunInfo,
        backbone: str = "vit_small_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        pool: Pool = "cls",
        positions: Literal["learned", "sincos"] = "learned",
        head_layers: Layers = 3,
        head_hidden: PositiveInt = 2048,
        head_dim: PositiveInt = 256,
        head_norm: bool = False,
        prototypes: Count = 0,
        freeze_last_epochs: Count = 0,
        momentum: Probability | None = 0.996,
        eval_net: Literal["teacher", "student"] = "teacher",
    ):
        super().__init__()
        if prototypes == 1:
            raise UserError(
                "one prototype would be every image's: expected prototypes of 2 or more, or 0 for none, got 1"
            )
        self.momentum, self.freeze_last_epochs = momentum, freeze_last_epochs
        self.num_global = info.global_views
        self.student = Encoder(backbone, backbone_args or {}, info.view_shapes[0], pool, positions)
        if not self.student.is_vit and get_pretrained_cfg_value(backbone, "fixed_input_size"):
            if len(set(info.view_shapes)) > 1:
                raise UserError(
                    f"backbone {backbone!r} takes views of one size, got {sorted(set(info.view_shapes))}: give "
                    "views.local_size the value of views.size, or choose another backbone"
                )
        for shape in info.view_shapes:
            self.student.check(shape)
        self.head = ProjectionHead(self.student.width, head_hidden, head_dim, head_layers, head_norm, prototypes)
        self.teacher = None if momentum is None else MomentumCopy(self.student, self.head)
        if self.teacher is None and eval_net == "teacher":
            raise UserError(
                "eval_net=teacher, but momentum is null, which leaves the teacher out: use eval_net=student"
            )
        for module in self.teacher.modules() if self.teacher is not None else ():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        self.eval_net = eval_net
        self.widths = {"features": self.student.width, "student": head_dim}
        if self.teacher is not None:
            self.widths |= {"teacher": head_dim}
        if prototypes:
            self.widths |= {f"{name}_logits": prototypes for name in self.widths if name != "features"}
        self.provides = self.wanted = frozenset(self.widths)

    @property
    def encoder(self) -> Encoder:
        """The evaluated network."""
        return self.teacher.networks[0] if self.eval_net == "teacher" else self.student

    def trained_encoders(self) -> list[nn.Module]:
        """The student's, whichever is kept: the teacher gets no gradient."""
        return [self.student.backbone]

    def select(self, names: Iterable[str]) -> None:
        super().select(names)
        self.head.requires_grad_(bool(self.wanted & STUDENT))
        if self.head.last is not None:
            self.head.last.requires_grad_("student_logits" in self.wanted)
        if self.eval_net == "teacher" and not self.wanted & TEACHER:
            # Its statistics come from being run: without that they would stay those of the first weights.
            if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.teacher.modules()):
                raise UserError(
                    "eval_net=teacher, but the criterion does not read the teacher, so that its batch norm would learn "
                    "no statistics: use eval_net=student (and momentum=null)"
                )

    def forward(self, batch: Batch) -> dict[str, list[Tensor]]:
        keeps = [None if masks is None else masks.keep for masks in batch.masks]
        outputs: dict[str, list[Tensor]] = {}
        if self.wanted & ({"features"} | STUDENT):
            _, outputs["features"] = encode_views(self.student, batch.views, keeps, jointly=True)
            if self.wanted & STUDENT:
                self._project(outputs, "student", self.head, outputs["features"])
        if self.teacher is not None and self.wanted & TEACHER:
            encoder, head = self.teacher.networks
            with torch.no_grad():
                _, seen = encode_views(encoder, batch.views[: self.num_global], keeps[: self.num_global], jointly=True)
                self._project(outputs, "teacher", head, seen)
        return outputs

    def _project(
        self, outputs: dict[str, list[Tensor]], name: str, head: ProjectionHead, features: list[Tensor]
    ) -> None:
        """One pass of the head for all views: its vectors, and where they are wanted their logits."""
        sizes = [len(f) for f in features]
        z = head(torch.cat(features))
        outputs[name] = list(z.split(sizes))
        if f"{name}_logits" in self.wanted:
            outputs[f"{name}_logits"] = list(head.last(z).split(sizes))

    def before_step(self, ctx: Context) -> None:
        if self.head.last is not None and ctx.progress.epoch < self.freeze_last_epochs:
            self.head.last.weight.grad = None

    def after_step(self, ctx: Context) -> None:
        if self.teacher is not None:
            self.teacher.update(self.student, self.head, momentum=self.momentum)
