"""Quality models: backbone, neck and head (docs/METHOD.md §1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srm_kernels.checks import may_ask

from .backbones import DEEPEST_STRIDE, Backbone, check_backbone, check_size
from .checkpoint import load_weights, read_card, shipped
from .config import STORED, SRMConfig
from .head import Head
from .modules import check_like, evaluating
from .neck import NeckOutput, SRMNeck, make_neck
from .necks import check_neck
from .statistics import BatchStatistics

RANGE_TOLERANCE = 1e-2  # permits small finite-difference steps out of [0, 1]


class IQAModel(nn.Module):
    """No-reference image quality model. Use `build_model` to create one.

    The model takes pixels in [0, 1] and normalises them itself, so that attacks change the image before normalisation.

    Args:
        backbone: Name of a timm model.
        neck: "srm", "quadratic" or "none".
        config: Constants of the model.
        pretrained: Whether to load ImageNet weights of the backbone.

    Raises:
        ValueError: A name is unknown, or the backbone has no map at one of the strides 4, 8, 16 and 32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, neck: str, config: SRMConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        check_neck(neck)
        self.backbone_name, self.neck_name, self.config = backbone, neck, config
        self.backbone = Backbone(backbone, pretrained=pretrained, image_size=config.image_size)
        self.neck = make_neck(neck, self.backbone.channels, config)
        self.head = Head(config.channels)
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, 3, 1, 1), persistent=False)
        self._fill_normalisation()
        self.tensor_names = frozenset(self.state_dict())  # the names of a checkpoint

    def _fill_normalisation(self) -> None:
        for buffer, values in ((self.mean, self.backbone.mean), (self.std, self.backbone.std)):
            buffer.copy_(torch.tensor(values, device="cpu").view(1, 3, 1, 1))

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> IQAModel:
        """Allocate like `Module.to_empty`, then fill the buffers that checkpoints do not contain."""
        super().to_empty(device=device, recurse=recurse)
        self._fill_constants()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> IQAModel:
        # If an outer module is moved by its `to_empty`, PyTorch calls `_apply` of this module, but not its `to_empty`.
        without_memory = self.mean.is_meta
        super()._apply(fn, recurse)
        if without_memory and not self.mean.is_meta:
            self._fill_constants()
        return self

    def _fill_constants(self) -> None:
        self._fill_normalisation()
        self.backbone.state_constants()

    @property
    def stochastic(self) -> bool:
        """Whether the score of one image may differ between two calls in evaluation mode.

        If so, attacks need EOT (docs/METHOD.md §6).
        """
        return self.neck.stochastic

    def forward(
        self, images: Tensor, *, return_losses: bool = False, statistics: BatchStatistics | None = None
    ) -> Any:
        """Predict quality scores.

        Args:
            images: Floating-point images (B, 3, H, W) in [0, 1].
            return_losses: Whether to return the neck's losses too.
            statistics: Statistics of a batch that is split into micro-batches, as in `SRMNeck.forward`.

        Returns:
            Scores (B,) on the scale of normalised MOS; higher is better. With `return_losses`, the pair (scores,
            losses). `losses` is a dict of the unweighted scalars "tau", "entropy" and "balance".

        Raises:
            TypeError: The images are not floating-point, or their dtype does not fit the model.
            ValueError: The shape or the device is wrong, or a value is outside [0, 1] or not finite. Values are checked
                only on a CPU, because on other devices such a check would wait for the device.
        """
        scores, losses = self.scores_and_losses(images, statistics=statistics)
        return (scores, losses) if return_losses else scores

    def scores_and_losses(
        self, images: Tensor, *, statistics: BatchStatistics | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scores and the losses, as `forward` with `return_losses` does.

        With DDP or FSDP, do not call this method. Call the DDP or FSDP model as `model(images, return_losses=True)`
        instead, because DDP and FSDP take part only in calls of the model itself, not in calls of its methods.
        """
        pyramid = self.pyramid(images)
        if images.requires_grad and isinstance(self.neck, SRMNeck):
            self.neck.warn_uncalibrated()  # images that require gradients indicate an attack
        output = self.neck(pyramid, statistics=statistics)
        return self.head(output.fused), output.losses

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the backbone's four feature maps for images (B, 3, H, W) in [0, 1], shallowest first."""
        _check_images(images, self.mean)
        return self.backbone((images - self.mean) / self.std)

    def neck_output(self, images: Tensor) -> NeckOutput:
        """Return the full output of the neck for images (B, 3, H, W) in [0, 1]."""
        return self.neck(self.pyramid(images))

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Calibrate the neck on the first training batch, (B, 3, H, W) in [0, 1] (docs/METHOD.md §1.6)."""
        self.neck.calibrate(self.pyramid(images))

    def clamp_(self) -> None:
        """Clamp τ to its range. Call this method after every optimiser step."""
        self.neck.clamp_()

    @torch.no_grad()
    def diagnose(self, images: Tensor) -> dict[str, Any]:
        """Run `SRMNeck.diagnose` in evaluation mode on images (B, 3, H, W) in [0, 1]; return JSON values."""
        with evaluating(self):
            return self.neck.diagnose(self.pyramid(images))


def _check_images(images: Tensor, like: Tensor) -> None:
    """Raise TypeError or ValueError unless the model accepts `images`.

    The device and the dtype of `images` are compared with those of `like`, one of the model's buffers.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {kind}; expected a floating-point tensor")
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 3, H, W)")
    if min(images.shape[2:]) < DEEPEST_STRIDE:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; expected sides of at least {DEEPEST_STRIDE}, "
            "the stride of the deepest map"
        )
    check_like("images", images, like, promoted=True)
    if not torch.compiler.is_compiling() and may_ask(images):
        low, high = (float(v) for v in images.detach().aminmax())
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise ValueError(f"images range from {low:.4g} to {high:.4g}; expected finite values in [0, 1]")


