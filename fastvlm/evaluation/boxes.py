"""Referring expressions (RefCOCO and similar): accuracy of predicted boxes at IoU 0.5 (Yu et al., arXiv:1608.00272).

Parsing and overlap follow lmms-eval@75571cfe `tasks/refcoco/utils_rec.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol, mean

NUMBER = r"(-?\d+(?:\.\d+)?)"
BOX = re.compile(r"\[\s*" + r",\s*".join([NUMBER] * 4) + r"\s*\]")
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def read_box(text: str) -> list[float]:
    """Return the first `[x1, y1, x2, y2]` in a text; four zeros if there is none."""
    found = BOX.search(text)
    return [float(number) for number in found.groups()] if found else [0.0] * 4


def overlap(a: Sequence[float | int], b: Sequence[float | int]) -> float:
    """Return the IoU of two boxes (x1, y1, x2, y2) in the same unit; 0 if neither has an area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


class Boxes(Protocol):
    """Box accuracy; `meta.box` is the true box in fractions of the image's width and height.

    Args:
        scale: the model's coordinate of the right and lower edge: 1, or 100 or 1000 for integer coordinates.
        threshold: minimum IoU of a correct answer; OCID-Ref uses 0.25.

    Raises:
        ValueError: `scale` is not positive.
    """

    metric = "accuracy_at_iou"

    def __init__(self, *, scale: float | int = 1, threshold: float = 0.5):
        if scale <= 0:
            raise ValueError(f"protocol.scale={scale} must be above 0")
        self.scale, self.threshold = scale, threshold

    def grade(self, row: dict) -> dict:
        box = read_box(row["prediction"])
        iou = overlap(row["meta"]["box"], [edge / self.scale for edge in box] if self.scale != 1 else box)
        return {"score": float(iou >= self.threshold), "parsed": box, "iou": iou}

    def summarise(self, rows: Sequence[dict]) -> dict[str, float]:
        ious = [row["iou"] for row in rows]
        centred = [_holds_centre(row["meta"]["box"], [e / self.scale for e in row["parsed"]]) for row in rows]
        figures = {f"accuracy_at_{threshold}": mean([iou >= threshold for iou in ious]) for threshold in THRESHOLDS}
        return figures | {"iou": mean(ious), "centre_accuracy": mean(centred)}

    def official(self, rows: Sequence[dict]) -> list[dict]:
        return [{"sent_id": row["question_id"], "box": row["parsed"], "iou": row["iou"]} for row in rows]


def _holds_centre(true: Sequence[float | int], box: Sequence[float | int]) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return true[0] <= x <= true[2] and true[1] <= y <= true[3]
