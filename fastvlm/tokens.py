"""Special tokens, chat templates, and the tokenizer that all other code shares."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

IMAGE_TOKEN = "<|image|>"
IGNORE_INDEX = -100
ROLES = ("system", "user", "assistant")
NAME_A_TEMPLATE = "name the template it was trained with, such as tokenizer.template=vicuna"


@dataclass(frozen=True)
class Template:
    """A chat template: the text before and after each role's content.

    The assistant's content and `end` are learned tokens; the rest of the template is not. `document_end` closes a
    document (captions, interleaved pages, plain text) and is learned, too. A space that ends the text before a content
    is encoded with the content, because tokens of words begin with a space.
    """

    name: str
    before: dict[str, str]
    after: dict[str, str]
    end: str
    document_end: str
    start: str = ""
    specials: tuple[str, ...] = ()
    image: tuple[str, str] = ("", "")  # text before and after the slots of an image
    space_before_image: bool = True  # whether a content that begins with an image has that space, too

    def jinja(self, image_token: str = IMAGE_TOKEN) -> str:
        """Return the template as Jinja, the format in which `transformers` stores it with a tokenizer."""
        before, text, first_text = self.before, "{{ m['content'] }}", ""
        if not self.space_before_image:
            text = "{{ ' ' + m['content'] if m['content'] }}"
            first_text = "{% if loop.first and p['text'] %}{{ ' ' }}{% endif %}"
            before = {role: words.removesuffix(" ") for role, words in before.items()}
        content = (
            f"{{% if m['content'] is string %}}{text}{{% else %}}{{% for p in m['content'] %}}"
            "{% if p['type'] == 'image' %}"
            + self.image[0]
            + image_token
            + self.image[1]
            + f"{{% else %}}{first_text}{{{{ p['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
        )
        # transformers drops a line break behind a block, but not one that a block writes.
        after = {
            role: words.replace("\n", "{{ '\\n' }}", 1) if words[:1] == "\n" else words
            for role, words in self.after.items()
        }
        turns = "".join(
            f"{{% {'if' if i == 0 else 'elif'} m['role'] == '{role}' %}}{before[role]}{content}"
            f"{self.end if role == 'assistant' else ''}{after[role]}"
            for i, role in enumerate(ROLES)
        )
        return (
            f"{self.start}{{% for m in messages %}}{turns}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{self.before['assistant'].removesuffix(' ')}{{% endif %}}"
        )


TEMPLATES = {
    # One token per role, to leave the embedded run's short rows to content.
    "roles": Template(
        name="roles",
        before={"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"},
        after={"system": "", "user": "", "assistant": ""},
        end="<|end|>",
        document_end="<|endoftext|>",
        specials=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # Qwen2 / Qwen2.5 / Qwen3 / SmolLM2, as in their tokenizer_config.json (without the default system turn).
    "chatml": Template(
        name="chatml",
        before={role: f"<|im_start|>{role}\n" for role in ROLES},
        after={role: "\n" if role == "assistant" else "<|im_end|>\n" for role in ROLES},
        end="<|im_end|>",
        document_end="<|endoftext|>",
        specials=("<|im_start|>", "<|im_end|>"),
    ),
    # Vicuna v1.1, as in LLaVA-1.5: https://github.com/haotian-liu/LLaVA, llava/conversation.py
    "vicuna": Template(
        name="vicuna",
        before={"system": "", "user": "USER: ", "assistant": "ASSISTANT: "},
        after={"system": " ", "user": " ", "assistant": ""},
        end="</s>",
        document_end="</s>",
        start="<s>",
        specials=("<s>", "</s>"),
    ),
    # SmolVLM, as in its chat template, with the tokens its processor writes around an image of one view
    "smolvlm": Template(
        name="smolvlm",
        before={role: f"{role.capitalize()}: " for role in ROLES},
        after=dict.fromkeys(ROLES, "<end_of_utterance>\n") | {"assistant": "\n"},
        end="<end_of_utterance>",
        document_end="<end_of_utterance>",
        start="<|im_start|>",
        specials=("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"),
        image=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
        space_before_image=False,
    ),
    # PaliGemma: image, <bos>, prompt, line end, answer: https://huggingface.co/blog/paligemma
    "paligemma": Template(
        name="paligemma",
        before=dict.fromkeys(ROLES, ""),
        after={"system": "\n", "user": "\n", "assistant": ""},
        end="<eos>",
        document_end="<eos>",
        specials=("<bos>", "<eos>"),
        image=("", "<bos>"),
    ),
}
# LLaVA-1.5 itself, whose images end in a line break: preprocess_multimodal in llava/train/train.py
TEMPLATES["llava"] = replace(TEMPLATES["vicuna"], name="llava", image=("", "\n"))
OWN = "own"
LONG = 50_000  # characters; for longer text `encode` would block other threads and compute unused offsets and words


def own_template(hf, image_token: str) -> Template:
    """Derive a `Template` from a tokenizer's chat template, by rendering conversations of known words.

    A default system turn is put before every conversation. If the template never ends an answer, the tokenizer's end
    token does.

    Raises:
        ValueError: there is no chat template, or it does not render turn by turn.
    """
    if not hf.chat_template:
        raise ValueError("holds no chat template; " + NAME_A_TEMPLATE)
    words = {"system": "wordsofthesystem", "user": "wordsoftheuser", "assistant": "wordsoftheassistant"}
    say = lambda role: {"role": role, "content": [{"type": "text", "text": words[role]}]}
    user, assistant = words["user"], words["assistant"]
    try:
        render = lambda *turns: hf.apply_chat_template(list(turns), tokenize=False)
        ask, tell = say("user"), say("assistant")
        asked, talk = render(ask), render(ask, tell, ask, tell)
        seen = render(ask | {"content": [{"type": "image"}, *ask["content"]]})
        head, mid, between, again, tail = re.split(f"{user}|{assistant}", talk)
        after_user = asked.split(user)[1]
        if again != mid or not mid.startswith(after_user) or not between.startswith(tail):
            raise ValueError("turns differ")
        before_user = between.removeprefix(tail)
        piece = seen.split(user)[0]
        lead = head if piece.startswith(head) else head.rstrip()
        before_image, after_image = piece.removeprefix(lead).split(image_token)
    except Exception as error:  # noqa: BLE001  a template may raise anything
        raise ValueError(f"holds a chat template that does not go turn by turn ({error}); " + NAME_A_TEMPLATE) from None
    start = head.removesuffix(before_user)
    try:
        before_system, rest = render(say("system"), ask).split(words["system"])
        system = (before_system.removeprefix(start), rest.split(user)[0].removesuffix(before_user))
    except Exception:  # noqa: BLE001  the template has no system turn
        system = ("", after_user)
    special = [token for token in hf.all_special_tokens if token in tail]
    end = min(special, key=tail.index) if special else hf.eos_token
    first = hf("a").input_ids[:1]
    if hf.bos_token and first == [hf.bos_token_id] and not start.startswith(hf.bos_token):
        start = hf.bos_token + start
    return Template(
        name=OWN,
        before={"system": system[0], "user": before_user, "assistant": mid.removeprefix(after_user)},
        after={"system": system[1], "user": after_user, "assistant": tail.split(end)[-1]},
        end=end,
        document_end=hf.eos_token or end,
        start=start,
        image=(before_image, after_image),
        space_before_image=piece.startswith(head),
    )


def own_image_token(path: str, hf) -> str:
    """Return the image token that a pretrained model's configuration names.

    Raises:
        ValueError: there is no such configuration, or it names none.
    """
    from transformers import AutoConfig

    file, config = Path(path) / "config.json", {}
    if file.exists():
        config = json.loads(file.read_text())
        if "mm_vision_tower" in config and "vision_config" not in config:
            return "<image>"  # original LLaVA checkpoints use this text, without an id of its own
    else:
        with suppress(OSError, ValueError):
            config = AutoConfig.from_pretrained(path).to_dict()
    number = config.get("image_token_id", config.get("image_token_index"))
    token = None if number is None else hf.convert_ids_to_tokens(number)
    if token is None:
        raise ValueError(f"tokenizer.path={path}: no configuration there names an image token; set image_token")
    return token


def check_characters(text: str) -> None:
    """Check that a text can be encoded as UTF-8.

    Raises:
        ValueError: it holds half of a surrogate pair, which JSON can express and UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"the text holds {code} at character {error.start}: half of a surrogate pair is not a character; "
            "leave it out"
        ) from None


