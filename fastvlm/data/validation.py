"""The validation set: fixed, balanced over the sources, with the interface of a plan."""

from __future__ import annotations

import logging

import numpy as np

from fastvlm.data.lengths import measure_source
from fastvlm.data.packing import pack_window
from fastvlm.data.plan import Step
from fastvlm.data.source import Mixture, NothingLeft
from fastvlm.data.transforms import ImageTransform
from fastvlm.tokens import Tokenizer

log = logging.getLogger(__name__)


class ValidationPlan:
    """A fixed, balanced set of samples in steps, with the interface that `PlannedDataset` needs of a plan.

    Every source that has the split gives the same number of samples (or all it has), spread evenly over its shards. If
    types, filters and budget (which are meant for training) leave nothing of a source's split, it takes no part, and a
    warning is logged. Empty rows complete the last step, so every rank has the same number of rows.

    Args:
        num_samples: of all sources together.
        batch_size: rows per step, over all ranks.
        Others as in `Plan`.

    Raises:
        ValueError: no source has the split, or none has a sample left.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        *,
        split: str = "val",
        num_samples: int = 256,
        tokens_per_image: int,
        batch_size: int,
        max_tokens: int,
        max_images: int = 8,
        packing: bool = True,
        transform: ImageTransform | None = None,
        where: str = "",
    ):
        self.tokens_per_image, self.max_tokens, self.batch_size = tokens_per_image, max_tokens, batch_size
        self.where = where
        fits = {"tokens_per_image": tokens_per_image, "max_tokens": max_tokens, "max_images": max_images}
        fits |= {"transform": transform, "where": where}
        self.names = mixture.names  # as in the training plan, so that source numbers agree
        there = {name: s for name, s in mixture.sources.items() if s.has_split(split)}
        if not there:
            raise ValueError(
                f"no source of {', '.join(mixture.names)} has shards {split}-*.tar; set {where}val_samples=0"
            )
        self.sources, empty = [], []
        for name, source in there.items():
            try:
                self.sources.append(measure_source(source, tokenizer, name=name, split=split, **fits))
            except NothingLeft as error:
                empty.append(f"{name} takes no part in validation: {error}")
        if not self.sources:
            raise ValueError(f"nothing is left to validate with; {'; '.join(empty)}; or set {where}val_samples=0")
        for line in empty:
            log.warning(line)
        each = max(1, num_samples // len(self.sources))
        self.pairs = []
        for i, source in enumerate(self.sources):
            take = np.linspace(0, len(source.rows) - 1, min(each, len(source.rows))).round().astype(int)
            self.pairs += [(i, row) for row in source.rows[take].tolist()]
        packs = [[i] for i in range(len(self.pairs))]
        if packing:
            lengths = [int(self.sources[s].length[row]) for s, row in self.pairs]
            images = [int(self.sources[s].images[row]) for s, row in self.pairs]
            packs = pack_window(lengths, images, max_tokens=max_tokens, max_images=max_images)
        packs += [[]] * (-len(packs) % batch_size)
        self._packs = packs
        self.num_steps = len(packs) // batch_size

    def step(self, i: int) -> Step:
        """Return step i; some rows of the last step may be empty."""
        packs = self._packs[i * self.batch_size : (i + 1) * self.batch_size]
        rows = [[self.pairs[k] for k in pack] for pack in packs]
        pairs = [pair for row in rows for pair in row]
        answers = sum(int(self.sources[s].answer[row]) for s, row in pairs)
        return Step(rows, answers, sum(int(self.sources[s].images[row]) for s, row in pairs))
