"""Prompts of benchmark questions: instruction, options, OCR text, and examples before the question."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

# Lines that may follow a question in the shards; each states the form of the answer.
INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Answer the question with a single word.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
)
OCR = "Reference OCR token:"
FORMS = ("chat", "document")
LETTER = re.compile("[A-Z]")  # an option's letter


@dataclass
class Prompt:
    """Converts a record of a shard into the prompt, also a record.

    Args:
        instruction: the line after the question; None keeps the shard's, "" removes it.
        options: list `meta.choices` with letters after the question; False removes such a list, None keeps the shard's.
        ocr: add `meta.ocr_tokens` after the question, as LLaVA does; False removes such a line.
        request: the question asked about a document (an image with its caption); None shows only the image.
        form: chat, turns of a conversation; or document, text to be continued, for models without instruction tuning.
        template: with form=document, the text of one question, with `{question}` and `{answer}`; images before the
            question's text precede it, others stay within the text.

    Raises:
        ValueError: an unknown form, or a template without `{answer}` or with a placeholder twice.
    """

    instruction: str | None = None
    options: bool | None = None
    ocr: bool = False
    request: str | None = None
    form: str = "chat"
    template: str = "Question: {question} Short answer: {answer}\n"

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"task.form={self.form} is not one of {', '.join(FORMS)}")
        if self.template.count("{question}") > 1 or self.template.count("{answer}") != 1:
            raise ValueError(f"task.template={self.template!r} needs {{answer}} once and {{question}} at most once")

    def ask(self, record: dict, examples: Sequence[dict] = ()) -> dict:
        """Return a record with the examples and the question, which ends where the answer begins.

        Raises:
            ValueError: `ocr` is set and a record has no OCR text, or `options` is set and an example's answer is not a
                letter.
        """
        for example in examples if self.options else ():
            if not LETTER.fullmatch(said := answer_of(example)):
                raise ValueError(
                    f"task.options=true, but example {example.get('id')} of the train shards is answered with "
                    f"{said[:80]!r}, not with an option's letter: prepare them with form=choice"
                )
        asked = [*(self.question(example) for example in examples), self.question(record)]
        answers = [*(answer_of(example) for example in examples), None]
        if self.form == "document":
            parts = [part for content, answer in zip(asked, answers) for part in self._continue(content, answer)]
            return {"document": parts}
        system = [m for m in record.get("messages", ()) if m["role"] == "system"]
        messages = list(system)
        for content, answer in zip(asked, answers):
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return {"messages": messages}

    def answer(self, asked: dict, answer: str) -> dict:
        """Return a record made by `ask` with its answer appended, in the format of the examples."""
        if self.form == "document":
            before, after = self.template.split("{answer}")
            said = before[len(before.rstrip(" ")) :] + answer + after
            return {"document": [*asked["document"], {"type": "text", "text": said}]}
        return {"messages": [*asked["messages"], {"role": "assistant", "content": answer}]}

    def question(self, record: dict) -> list[dict]:
        """Return the parts of a record's question, formatted by this prompt."""
        if "document" in record:
            images = [part for part in record["document"] if part["type"] == "image"]
            return [*images, *([{"type": "text", "text": self.request}] if self.request else [])]
        content = copy.deepcopy(first_question(record))
        meta = record.get("meta") or {}
        text, listed, recognised, instruction = split_question(last_text(content), meta)
        if (tokens := meta.get("ocr_tokens")) is not None:
            recognised = f"{OCR} {', '.join(map(str, tokens))}"
        if self.ocr and not recognised:
            raise ValueError(
                f"task.ocr=true, but the shards hold no recognised text for {record.get('id')}; prepare them with its "
                "file, those of examples with ocr=true"
            )
        set_last_text(content, self._dress(text, listed, recognised, instruction, meta))
        return content

    def _dress(self, text: str, listed: str, recognised: str, instruction: str, meta: dict) -> str:
        lines = [text, listed if self.options is None else ""]
        if self.options and meta.get("choices"):
            lines += list_choices(meta["choices"])
        if self.ocr:
            lines.append(recognised)
        lines.append(instruction if self.instruction is None else self.instruction)
        if self.form == "document":
            lines.pop()  # in a document the template states the form
        return "\n".join(line for line in lines if line)

    def _continue(self, content: list[dict], answer: str | None) -> list[dict]:
        before, after = self.template.split("{answer}")
        start, asks, end = before.partition("{question}")
        if not asks:
            content, start, end = [part for part in content if part["type"] == "image"], "", before
        # A space before the answer belongs to the answer, because tokens of words begin with a space.
        end = end.rstrip(" ") if answer is None else end + answer + after
        first = len(list(takewhile(lambda part: part["type"] == "image", content)))
        return [*content[:first], *join_texts([*say(start), *content[first:], *say(end)])]


def say(text: str) -> list[dict]:
    """Return a text as a list of parts, empty for an empty text."""
    return [{"type": "text", "text": text}] if text else []


def join_texts(parts: Sequence[dict]) -> list[dict]:
    """Merge adjacent text parts, because a token may span the place where they meet."""
    made: list[dict] = []
    for part in parts:
        if made and made[-1]["type"] == part["type"] == "text":
            made[-1] = {"type": "text", "text": made[-1]["text"] + part["text"]}
        else:
            made.append(part)
    return made


def first_question(record: dict) -> list[dict]:
    """Return the content of a record's first user turn, as parts."""
    content = next(m["content"] for m in record["messages"] if m["role"] == "user")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def answer_of(record: dict) -> str:
    """Return a record's first answer: the first assistant turn, or a document's text."""
    if "document" in record:
        return "".join(part["text"] for part in record["document"] if part["type"] == "text").strip()
    content = next(m["content"] for m in record["messages"] if m["role"] == "assistant")
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def last_text(content: Sequence[dict]) -> str:
    return next((part["text"] for part in reversed(content) if part["type"] == "text"), "")


def set_last_text(content: list[dict], text: str) -> None:
    for part in reversed(content):
        if part["type"] == "text":
            part["text"] = text
            return
    content.append({"type": "text", "text": text})


def list_choices(choices: Sequence[str]) -> list[str]:
    """Return lines such as `A. wood`, `B. metal`."""
    return [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices)]


def split_question(text: str, meta: dict) -> tuple[str, str, str, str]:
    """Split a question's text into bare question, listed options, OCR line and instruction; "" for what is absent."""
    lines, instruction, recognised = text.split("\n"), [], ""
    while len(lines) > 1 and lines[-1] in INSTRUCTIONS:
        instruction.insert(0, lines.pop())
    if len(lines) > 1 and lines[-1].startswith(OCR):
        recognised = lines.pop()
    text, listed = "\n".join(lines), "\n".join(list_choices(meta.get("choices") or ()))
    if not listed or not text.endswith(f"\n{listed}"):
        listed = ""
    return text.removesuffix(f"\n{listed}") if listed else text, listed, recognised, "\n".join(instruction)