class Tokenizer:
    """A `transformers` tokenizer and a chat template, with one fingerprint for both.

    Text never becomes a special token: a user who types `<|image|>` gets the characters, not an image slot. Special
    tokens come only from the template and from image parts.

    Args:
        path: folder or hub id that `AutoTokenizer.from_pretrained` loads.
        template: a key of `TEMPLATES`, or `own` for the tokenizer's own chat template.
        image_token: token that marks an image slot, or `own` for the one named in the configuration of the pretrained
            vision-language model at `path`.

    Raises:
        ValueError: the path holds no tokenizer, or the template or image token is unknown or cannot be derived.
    """

    def __init__(self, path: str, *, template: str, image_token: str = IMAGE_TOKEN):
        from transformers import AutoTokenizer

        if template not in (*TEMPLATES, OWN):
            raise ValueError(f"tokenizer.template={template} is not one of {', '.join((*TEMPLATES, OWN))}")
        self.path = str(path)
        logging.disable(logging.ERROR)  # the hub's client logs every retry
        try:
            self.hf = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokenizer.path={path}: no tokenizer there ({str(error).splitlines()[0][:120]}); "
                "make the embedded one with `python data/prepare.py source=embedded`, or name a local folder"
            ) from None
        finally:
            logging.disable(logging.NOTSET)
        if image_token == OWN:
            image_token = own_image_token(self.path, self.hf)
        self.image_token = image_token
        if template == OWN:
            try:
                self.template = own_template(self.hf, image_token)
            except ValueError as error:
                raise ValueError(f"tokenizer.path={path} {error}") from None
        else:
            self.template = TEMPLATES[template]
        wanted = dict.fromkeys((image_token, *self.template.specials, *self._ends()))
        missing = [t for t in wanted if t not in self.hf.get_vocab()]
        if missing:
            self.hf.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        if template != OWN:
            self.hf.chat_template = self.template.jinja(image_token)
        # The Rust tokenizer has the switch that makes special tokens in the text plain text.
        self._fast = self.hf.backend_tokenizer
        self._special = {t.content: i for i, t in self.hf.added_tokens_decoder.items() if t.special}
        self._special |= {t: self.hf.convert_tokens_to_ids(t) for t in (image_token, *self._ends())}
        self._pieces: dict[str, list[int]] = {}  # ids of the template's few pieces, which every turn needs
        self.image_id = self._special[image_token]
        self.end_id = self._special[self.template.end]
        self.document_end_id = self._special[self.template.document_end]
        self.pad_id = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.document_end_id
        # SentencePiece's tokenizers write a space before every text themselves.
        self.writes_space = "▁" in "".join(self._fast.encode("a", add_special_tokens=False).tokens[:1])

    def _ends(self) -> tuple[str, str]:
        return self.template.end, self.template.document_end

    def __len__(self) -> int:
        return len(self.hf)

    @property
    def fingerprint(self) -> str:
        """Hash of vocabulary, merges, special tokens and template: all that determines a text's ids."""
        state = [json.loads(self._fast.to_str()), self.hf.chat_template]
        before, after = self.template.before, self.template.after
        if any(piece.endswith(" ") for piece in (*before.values(), after["user"], after["assistant"])):
            state.append("spaces are encoded with what follows")
        if self.writes_space and after["system"].endswith(" "):
            state.append("a system prompt leaves its space to what follows")
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]

    def encode_text(self, text: str, *, space: str = "") -> list[int]:
        """Return the ids of plain text; spelled-out special tokens are encoded as text.

        Args:
            space: the template's space before the text, encoded with it; "" if there is none.

        Raises:
            ValueError: the text holds half of a surrogate pair.
        """
        if not self.writes_space:
            text = space + text
        if not text:
            return []
        self._fast.encode_special_tokens = True
        try:
            if len(text) < LONG:
                return self._fast.encode(text, add_special_tokens=False).ids
            return self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            check_characters(text)
            raise

    def encode_template(self, text: str, *, space: str = "") -> list[int]:
        """Return the ids of a piece of the template, in which special tokens are recognised; `space`: see above."""
        if not self.writes_space:
            text = space + text
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

    def decode_further(self, ids: list[int]) -> str:
        """Decode ids that continue other text, keeping leading and trailing spaces.

        SentencePiece-style decoders drop the space before the first word.
        """
        text = lambda ids: self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        word = self.encode_text("a")
        return text([*word, *ids]).removeprefix(text(word))

    def save(self, folder: str | Path) -> None:
        self.hf.save_pretrained(folder)
