"""Special tokens, chat templates, and the tokenizer every other part shares."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

IMAGE_TOKEN = "<|image|>"
IGNORE_INDEX = -100
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Template:
    """How turns become text: what stands before and after each role's words.

    The assistant's words and `end` are learned; every other piece of a template is not. `document_end` closes a
    document (captions, interleaved pages, plain text) and is learned too.
    """

    name: str
    before: dict[str, str]
    after: dict[str, str]
    end: str
    document_end: str
    start: str = ""
    specials: tuple[str, ...] = ()

    def jinja(self) -> str:
        """The same template in the form `transformers` stores beside a tokenizer."""
        content = (
            "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
            "{% if p['type'] == 'image' %}"
            + IMAGE_TOKEN
            + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
        )
        turns = "".join(
            f"{{% {'if' if i == 0 else 'elif'} m['role'] == '{role}' %}}{self.before[role]}{content}"
            f"{self.end if role == 'assistant' else ''}{self.after[role]}"
            for i, role in enumerate(ROLES)
        )
        return (
            f"{self.start}{{% for m in messages %}}{turns}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{self.before['assistant']}{{% endif %}}"
        )


TEMPLATES = {
    # One token a role: the embedded run spends its few tokens on words.
    "roles": Template(
        name="roles",
        before={"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"},
        after={"system": "", "user": "", "assistant": ""},
        end="<|end|>",
        document_end="<|endoftext|>",
        specials=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # Qwen2 / Qwen2.5 / Qwen3 / SmolLM2, as their own tokenizer_config.json has it (without the default system turn).
    "chatml": Template(
        name="chatml",
        before={role: f"<|im_start|>{role}\n" for role in ROLES},
        after={role: "\n" if role == "assistant" else "<|im_end|>\n" for role in ROLES},
        end="<|im_end|>",
        document_end="<|endoftext|>",
        specials=("<|im_start|>", "<|im_end|>"),
    ),
    # LLaVA-1.5 (Vicuna v1.1): https://github.com/haotian-liu/LLaVA, llava/conversation.py
    "vicuna": Template(
        name="vicuna",
        before={"system": "", "user": "USER: ", "assistant": "ASSISTANT: "},
        after={"system": " ", "user": " ", "assistant": ""},
        end="</s>",
        document_end="</s>",
        start="<s>",
        specials=("<s>", "</s>"),
    ),
}


class Tokenizer:
    """A `transformers` tokenizer and a chat template, as one thing with one fingerprint.

    Text never becomes a special token: a user who types `<|image|>` gets the characters, not an image slot. Special
    tokens enter only through the template and through image parts.

    Args:
        path: folder or hub id that `AutoTokenizer.from_pretrained` loads.
        template: a key of `TEMPLATES`.

    Raises:
        ValueError: the path holds no tokenizer, or the template is not known.
    """

    def __init__(self, path: str, *, template: str):
        from transformers import AutoTokenizer

        if template not in TEMPLATES:
            raise ValueError(f"tokenizer.template={template} is not one of {', '.join(TEMPLATES)}")
        self.path, self.template = str(path), TEMPLATES[template]
        try:
            self.hf = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokenizer.path={path}: no tokenizer there ({str(error).splitlines()[0][:120]}); "
                "make the embedded one with `python data/prepare.py source=embedded`, or name a local folder"
            ) from None
        missing = [t for t in (IMAGE_TOKEN, *self.template.specials) if t not in self.hf.get_vocab()]
        if missing:
            self.hf.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        self.hf.chat_template = self.template.jinja()
        # The Rust tokenizer's own switch for "special tokens in the text are text".
        self._fast = self.hf.backend_tokenizer
        self._special = {t.content: i for i, t in self.hf.added_tokens_decoder.items() if t.special}
        self._pieces: dict[str, list[int]] = {}  # of the template: a handful, and every turn has them
        self.image_id = self._special[IMAGE_TOKEN]
        self.end_id = self._special[self.template.end]
        self.document_end_id = self._special[self.template.document_end]
        self.pad_id = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.document_end_id

    def __len__(self) -> int:
        return len(self.hf)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could become other ids: vocabulary, merges, specials or template."""
        state = json.dumps([json.loads(self._fast.to_str()), self.hf.chat_template], sort_keys=True)
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; spelled-out special tokens stay text."""
        if not text:
            return []
        self._fast.encode_special_tokens = True
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of a piece of the template, in which special tokens are special."""
        if not text:
            return []
        if text in self._special:
            return [self._special[text]]
        if text not in self._pieces:
            self._fast.encode_special_tokens = False
            self._pieces[text] = self._fast.encode(text, add_special_tokens=False).ids
        return list(self._pieces[text])

    def decode(self, ids: list[int]) -> str:
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def save(self, folder: str | Path) -> None:
        self.hf.save_pretrained(folder)
