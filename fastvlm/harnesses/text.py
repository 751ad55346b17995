"""lm-eval's model interface for our language model, to measure what training on images costs on text tasks.

    python eval.py checkpoint=runs/latest task=mmlu        needs `pip install '.[eval]'`

Requests are answered like in lm-eval's own `HFLM`: the same tokens are scored, and contexts are truncated on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fastvlm.data.conversation import encode_record
from fastvlm.evaluation.likelihood import token_scores
from fastvlm.inference.engine import Engine
from fastvlm.models.vlm import VLM
from fastvlm.tokens import IGNORE_INDEX, Tokenizer

MAX_NEW_TOKENS = 256  # if the task sets no limit, as in HFLM


class TextModel(LM):
    """Answers lm-eval's three kinds of requests, without images.

    Args:
        batch_size: rows scored or answered at once.
    """

    def __init__(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        device: str | torch.device = "cpu",
        batch_size: int = 16,
    ):
        super().__init__()
        self.engine = Engine(model, tokenizer, image_size=image_size, device=device)
        self.words, self.batch_size = tokenizer, batch_size
        self.max_length = self.engine.model.llm.max_positions
        self.chats: dict[str, list[dict]] = {}  # by the text they were rendered to

    @property
    def tokenizer_name(self) -> str:
        return self.words.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as text, and remember it, so that text that spells a special token stays text."""
        template = self.words.template
        turns = [template.before[m["role"]] + m["content"] + template.after[m["role"]] for m in chat_history]
        text = template.start + "".join(turns) + (template.before["assistant"] if add_generation_prompt else "")
        self.chats[text] = [{"role": m["role"], "content": m["content"]} for m in chat_history]
        return text

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy decoding produces it) of every continuation after its context."""
        pairs = [self.encode_pair(*request.args) for request in requests]
        rows = [self._row(context, continuation) for context, continuation in pairs]
        scores = self._score(rows)
        return [(-float(nll.sum()), bool(best.all())) for nll, best in scores]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Return the log-probability of every whole text, in windows with minimal overlap."""
        totals = []
        for (text,) in (request.args for request in requests):
            ids = self.words.encode_text(text)
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=ids, prefix_token=self._prefix()[-1], max_seq_len=self.max_length, context_len=1
                ),
            )
            scores = self._score([self._row(list(context), list(target)) for context, target in windows])
            totals.append(-sum(float(nll.sum()) for nll, _ in scores))
        return totals

    def generate_until(self, requests) -> list[str]:
        """Return the greedy continuation of every context, up to one of the task's stop strings, not stripped."""
        answers = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise ValueError("this model answers greedily; set do_sample: false in the task's generation_kwargs")
            until = options.get("until") or []
            until = (until,) if isinstance(until, str) else tuple(until)
            groups.setdefault((until, options.get("max_gen_toks", MAX_NEW_TOKENS)), []).append(i)
        for (until, limit), members in groups.items():
            # Reserve at least half of the model's length for the context.
            limit = min(limit, self.max_length // 2)
            prompts = {i: self._prompt(requests[i].args[0], self.max_length - limit) for i in members}
            ordered = sorted(members, key=lambda i: (len(prompts[i]), i))
            for start in range(0, len(ordered), self.batch_size):
                batch = ordered[start : start + self.batch_size]
                said = self.engine.generate(
                    [{"input_ids": prompts[i]} for i in batch], [[] for _ in batch], max_new_tokens=limit, stop=until
                )
                for i, generation in zip(batch, said):
                    answers[i] = generation.raw_text
        return answers

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize both together and split where the context ends; its trailing spaces go to the continuation."""
        if context in self.chats:
            space = " " if self.words.template.before["assistant"].endswith(" ") else ""
            told = self.words.encode_text(continuation.removeprefix(space), space=space)
            return self._ids({"messages": self.chats[context]}), told
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return self._prefix(), self.words.encode_text(continuation)
        document = lambda text: self._ids({"document": [{"type": "text", "text": text}]})
        before, whole = document(stripped), document(stripped + continuation)
        # If the two merge into one token at the split, the continuation is tokenized by itself.
        return before, whole[len(before) :] or self.words.encode_text(continuation)

    def _prefix(self) -> list[int]:
        return self.words.encode_template(self.words.template.start) or [self.words.document_end_id]

    def _ids(self, record: dict) -> list[int]:
        return encode_record(record, self.words, tokens_per_image=0, prompt=True).input_ids

    def _prompt(self, context: str, most: int) -> list[int]:
        """Return the tokens of a context; if there are more than `most`, the template's start and the last ones.

        Tokens are cut, not text: text cut inside a character can turn into more tokens.
        """
        chat = self.chats.get(context)
        ids = self._ids({"document": [{"type": "text", "text": context}]} if chat is None else {"messages": chat})
        if len(ids) <= most:
            return ids
        start = self.words.encode_template(self.words.template.start)
        return start + ids[len(ids) - most + len(start) :]

    def _row(self, context: Sequence[int], target: Sequence[int]) -> tuple[list[int], list[int]]:
        ids = [*context, *target][-(self.max_length + 1) :]
        learned = min(len(target), len(ids) - 1)  # the first token has no context
        return ids, [IGNORE_INDEX] * (len(ids) - learned) + ids[len(ids) - learned :]

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]):
        return token_scores(self.engine.model, self.words, rows, [[]] * len(rows), batch_size=self.batch_size)
