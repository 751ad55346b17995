"""Penn Treebank tokenization of captions, in lower case and without punctuation, as in COCO's scorer.

The original is Stanford's Java program (CoreNLP 3.4.1, `PTBTokenizer -preserveLines -lowerCase`), called and filtered
by `pycocoevalcap/tokenizer/ptbtokenizer.py`. `tokenise` reimplements its rules as far as captions need them:
contractions, hyphens, numbers, abbreviations, brackets. `tests/evaluation/test_official_metrics.py` checks that at most
2 captions in 1,000 differ. The two differ on emoticons, rare abbreviations, and text that does not occur in captions
(markup, telephone numbers). `tokenise_java` runs the original.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

DROPPED_TOKENS = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
DROPPED = set(DROPPED_TOKENS.split())
SHORT_FORMS = (
    "mr mrs ms dr drs st prof rev gen sen rep gov lt col capt sgt maj hon pres messrs jr sr esq co corp inc ltd "
    "bros vs etc al ave blvd rd ft mt cf ed eds est fig figs approx dept univ jan feb mar apr jun jul aug sep sept "
    "oct nov dec mon tue tues wed thu thur thurs fri sat sun"
)
ABBREVIATIONS = SHORT_FORMS.split()
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SIGNS = {"£": "#", "€": "$", "…": "...", "–": "--", "—": "--", "¢": "cents"}
LETTER = r"[^\W\d_]"
TOKEN = re.compile(
    rf"""
      (?P<address>https?://\S+[^\s.,;:!?)'"] | www\.\S+[^\s.,;:!?)'"] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | [\#@]{LETTER}\w*)
    | (?P<number>[-+]?(?:\d+(?:[.,:/]\d+)+|\d+|\.\d+)(?![\w]|[-/]\w))
    | (?P<short>\b(?:{"|".join(ABBREVIATIONS)})\.(?!\w) | (?:{LETTER}\.)+{LETTER}\.(?!\w) | \b{LETTER}\.(?!\w)
        | ph\.d\. | no\.(?=\s*\d) )
    | (?P<decade>'\d0s\b)
    | (?P<clitic>'(?:s|m|d|ll|re|ve)\b)
    | (?P<and>'n'(?!\w))
    | (?P<word>(?-i:[A-Z]+&[A-Z]+)(?!\w) | \w+(?:[-_/.]\w+|'(?!(?:s|m|d|ll|re|ve|t)\b)(?!n')\w+)*)
    | (?P<marks>[!?]+|\.{{2,}}|--+|\*+|[^\w\s])
    """,
    re.VERBOSE | re.IGNORECASE,
)
SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
SPLIT |= {"gimme": "gim me"}


def tokenise(caption: str) -> str:
    """Return the tokens of a caption, separated by single spaces."""
    text = caption.replace("\n", " ").replace("\u2019", "'").replace("\u2018", "'")
    text = re.sub(r"(?i)n't\b", " n't", text)  # split from its verb: do n't, ca n't
    out: list[str] = []
    at = 0
    while at < len(text):
        if text.startswith(" n't", at):
            out.append("n't")
            at += 4
            continue
        found = TOKEN.match(text, at)
        if found is None:
            at += 1
            continue
        token, at = found[0].lower(), found.end()
        if token in BRACKETS:
            out.append(BRACKETS[token])
        elif token in ('"', "\u201c", "\u201d") or ord(token[0]) > 0xFFFF:  # emoji are dropped too
            continue
        elif found.lastgroup == "marks":
            token = SIGNS.get(token, token)
            if token not in DROPPED and not re.fullmatch(r"\.{2,}|-{2,}|_+", token):
                out.append(token)
        else:
            out.append(SPLIT.get(token, token))
    return " ".join(out)


def find_jar() -> Path | None:
    """Return the tokenizer's jar of an installed pycocoevalcap, or None."""
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = spec.submodule_search_locations if spec is not None else []
    return next((jar for folder in folders for jar in Path(folder).glob("tokenizer/stanford-corenlp-*.jar")), None)


def has_java() -> bool:
    """Return whether `tokenise_java` can run here."""
    return shutil.which("java") is not None and find_jar() is not None


def tokenise_java(captions: Sequence[str]) -> list[str]:
    """Tokenize captions like `tokenise`, with the original program.

    Raises:
        ValueError: Java or the jar is missing, or the program fails.
    """
    jar = find_jar()
    if jar is None or shutil.which("java") is None:
        missing = "java is not on the PATH" if jar else "pycocoevalcap is not there (pip install pycocoevalcap)"
        raise ValueError(f"protocol.tokenizer=java: {missing}; or take protocol.tokenizer=python")
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join(caption.replace("\n", " ") for caption in captions)
    done = subprocess.run(command, input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if done.returncode:
        failed = f"the program ended with status {done.returncode}"
        raise ValueError(f"protocol.tokenizer=java: {failed}; or take protocol.tokenizer=python")
    lines = done.stdout.decode().split("\n")
    return [" ".join(w for w in line.rstrip().split(" ") if w not in DROPPED) for line in lines[: len(captions)]]