def build_model(
    backbone: str,
    *,
    neck: str = "srm",
    pretrained: bool = False,
    weights: str | Path | None = None,
    config: SRMConfig | None = None,
) -> IQAModel:
    """Create a quality model in evaluation mode.

    Args:
        backbone: Name of a timm model with maps at strides 4, 8, 16 and 32.
        neck: "srm", "quadratic" (exact attention) or "none".
        pretrained: Whether to load ImageNet weights of the backbone.
        weights: Folder of a checkpoint. Its weights are loaded strictly and without network access. `backbone`, `neck`
            and `config` must be the same as in the checkpoint; only the field `backend` of the config may differ.
        config: Constants of the model. Default: the checkpoint's config, or `SRMConfig()` without a checkpoint.

    Returns:
        The model, on the CPU.

    Raises:
        TypeError: `config` is not an `SRMConfig`.
        ValueError: A name is unknown, the backbone has no map at one of the strides or does not accept images of
            `config.image_size`, or the checkpoint is invalid or differs from the other arguments.
    """
    if config is not None and not isinstance(config, SRMConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected an SRMConfig or None")
    if weights is None:
        check_backbone(backbone)
        check_size(backbone, (config or SRMConfig()).image_size)
        return IQAModel(backbone, neck, config or SRMConfig(), pretrained=pretrained).eval()
    model, _ = load_model(weights, backend=STORED if config is None else config.backend)
    for name, wanted, found in (("backbone", backbone, model.backbone_name), ("neck", neck, model.neck_name)):
        if wanted != found:
            raise ValueError(f"{weights} holds a model with {name} {found!r}; expected {wanted!r}")
    if config is not None and config != model.config:
        differing = [key for key, value in config.to_dict().items() if model.config.to_dict()[key] != value]
        raise ValueError(
            f"{weights}: the config differs from the given config in {', '.join(differing)}; expected the same config"
        )
    return model.eval()


def load_model(
    folder: str | Path | None = None, *, backend: str | None = STORED
) -> tuple[IQAModel, dict[str, Any]]:
    """Load the model of a checkpoint, on the CPU, in fp32 and in evaluation mode.

    Args:
        folder: Folder of the checkpoint. Default: the checkpoint that comes with the package.
        backend: Value of `SRMConfig.backend` for the loaded model; "stored" keeps the value of the checkpoint.

    Returns:
        The model and the checkpoint's card.

    Raises:
        ValueError: The folder is not a checkpoint, the checkpoint is incomplete or damaged, or `folder` is None and no
            checkpoint comes with this installation.
    """
    folder = shipped() if folder is None else folder
    document = read_card(folder)
    config = SRMConfig.from_dict(document["config"])
    if backend != STORED:
        config = config.replace(backend=backend)
    model = IQAModel(document["backbone"], document["neck"], config)
    load_weights(model, folder)
    return model.eval(), document["card"]
