"""What is written about the recipes: the page, the sources and the commands in them."""

from __future__ import annotations

import re
import shlex

import pytest
from instruct_layouts import ROOT

from data.prepare import list_recipes, load_recipe, parse_arguments

PAGE = (ROOT / "data/README.md").read_text()
HUB_OWNER = re.compile(r"(lmms-lab|HuggingFace\w*|liuhaotian|Lin-Chen|MMMU|AI4Math|yerevann|vikhyatk|anon\d+)/")
SOURCES = sorted(f for f in (ROOT / "conf/source").glob("*.yaml") if not f.stem.startswith("embedded"))


def test_every_recipe_has_a_row_in_the_table_and_a_source():
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    recipes = set(list_recipes()) - {"embedded"}
    assert recipes <= listed and recipes == {file.stem for file in SOURCES}


def commands() -> list[str]:
    """Every command of prepare.py on the page and in the sources, those on the hub completed."""
    found = re.findall(r"^(?:# )?python data/prepare.py (source=.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
    for file in SOURCES:
        text = file.read_text()
        found += re.findall(r"^# python data/prepare.py (source=.*)$", text, re.MULTILINE)
        for words in re.findall(r"^# On the hub.*?: (path=.*)$", text, re.MULTILINE):
            found.append(f"source={file.stem} {words.split(' (')[0]}")
    return found


@pytest.mark.parametrize("command", commands())
def test_a_written_command_has_keys_and_splits_that_its_recipe_takes(command):
    given = dict(word.split("=", 1) for word in shlex.split(command))
    recipe = load_recipe(given.pop("source"))
    given.pop("out", None)
    settings = parse_arguments(recipe, given)
    assert set(settings.get("splits", ())) <= set(getattr(recipe, "SPLITS", ()))
    path = str(settings.get("path", ""))
    if "val" in settings:
        assert "val" not in recipe.SPLITS
    if HUB_OWNER.match(path):
        assert getattr(recipe, "HUB", False) or getattr(recipe, "HUB_FILES", ())


def test_every_source_says_how_it_is_made():
    assert not [file.stem for file in SOURCES if f"data/prepare.py source={file.stem} " not in file.read_text()]


# What a licence is called, or who sets its terms where it has no name.
LICENCES = r"CC BY|Apache-2.0|MIT|GPL|ODC-By|BSD|PSF|[Ll]icence|terms|for research"
COUNTED = "questions|images|conversations|captions|documents|samples|sentences|problems|pages|URLs"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_every_source_says_where_it_is_under_what_licence_and_how_much_it_holds(file):
    said = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert re.search(LICENCES, said)
    if file.stem not in ("csv", "messages"):  # of your own making
        assert re.search(r"https://\w+(\.\w+)+", said)
        counted = rf"\b([\d.]+ million|\d[\d,]*\d\d)( [^\s.]+){{0,4}} ({COUNTED})\b"
        assert re.search(counted, re.sub(r"[\n#]+ ?", " ", said)), "a count with what is counted"
