"""What a stage's folder holds of its plan: order, shares, and the stage's identity."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from fastvlm.data.plan import Plan
from fastvlm.data.plan_report import report
from fastvlm.data.replan import read_description, write_order
from fastvlm.files import write_whole


def write_plan(plan: Plan, folder: Path, *, identity: dict) -> None:
    """Write a stage's order, identity and shares before it begins."""
    if not order_is_kept(folder, plan):
        write_order(plan, folder)
        write_whole(folder / "identity.json", json.dumps(identity, indent=1, default=str))
    shares = folder / "shares.json"
    with suppress(OSError, ValueError, KeyError):
        said = json.loads(shares.read_text())
        if (said["fingerprint"], said["num_steps"]) == (plan.fingerprint, plan.num_steps):
            return  # written by the run that this one continues
    write_whole(shares, json.dumps(report(plan), indent=1))


def order_is_kept(folder: Path, plan: Plan) -> bool:
    """Return whether the folder already holds the order of this plan."""
    before, after = read_description(folder), plan.after and plan.after.digest
    if before is None or not (folder / "order.npz").exists():
        return False
    return (before["base"], before["after"]) == (plan.base, after)
