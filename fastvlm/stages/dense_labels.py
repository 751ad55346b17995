"""Train an encoder to classify every cell of an image, with label maps known from rendering.

It stands in for the pretrained encoder from which the papers start: contrastive training from scratch would take hours,
this takes a minute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastvlm.batch import NO_LABEL, Batch
from fastvlm.models.norms import frozen_statistics
from fastvlm.stages.stage import Stage


class DenseLabelStage(Stage):
    """Cross-entropy of a linear head on the encoder's patches against label maps.

    The logits are resized to the label map's grid, as in segmentation. The loss is the mean over the images of the
    optimiser step (all ranks and micro-batches); cells without a label (NO_LABEL) count with a loss of 0. The head is
    not part of the handoff.

    Args:
        num_classes: number of classes of each label channel, in order; class 0 is background.
        background_weight: loss weight of background cells, which make up most of an image.
    """

    def __init__(self, model: nn.Module, *, num_classes: list[int], background_weight: float = 0.25, **stage):
        super().__init__(model, **stage)
        self.num_classes, self.background_weight = list(num_classes), background_weight
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.head = nn.Linear(model.encoder.out_dim, sum(self.num_classes))

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        if not batch.num_images:
            return self.objective_without_images(batch)
        maps = batch.label_maps
        if maps is None or maps.shape[1] < len(self.num_classes):
            raise ValueError(
                f"stage {self.name} needs label maps with {len(self.num_classes)} channels beside its images; "
                "choose a mixture that has them, such as embedded_cells"
            )
        patches = self.patches(batch)  # (I, N, D_v), or (2 I, N, D_v)
        copies = len(patches) // len(maps)
        maps = maps.repeat(copies, 1, 1, 1)
        height, width = self.model.encoder.grid(batch.pixel_values.shape[-1])
        logits = rearrange(self.head(patches), "i (h w) c -> i c h w", h=height, w=width).float()
        if logits.shape[-2:] != maps.shape[-2:]:
            logits = F.interpolate(logits, size=maps.shape[-2:], mode="bilinear", align_corners=False)
        losses, correct = [], []
        for channel, scores in enumerate(logits.split(self.num_classes, dim=1)):
            target = maps[:, channel].long()
            weight = torch.where(target == 0, self.background_weight, 1.0)
            cells = F.cross_entropy(scores, target, ignore_index=NO_LABEL, reduction="none")
            losses.append((cells * weight).flatten(1).mean(1))
            seen = (target > 0) & (target != NO_LABEL)
            correct.append((scores.argmax(1)[seen] == target[seen]).float().mean())
        losses = torch.stack(losses).sum(0)  # (I,), or (2 I,)
        slots = batch.source_ids[batch.input_ids == self.model.image_token_id]  # (I M,), in the order of the images
        source = slots[:: len(slots) // batch.num_images].repeat(copies)
        extra = {f"cell_accuracy/{i}": c.detach() for i, c in enumerate(correct)}
        denominator = torch.tensor(float(batch.num_planned_images * copies), device=losses.device)
        return losses.sum(), denominator, losses, {"source": source, **extra}

    def objective_without_images(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return a loss of 0 that reaches every weight, for whose gradients other ranks wait."""
        with frozen_statistics(self.model):
            loss = self.head(self.patches(batch.with_blank_image())).float().sum() * 0.0
        nothing = loss.detach().new_zeros(0)
        extra = {f"cell_accuracy/{i}": loss.new_tensor(torch.nan) for i in range(len(self.num_classes))}
        denominator = loss.new_tensor(max(1.0, batch.num_planned_images))
        return loss, denominator, nothing, {"source": batch.source_ids[:0, 0], **extra}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        if batch.label_maps is not None:
            self.check_labels(batch.label_maps)  # while they are on the CPU: nothing waits for the device
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def check_labels(self, maps: Tensor) -> None:
        """Refuse labels that are none of the classes, for which a GPU would stop without saying why.

        Raises:
            ValueError: names the channel, the label and the key.
        """
        for channel, (num, labels) in enumerate(zip(self.num_classes, maps.unbind(1))):
            highest = int(labels.masked_fill(labels == NO_LABEL, 0).amax()) if labels.numel() else 0
            if highest >= num:
                key = f"stages.{self.name}.objective.num_classes"
                raise ValueError(
                    f"{key}={self.num_classes}, but channel {channel} of the label maps has label {highest}: its "
                    f"number of classes is at least {highest + 1}"
                )

    def patches(self, batch: Batch) -> Tensor:
        """Return the patches (I, N, D_v) of every view, or (2 I, N, D_v) for an encoder with a branch for tiles.

        Such an encoder gets each image as a global view and as a tile, because without tiles in the mixture the branch
        would not be trained.
        """
        if not getattr(self.model.encoder, "reads_views", False):
            return self.model.patches(batch)
        images = batch.pixel_values
        kinds = (torch.full((len(images),), tile, device=images.device) for tile in (False, True))
        return torch.cat([self.model.encode_patches(images, kind) for kind in kinds])
