"""A plugin for lmms-eval through its entry point `lmms_eval.models`, for an environment where both are installed:

    lmms-eval --model fastvlm --model_args run=runs/latest --tasks vqav2_val --batch_size 16

`benchmarks/requirements-lmms-eval.txt` lists the packages of that environment. VLMEvalKit has no plugins; it can use a
model through the OpenAI-compatible server.
"""

from __future__ import annotations

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from fastvlm.build import build_transform, load_run
from fastvlm.harnesses.images import to_bytes
from fastvlm.inference.engine import Engine


class FastVLM(lmms):
    """A finished run as a chat model of lmms-eval.

    Args:
        run: run directory.
        batch_size: requests answered at once.
        device: cpu, cuda or cuda:<n>; None takes a GPU if there is one.
        max_new_tokens: limit on the length of an answer if the task has none.
        cache_mb: MiB of visual tokens kept for further questions about an image, and as many again of its views; 0
            reads and encodes an image for every question.

    Raises:
        ValueError: an unknown argument.
    """

    is_simple = False

    def __init__(
        self,
        run: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int | str = 128,
        cache_mb: int | str = 512,
        **others,
    ):
        super().__init__()
        if others:
            known = "run, batch_size, device, max_new_tokens, cache_mb"
            raise ValueError(f"model_args: {next(iter(others))} is not one of {known}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer, config = load_run(run, device=device)
        size, transform = config.image_size, build_transform(config)
        self.engine = Engine(
            model,
            tokenizer,
            image_size=size,
            transform=transform,
            device=device,
            image_store_bytes=int(cache_mb) << 20,
        )
        self.batch_size, self.device = int(batch_size), torch.device(device)
        self.max_new_tokens = int(max_new_tokens)

    def generate_until(self, requests) -> list[GenerationResult]:
        """Answer requests in order, batching consecutive ones that have the same options."""
        results: list[GenerationResult] = []
        groups: list[list] = []
        for request in requests:
            same = groups and len(groups[-1]) < self.batch_size and groups[-1][0].args[2] == request.args[2]
            groups[-1].append(request) if same else groups.append([request])
        for group in tqdm(groups, desc="fastvlm", disable=self.rank != 0):
            records, images = zip(*(self._read(request) for request in group))
            options = group[0].args[2]
            if int(options.get("num_beams") or 1) > 1:
                beams = f"num_beams={options['num_beams']}"
                raise ValueError(f"task {group[0].args[4]} asks for {beams}, but this model decodes without beams")
            until = options.get("until") or []
            sampled = bool(options.get("do_sample"))
            generations = self.engine.generate(
                records,
                images,
                max_new_tokens=int(options.get("max_new_tokens") or self.max_new_tokens),
                temperature=float(options.get("temperature") or 0) if sampled else 0.0,
                top_k=int(options.get("top_k") or 0) if sampled else 0,
                top_p=float(options.get("top_p") or 1) if sampled else 1.0,
                stop=[until] if isinstance(until, str) else until,
            )
            for generation in generations:
                counts = TokenCounts(output_tokens=len(generation.token_ids))
                results.append(GenerationResult(text=generation.text, token_counts=counts))
        return results

    def loglikelihood(self, requests):
        raise NotImplementedError("answers are generated; likelihoods of text are lm-eval's (task=mmlu)")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds are not answered")

    def _read(self, request) -> tuple[dict, list]:
        """Return the conversation of a request and the views of its images."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).model_dump()["messages"]
        files, turns = [], []
        for message in messages:
            content = []
            for part in message["content"]:
                if part["type"] == "text":
                    content.append({"type": "text", "text": part["text"]})
                elif part["type"] == "image":
                    content.append({"type": "image"})
                    files.append(to_bytes(part["url"]))
                else:
                    raise ValueError(
                        f"task {task} shows a part of type {part['type']}; this model reads text and images"
                    )
            turns.append({"role": message["role"], "content": content})
        return {"messages": turns}, self.engine.read_images(files)
