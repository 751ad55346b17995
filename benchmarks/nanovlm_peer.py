"""nanoVLM's training loop on given data and sizes, timed from outside; started as a process by `nanovlm.py`.

Runs its `train.train` as it is, except that `wandb` is replaced by an empty module; `apply_chat_template` returns a
list by default (since transformers 5 it returns a mapping, whose length nanoVLM's loss mask takes for a number of
tokens); a causal flag given with an attention mask is merged into the mask (torch refuses both); and the number of
loader processes, three in its code, can be set.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
)


def return_lists(processors) -> None:
    original = processors.get_tokenizer

    @functools.wraps(original)
    def get_tokenizer(*arguments, **options):
        tokenizer = original(*arguments, **options)
        method = type(tokenizer).apply_chat_template
        tokenizer.apply_chat_template = lambda *a, **k: method(tokenizer, *a, **({"return_dict": False} | k))
        return tokenizer

    processors.get_tokenizer = get_tokenizer


def take_mask_and_causal_flag(torch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention

    def attend_with_both(q, k, v, attn_mask=None, is_causal=False, **options):
        if attn_mask is not None and is_causal:
            causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            attn_mask = attn_mask.to(q.dtype).masked_fill(~causal, torch.finfo(q.dtype).min)
            is_causal = False
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    torch.nn.functional.scaled_dot_product_attention = attend_with_both


def run(peer: Path, work: Path, *, sizes: dict, steps: int, workers: int | None, step: Callable, end: Callable) -> dict:
    """Train for `steps` steps; return the number of parameters and the precision.

    Args:
        peer: the checkout.
        work: holds `tokenizer`, `vocabulary.json` and the data set `shard_0`.
        sizes: vision, language, shuffle, rows, tokens, images; see `nanovlm.py`.
        workers: number of loader processes; None for nanoVLM's default.
        step: called before each step with the batch's number of real tokens.
        end: called after the last step.
    """
    sys.path.insert(0, str(peer))
    os.chdir(work)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules["wandb"] = types.ModuleType("wandb")
    import torch

    from data import processors

    return_lists(processors)
    take_mask_and_causal_flag(torch)
    from models import config

    import train

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    batches, loader, model, counts = train.synchronized_dataloader_step, train.DataLoader, train.VisionLanguageModel, []

    def marked(*arguments):
        try:
            for batch in batches(*arguments):
                step(int(batch["attention_mask"].sum()))
                yield batch
        finally:
            end()

    def counted(*arguments, **options):
        made = model(*arguments, **options)
        counts.append(sum(p.numel() for p in made.parameters()))
        return made

    train.synchronized_dataloader_step, train.VisionLanguageModel = marked, counted
    if workers is not None:
        train.DataLoader = lambda *a, **k: loader(*a, **(k | {"num_workers": workers}))
    vision, language = sizes["vision"], sizes["language"]
    vocabulary = json.loads((work / "vocabulary.json").read_text())
    vlm = config.VLMConfig(
        vit_hidden_dim=vision["dim"],
        vit_inter_dim=4 * vision["dim"],
        vit_patch_size=vision["patch"],
        vit_img_size=vision["image"],
        vit_n_heads=vision["heads"],
        vit_n_blocks=vision["depth"],
        lm_hidden_dim=language["dim"],
        lm_inter_dim=language["inner"],
        lm_n_heads=language["heads"],
        lm_n_kv_heads=language["kv_heads"],
        lm_n_blocks=language["layers"],
        lm_base_vocab_size=vocabulary,
        extra_token_amount=0,
        lm_vocab_size=vocabulary,
        lm_max_length=sizes["tokens"],
        lm_max_position_embeddings=1024,
        lm_tokenizer=str(work / "tokenizer"),
        lm_chat_template=TEMPLATE,
        mp_pixel_shuffle_factor=sizes["shuffle"],
        mp_image_token_length=(vision["image"] // vision["patch"] // sizes["shuffle"]) ** 2,
        max_img_size=vision["image"],
        # nanoVLM writes a token before every view, even if there is only one; ours does not.
        vlm_extra_tokens={"image_token": "<|image|>", "r1c1": "<|system|>"},
        vlm_load_backbone_weights=False,
    )
    training = config.TrainConfig(
        lr_mp=5e-3,
        val_size=64,
        batch_size=sizes["rows"],
        gradient_accumulation_steps=1,
        eval_in_epochs=False,
        max_training_steps=steps,
        max_images_per_knapsack=sizes["images"],
        max_sample_length=sizes["tokens"],
        train_dataset_path=str(work),
        train_dataset_name=("shards",),
        stream_dataset=False,
        log_wandb=False,
        use_lmms_eval=False,
    )
    train.train(training, vlm)
    return {"parameters": counts[0], "precision": "bf16-mixed"}
