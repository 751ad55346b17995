"""The named mixtures, as Hydra composes them: sources, per cent and unit."""

from __future__ import annotations

from fractions import Fraction

import pytest

from fastvlm.build import instantiate
from fastvlm.config import CONF, compose
from fastvlm.data.source import Mixture

COCO_LAION = {"coco": 10, "laion": 90}
MM1 = {"captions": 45, "interleaved": 45, "text": 10}
MINIMAL = {"llava_instruct": 50, "vqav2": 20, "textvqa": 12, "chartqa": 10, "smoltalk": 8}
FULL = {"llava_instruct": 45, "aokvqa": 5, "vqav2": 15, "okvqa": 5, "textvqa": 10, "stvqa": 2, "docvqa": 3}
FULL |= {"chartqa": 10, "smoltalk": 5}
PREMIUM = {"sharegpt4v": 30, "llava_instruct": 20, "vqav2": 20, "textvqa": 12, "chartqa": 10, "smoltalk": 8}
SWIFTKV = {"vqav2": 50, "chat": 50}
STYLES = {"short": 30, "detailed": 40, "reading": 15, "chat": 15}
# Mixture -> per cent, unit, and the data set behind a name where that is not its own.
NAMED = {
    "captions": (COCO_LAION, "samples", {"coco": "coco_captions"}),
    "mm1_45_45_10": (MM1, "tokens", {"captions": "laion", "interleaved": "obelics", "text": "fineweb_edu"}),
    "sft_minimal": (MINIMAL, "answer_tokens", {}),
    "sft_full": (FULL, "answer_tokens", {}),
    "sft_premium": (PREMIUM, "answer_tokens", {}),
    "swiftkv": (SWIFTKV, "tokens", {"chat": "lmsys_chat"}),
    "styles": (
        STYLES,
        "answer_tokens",
        {"short": "vqav2", "detailed": "llava_instruct", "reading": "textvqa", "chat": "smoltalk"},
    ),
}
FAMILY = {"llava_instruct": "long_form", "vqav2": "short_qa", "textvqa": "reading", "chartqa": "charts"}
FAMILY |= {"smoltalk": "text_qa", "lmsys_chat": "text_qa", "sharegpt4v": "captions", "laion": "captions"}
FAMILY |= {"coco_captions": "captions", "obelics": "interleaved", "fineweb_edu": "text"}
# Where several sources of a mixture are one family of the embedded data, one of them stands for all.
FAMILY |= {"aokvqa": "short_qa", "okvqa": "short_qa", "stvqa": "reading", "docvqa": "reading"}


def composed(name: str) -> Mixture:
    return instantiate(compose("inspect", [f"mixture={name}"]).mixture, key="mixture")


def shares_by_set(mixture: Mixture, *, family: bool = False) -> dict[str, Fraction]:
    """Share of every data set, or of every family that stands for it."""
    shares: dict[str, Fraction] = {}
    for source, share in zip(mixture.sources.values(), mixture.shares):
        name = FAMILY[source.name] if family else source.name
        shares[name] = shares.get(name, 0) + share
    return shares


@pytest.mark.parametrize("name", NAMED)
def test_a_named_mixture_has_its_per_cent_of_its_unit(name):
    weights, unit, sets = NAMED[name]
    mixture = composed(name)
    assert sum(weights.values()) == 100 and mixture.unit == unit and mixture.names == tuple(weights)
    expected = {sets.get(key, key): Fraction(weight, 100) for key, weight in weights.items()}
    assert shares_by_set(mixture) == expected


@pytest.mark.parametrize("name", NAMED)
def test_its_embedded_twin_has_the_same_per_cent_of_the_same_unit_and_styles(name):
    twin = composed("embedded_45_45_10" if name == "mm1_45_45_10" else f"embedded_{name}")
    mixture = composed(name)
    assert twin.unit == mixture.unit
    assert shares_by_set(twin) == shares_by_set(mixture, family=True)
    style = lambda mixture: {source.system for source in mixture.sources.values()}
    assert style(twin) == style(mixture) and (style(mixture) == {None}) == (name != "styles")


@pytest.mark.parametrize("path", sorted((CONF / "mixture").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_mixture_composes_and_all_its_sources_have_a_share(path):
    config = compose("inspect", [f"mixture={path.stem}"]).mixture
    mixture = instantiate(config, key="mixture")
    assert set(config.sources) == set(config.weights) == set(mixture.names) and sum(mixture.shares) == 1
