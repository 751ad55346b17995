"""The traditional mode: CLIP's labels as words in the prompt of a language model that never saw an image."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CLIPS_SIDE, save_clip, save_llm

from fastvlm.data.conversation import encode_record
from fastvlm.models.pretrained import traditional
from fastvlm.tokens import Tokenizer

LABELS = ["a red square", "two blue circles", "three", "the image"]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request, tmp_path_factory):
    clip, llm = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("llm")
    reference, processor = save_clip(request.param, clip)
    save_llm(llm)
    tokenizer = Tokenizer(str(llm), template="chatml")
    model = traditional(clip=str(clip), llm=str(llm), labels=LABELS, tokenizer=tokenizer, num_labels=2, num_tokens=40)
    return reference, processor, tokenizer, model


def test_an_image_reads_as_the_words_of_its_most_likely_labels(pair):
    reference, processor, tokenizer, model = pair
    views = torch.randint(0, 256, (3, 3, CLIPS_SIDE, CLIPS_SIDE), dtype=torch.uint8)
    texts = processor(text=[f"a photo of {label}" for label in LABELS], padding="max_length", return_tensors="pt")
    texts = {key: value for key, value in texts.items() if key in ("input_ids", "attention_mask")}
    if reference.config.model_type == "siglip":
        texts = {"input_ids": texts["input_ids"]}
    with torch.no_grad():
        best = reference(pixel_values=model.normalise(views), **texts).logits_per_image.topk(2).indices
    user = lambda content: {"messages": [{"role": "user", "content": content}]}
    for view, (first, second) in zip(views, best.tolist()):
        said = f"an image of {LABELS[first]}, {LABELS[second]}"
        seen = user([{"type": "image"}, {"type": "text", "text": " what?"}])
        told = user([{"type": "text", "text": said}, {"type": "text", "text": " what?"}])
        slots = model.num_visual_tokens(CLIPS_SIDE)
        ids = torch.tensor([encode_record(seen, tokenizer, tokens_per_image=slots, prompt=True).input_ids])
        words = torch.tensor([encode_record(told, tokenizer, tokens_per_image=0, prompt=True).input_ids])
        assert len(tokenizer.encode_text(said)) <= slots
        assert (
            model.generate(ids, view[None], max_new_tokens=6).tolist()
            == model.generate(words, max_new_tokens=6).tolist()
        )


def test_a_clip_that_lacks_weights_is_refused_by_their_name(tmp_path, pair):
    save_clip("clip", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    gone = next(name for name in state if "fc1.weight" in name)
    save_file({name: value for name, value in state.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="vlm.clip=.*fc1.weight is missing"):
        traditional(clip=str(tmp_path), llm="unread", labels=LABELS, tokenizer=pair[2])


def test_what_is_missing_is_named(pair, tmp_path):
    tokenizer = pair[2]
    given = {"clip": "x", "llm": "y", "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="vlm.labels is empty"):
        traditional(labels=[], **given)
    with pytest.raises(ValueError, match="vlm.labels=nowhere.txt: No such file"):
        traditional(labels="nowhere.txt", **given)
    with pytest.raises(ValueError, match="vlm.said='words' has no"):
        traditional(labels=["a"], said="words", **given)
