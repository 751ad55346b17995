"""A model saved by us is the same model when `transformers` loads it, in our class or in a stock one."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from part_options import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_checkpoint, tiny_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor

import fastvlm.auto  # noqa: F401
from fastvlm.build import load_run
from fastvlm.data.conversation import encode_record
from fastvlm.data.transforms import ImageTransform
from fastvlm.deployment.card import learning
from fastvlm.deployment.engines import check_folder
from fastvlm.deployment.hub import main, parse, save_ours, save_processor, save_run
from fastvlm.deployment.processing import as_file
from fastvlm.deployment.stock import NoStockClass, export_stock
from fastvlm.models.encoders.open_clip_encoder import OpenClipEncoder
from fastvlm.models.llms import from_config
from fastvlm.models.saved import PartsVLMForConditionalGeneration, construct
from fastvlm.models.splice import splice
from fastvlm.models.vlm import VLM, tiles_of
from fastvlm.tokens import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MLP = {"_target_": "fastvlm.models.projectors.mlp.MLPProjector", "norm": False}
IDENTITY = {"_target_": "fastvlm.models.resamplers.identity.IdentityResampler"}
FASTVIT = {
    "_target_": "fastvlm.models.encoders.fastvit.FastViT",
    "dims": [8, 32],
    "depths": [1, 1],
    "attention": [False, True],
    "layer_scale": 0.5,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.25],
}
TIMM = "fastvlm.models.encoders.timm_encoder.TimmEncoder"
SIGLIP = {
    "_target_": TIMM,
    "name": "vit_base_patch16_siglip_224",
    "img_size": 64,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}
TOWER = {
    "_target_": "fastvlm.models.encoders.transformers_encoder.from_config",
    "config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
    },
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.25],
}
# Of three layers the first two are read, without a norm behind them, as LLaVA reads CLIP.
LLAVA_TOWER = TOWER | {"layer": -2, "norm": False}
SHUFFLE = {"_target_": "fastvlm.models.resamplers.pixel_shuffle.PixelShuffleResampler"}
LINEAR = {"_target_": "fastvlm.models.projectors.linear.LinearProjector", "bias": False}
AVERAGE = {
    "_target_": "fastvlm.models.resamplers.avgpool.AvgPoolResampler",
    "num_tokens": 4,
    "positions": False,
}
FORMS = {
    "ours": {
        "encoder": FASTVIT,
        "resampler": {"_target_": "fastvlm.models.resamplers.avgpool.AvgPoolResampler", "num_tokens": 4},
        "projector": {"_target_": "fastvlm.models.projectors.mlp.MLPProjector"},
        "size": 32,
    },
    "ours with fewer tokens": {
        "encoder": FASTVIT,
        "resampler": {
            "_target_": "fastvlm.models.resamplers.token_select.TokenSelectResampler",
            "num_tokens": 8,
            "min_tokens": 1,
            "coverage": 0.2,
            "positions": 4,
        },
        "projector": {"_target_": "fastvlm.models.projectors.mlp.MLPProjector"},
        "size": 32,
    },
    "tiles of their own": {
        "encoder": {
            "_target_": "fastvlm.models.encoders.multi_granularity.MultiGranularityEncoder",
            "coarse": FASTVIT,
            "fine": FASTVIT,
            "fusion": "views",
        },
        "resampler": {"_target_": "fastvlm.models.resamplers.avgpool.AvgPoolResampler", "num_tokens": 4},
        "projector": {"_target_": "fastvlm.models.projectors.mlp.MLPProjector"},
        "size": 32,
    },
    "LlavaForConditionalGeneration": {"encoder": None, "resampler": IDENTITY, "projector": MLP, "size": 32},
    "FastVlmForConditionalGeneration": {
        "encoder": {"_target_": TIMM, "name": "fastvit_t8", "mean": [0.0] * 3, "std": [1.0] * 3},
        "resampler": IDENTITY,
        "projector": MLP,
        "size": 64,
    },
    "Idefics3ForConditionalGeneration": {
        "encoder": SIGLIP,
        "resampler": SHUFFLE,
        "projector": LINEAR,
        "size": 64,
    },
    "Gemma3ForConditionalGeneration": {
        "encoder": SIGLIP,
        "resampler": AVERAGE,
        "projector": LINEAR | {"norm": "rms"},
        "size": 64,
        "llm": "gemma3_text",
    },
    "Swin": {
        "encoder": {
            "_target_": TIMM,
            "name": "swin_tiny_patch4_window7_224",
            "img_size": 64,
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1],
        },
        "resampler": IDENTITY,
        "projector": MLP,
        "size": 64,
    },
    "CLIP with OPT": {
        "encoder": LLAVA_TOWER | {"model_type": "clip_vision_model"},
        "resampler": IDENTITY,
        "projector": MLP,
        "size": 32,
        "llm": "opt",
    },
    "FastVlmForConditionalGeneration, ConvNeXt": {
        "encoder": {
            "_target_": TIMM,
            "name": "convnext_atto",
            "depths": [1, 1, 1, 1],
            "dims": [8, 8, 16, 16],
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
        },
        "resampler": IDENTITY,
        "projector": MLP,
        "size": 64,
    },
    "Idefics3ForConditionalGeneration, interpolated": {
        "encoder": SIGLIP | {"img_size": 32, "interpolate": True},
        "resampler": SHUFFLE,
        "projector": LINEAR,
        "size": 64,
    },
    "LlavaForConditionalGeneration, CLIP of transformers": {
        "encoder": LLAVA_TOWER | {"model_type": "clip_vision_model"},
        "resampler": IDENTITY,
        "projector": MLP,
        "size": 32,
    },
    "LlavaForConditionalGeneration, CLIP of transformers at another size": {
        "encoder": LLAVA_TOWER | {"model_type": "clip_vision_model", "image_size": 48},
        "resampler": IDENTITY,
        "projector": MLP,
        "size": 48,
    },
    "LlavaForConditionalGeneration, SigLIP of transformers": {
        "encoder": LLAVA_TOWER | {"model_type": "siglip_vision_model"},
        "resampler": IDENTITY,
        "projector": MLP,
        "size": 32,
    },
    "Idefics3ForConditionalGeneration, SigLIP of transformers": {
        "encoder": TOWER | {"model_type": "siglip_vision_model"},
        "resampler": SHUFFLE,
        "projector": LINEAR,
        "size": 32,
    },
    "Gemma3ForConditionalGeneration, SigLIP of transformers": {
        "encoder": TOWER | {"model_type": "siglip_vision_model", "interpolate": True},
        "resampler": AVERAGE,
        "projector": LINEAR | {"norm": "rms"},
        "size": 64,
        "llm": "gemma3_text",
    },
}
QUESTION = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red square?"}]}]}


def tiny_clip() -> OpenClipEncoder:
    import open_clip

    vision = {"layers": 3, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    open_clip.factory._MODEL_CONFIGS["tiny-clip"] = config
    return OpenClipEncoder("tiny-clip", layer=-2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(model, tokenizer, size) of a form, with weights that make tokens differ."""
    made = {}

    def build(form: str):
        if form in made:
            return made[form]
        spec = FORMS[form]
        folder = tmp_path_factory.mktemp("tokenizer")
        idefics = form.startswith("Idefics3")
        marks = ("<end_of_utterance>", "<fake_token_around_image>", "<global-img>") if idefics else ()
        tiny_tokenizer(image="<image>", specials=marks).save_pretrained(folder)
        tokenizer = Tokenizer(str(folder), template="smolvlm" if idefics else "chatml", image_token="<image>")
        torch.manual_seed(0)
        encoder = tiny_clip() if spec["encoder"] is None else construct(spec["encoder"])
        resampler = construct(spec["resampler"], in_dim=encoder.out_dim)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        gated = {"intermediate_size": 48, "num_key_value_heads": 2}
        more = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gemma3_text": gated | {"head_dim": 8}}
        kind = spec.get("llm", "qwen2")
        llm = from_config(kind, vocab_size=len(tokenizer), **sizes, **more.get(kind, gated))
        projector = construct(spec["projector"], in_dim=resampler.out_dim, out_dim=llm.dim)
        model = VLM(encoder, resampler, projector, llm, image_token_id=tokenizer.image_id).eval()
        model.recipe = {name: spec[name] for name in ("encoder", "resampler", "projector")}
        with torch.no_grad():
            for parameter in [*llm.parameters(), *projector.parameters()]:
                parameter.mul_(4 if parameter.ndim == 2 else 1)
        made[form] = model, tokenizer, spec["size"]
        return made[form]

    return build


def picture(size: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def our_side(model, tokenizer, size):
    """Ids, views, and the greedy answer of our own loop."""
    image = picture(size)
    slots = model.num_visual_tokens(size)
    ids = torch.tensor([encode_record(QUESTION, tokenizer, tokens_per_image=slots, prompt=True).input_ids])
    views = ImageTransform(image_size=size)(as_file(image))
    ends = (tokenizer.end_id, tokenizer.document_end_id)
    return image, ids, views, model.generate(ids, views, max_new_tokens=6, stop_ids=ends)[0].tolist()


def next_logits(model, ids, views):
    with torch.no_grad():
        embeds = model.llm.embed(ids)
        from fastvlm.models.slots import empty_slots, take_out
        from fastvlm.models.splice import splice

        embeds = splice(embeds, ids, model.encode_images(views), image_token_id=model.image_token_id)
        mask = torch.ones_like(ids)
        if model.drops_tokens:
            embeds, mask = take_out(empty_slots(embeds, ids == model.image_token_id), embeds, mask)
        return model.llm.prefill(embeds, mask)[0]


@pytest.mark.parametrize("form", ["ours", "ours with fewer tokens"])
def test_our_own_form_loads_by_the_auto_classes_with_equal_logits_and_answers(form, built, tmp_path):
    model, tokenizer, size = built(form)
    save_ours(model, tokenizer, tmp_path, image_size=size)
    loaded, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    image, ids, views, answer = our_side(model, tokenizer, size)
    text = processor.apply_chat_template(QUESTION["messages"], add_generation_prompt=True)
    inputs = processor(images=[image], text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == ids.tolist()
    assert torch.equal(inputs["pixel_values"], views)
    with torch.no_grad():
        theirs = loaded(**inputs).logits[:, -1]
    assert relative_error(theirs, next_logits(model, ids, views)) <= 1e-5
    assert len(set(answer)) > 1
    written = loaded.generate(**inputs, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert written == answer
    again = VLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert torch.equal(again.pixel_mean, model.pixel_mean)


def test_a_saved_model_ends_where_its_tokenizer_says_and_takes_the_usual_arguments(built, tmp_path):
    model, tokenizer, size = built("ours")
    save_ours(model, tokenizer, tmp_path, image_size=size)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="auto", torch_dtype=torch.bfloat16)
    assert set(loaded.generation_config.eos_token_id) == {tokenizer.end_id, tokenizer.document_end_id}
    assert next(loaded.parameters()).dtype is torch.bfloat16
    _, ids, views, _ = our_side(model, tokenizer, size)
    several = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 2}
    drawn = loaded.generate(ids, views, **several)
    assert len(drawn) == 3 and all(row[: ids.shape[1]].tolist() == ids[0].tolist() for row in drawn)
    told = loaded.generate(ids, views, **several, return_dict_in_generate=True)
    assert told.sequences.shape[:1] == (3,) and told.sequences[0, : ids.shape[1]].tolist() == ids[0].tolist()
    with pytest.raises(ValueError, match="device_map: this model is not split over devices"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"vlm.llm": 0, "": "cpu"})


def test_a_loaded_model_saved_again_ends_where_it_did(built, tmp_path):
    model, tokenizer, size = built("ours")
    save_ours(model, tokenizer, tmp_path / "first", image_size=size)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    loaded.save_pretrained(tmp_path / "second", is_main_process=True, state_dict=None)  # as transformers' Trainer does
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "second")
    assert again.generation_config.eos_token_id == loaded.generation_config.eos_token_id is not None
    for more in ({"push_to_hub": True}, {"state_dict": loaded.state_dict()}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match=rf"save_pretrained\({next(iter(more))}=...\) is not supported"):
            loaded.save_pretrained(tmp_path / "third", **more)


def test_a_saved_model_takes_the_attention_asked_for_and_refuses_what_it_does_not_know(built, tmp_path):
    model, tokenizer, size = built("ours")
    save_ours(model, tokenizer, tmp_path, image_size=size)
    for cls in (AutoModelForImageTextToText, PartsVLMForConditionalGeneration):
        for attention in ("eager", "sdpa"):
            llm = cls.from_pretrained(tmp_path, attn_implementation=attention).vlm.llm
            assert (llm.attention, llm.hf.config._attn_implementation) == (attention, attention)
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.vlm.llm.attention == "auto"
        assert cls.from_pretrained(tmp_path, config=loaded.config).vlm.llm.attention == "auto"
        with pytest.raises(ValueError, match=r"from_pretrained\(ignore_mismatched_sizes=...\) is not supported"):
            cls.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_saved_model_is_found_where_the_hubs_arguments_say(built, tmp_path):
    model, tokenizer, size = built("ours")
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    save_ours(model, tokenizer, repository / "snapshots" / ("0" * 40) / "inner", image_size=size)
    where = {"cache_dir": tmp_path, "local_files_only": True, "subfolder": "inner"}
    loaded = PartsVLMForConditionalGeneration.from_pretrained("someone/model", **where)
    assert torch.equal(loaded.vlm.projector[0].weight, model.projector[0].weight)


def test_how_attention_was_computed_in_training_is_not_part_of_a_saved_model(built, tmp_path, monkeypatch):
    model, _, size = built("ours")
    monkeypatch.setattr(model.llm, "attention", "flash_attention_2")
    model.save_pretrained(tmp_path, image_size=size)
    assert VLM.from_pretrained(tmp_path).llm.attention == "auto"


def test_a_language_model_that_stock_classes_name_otherwise_is_exported_in_our_form(built):
    model, tokenizer, size = built("CLIP with OPT")
    with pytest.raises(NoStockClass, match="laid out like Llama; OPTForCausalLM is not"):
        export_stock(model, tokenizer, image_size=size, image={"fit": "squash"})


def test_maps_with_channels_last_are_no_fast_vlm(built):
    model, tokenizer, size = built("Swin")
    with pytest.raises(NoStockClass, match="maps with channels first, and those of swin_tiny.* have them last"):
        export_stock(model, tokenizer, image_size=size)


@pytest.mark.parametrize(("image_token", "lacking"), [("<|image|>", "<image>, <fake_tok"), ("<image>", "<fake_tok")])
def test_a_run_without_the_tokens_of_idefics3s_processor_is_no_idefics3(image_token, lacking, built, tmp_path):
    model, _, size = built("Idefics3ForConditionalGeneration")
    tiny_tokenizer(image=image_token).save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path), template="chatml", image_token=image_token)
    with pytest.raises(NoStockClass, match=f"Idefics3's processor writes {lacking}.*tokenizer=smolvlm"):
        export_stock(model, tokenizer, image_size=size)


@pytest.mark.parametrize("form", ["ours", "LlavaForConditionalGeneration, CLIP of transformers"])
def test_a_tokenizer_that_adds_a_first_token_adds_none_to_the_prompts_of_a_saved_model(form, built, tmp_path):
    model, tokenizer, size = built(form)
    adding = copy.deepcopy(tokenizer.hf)
    adding.bos_token = "<|im_start|>"
    adding.add_bos_token = True
    adding.save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer(str(tmp_path / "tokenizer"), template="chatml", image_token="<image>")
    assert tokenizer.hf("a").input_ids[0] == tokenizer.hf.bos_token_id
    folder = tmp_path / "model"
    if form == "ours":
        save_ours(model, tokenizer, folder, image_size=size)
    else:
        stock, processor, notes = export_stock(model, tokenizer, image_size=size, image={"fit": "squash"})
        assert notes == []
        stock.save_pretrained(folder)
        save_processor(processor, folder)
    image, ids, *_ = our_side(model, tokenizer, size)
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(QUESTION["messages"], add_generation_prompt=True)
    assert processor(images=[image], text=[text], return_tensors="pt")["input_ids"].tolist() == ids.tolist()
    again, slots = load_run(folder)[1], model.num_visual_tokens(size)
    assert encode_record(QUESTION, again, tokens_per_image=slots, prompt=True).input_ids == ids[0].tolist()
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is False
    assert tokenizer.hf("a").input_ids[0] == tokenizer.hf.bos_token_id, "the run's own stays as it was"


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_prompts_of_other_tokens_than_in_training_are_said(template, built):
    """The tiny tokenizer has a token of a colon and a space, which training encodes apart."""
    model, tokenizer, size = built("LlavaForConditionalGeneration, CLIP of transformers")
    tokenizer = Tokenizer(tokenizer.path, template=template, image_token="<image>")
    notes = export_stock(model, tokenizer, image_size=size, image={"fit": "squash"})[2]
    assert bool(notes) == (template == "vicuna") and all("other tokens of a conversation" in note for note in notes)


def test_what_idefics3s_processor_does_otherwise_is_said(built):
    model, tokenizer, size = built("Idefics3ForConditionalGeneration")
    _, processor, notes = export_stock(model, tokenizer, image_size=size, image={"fit": "pad"})
    assert any("squashes an image" in note and "image.fit=pad" in note for note in notes)
    assert processor.image_processor.resample == 2


def test_a_saved_model_sends_tiles_through_the_encoder_of_tiles(built, tmp_path):
    model, tokenizer, size = built("tiles of their own")
    save_ours(model, tokenizer, tmp_path, image_size=size)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, size, size), dtype=np.uint8))
    layouts = torch.tensor([[1, 2, size, 2 * size]])  # a global view and two tiles
    with torch.no_grad():
        ours = model.arrange(model.encode_images(views, tiles_of(layouts)), layouts)
        alike = model.arrange(model.encode_images(views), layouts)
        theirs = torch.stack(loaded.get_image_features(views, layouts))
        ids = torch.tensor([[tokenizer.image_id] * ours.shape[:2].numel() + [5]])
        told = loaded(input_ids=ids, pixel_values=views, layouts=layouts).logits
        embeds = splice(model.llm.embed(ids), ids, ours, image_token_id=model.image_token_id)
        expected = loaded(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(theirs, ours) and not torch.equal(ours, alike)
    assert torch.equal(told, expected)


@pytest.mark.parametrize("how", ["import", pytest.param("remote code", marks=pytest.mark.slow)])
def test_our_form_loads_in_a_fresh_process(how, built, tmp_path):
    model, tokenizer, size = built("ours")
    save_ours(model, tokenizer, tmp_path / "m", image_size=size)
    *_, ids, views, answer = our_side(model, tokenizer, size)
    torch.save((ids, views), tmp_path / "inputs.pt")
    script = (
        "import sys, torch\n{}\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]{})\n"
        "AutoProcessor.from_pretrained(sys.argv[1]{})\n"
        "ids, views = torch.load(sys.argv[2])\n"
        "print(model.generate(ids, views, max_new_tokens=6, do_sample=False)[0, ids.shape[1]:].tolist())"
    )
    remote = ", trust_remote_code=True"
    code = script.format("import fastvlm.auto", "", "") if how == "import" else script.format("", remote, remote)
    command = [sys.executable, "-c", code, str(tmp_path / "m"), str(tmp_path / "inputs.pt")]
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == answer


@pytest.mark.parametrize("form", [form for form in FORMS if "Generation" in form])
def test_a_stock_class_from_the_folder_has_our_logits_and_our_answer(form, built, tmp_path):
    model, tokenizer, size = built(form)
    stock, processor, notes = export_stock(model, tokenizer, image_size=size, image={"fit": "squash"})
    name = form.split(",")[0]
    # The tiny tokenizer joins the colon and the space of smolvlm's turns.
    assert type(stock).__name__ == name and bool(notes) == name.startswith(("Gemma3", "Idefics3"))
    stock.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stock, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    image, ids, views, answer = our_side(model, tokenizer, size)
    text = processor.apply_chat_template(QUESTION["messages"], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == ids.tolist()
    with torch.no_grad():
        theirs = stock(**inputs).logits[:, -1]
    assert relative_error(theirs, next_logits(model, ids, views)) <= 1e-5
    assert len(set(answer)) > 1 or form.startswith("Gemma3")  # a tiny one says the same word again and again
    written = stock.generate(**inputs, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert written == answer
    verdicts = {v.engine.split()[0]: v for v in check_folder(tmp_path)}
    assert verdicts["transformers"].loads and verdicts["files"].loads
    expected = {
        "LlavaForConditionalGeneration": {"vLLM": True, "llama.cpp": False, "MLX-VLM": True},
        "FastVlmForConditionalGeneration": {"vLLM": False, "llama.cpp": False, "MLX-VLM": False},
        "Idefics3ForConditionalGeneration": {"vLLM": True, "llama.cpp": True, "MLX-VLM": True},
        "Gemma3ForConditionalGeneration": {"vLLM": True, "llama.cpp": True, "MLX-VLM": True},
    }[name]
    assert {engine: verdicts[engine].loads for engine in expected} == expected


def test_a_tower_read_with_its_norm_is_no_llava(built):
    model, tokenizer, size = built("Idefics3ForConditionalGeneration, SigLIP of transformers")
    llava = built("LlavaForConditionalGeneration, SigLIP of transformers")[0]
    other = VLM(model.encoder, llava.resampler, llava.projector, llava.llm, image_token_id=tokenizer.image_id)
    with pytest.raises(NoStockClass, match="Llava needs CLIP or SigLIP with encoder.norm=false"):
        export_stock(other, tokenizer, image_size=size)


def test_parts_that_equal_no_stock_class_say_which_one_is_odd(built):
    model, tokenizer, size = built("ours")
    with pytest.raises(NoStockClass, match="AvgPoolResampler.*stock classes have resampler=identity or pixel_shuffle"):
        export_stock(model, tokenizer, image_size=size)


def test_weights_of_other_shapes_are_refused_with_a_list(built, tmp_path):
    model, tokenizer, size = built("ours")
    save_ours(model, tokenizer, tmp_path, image_size=size)
    weights = load_file(tmp_path / "model.safetensors")
    weights["projector.0.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"projector.0.weight is \(3, 3\) there and \(32, 32\) here"):
        VLM.from_pretrained(tmp_path)


def test_a_folder_can_only_call_constructors_of_our_models():
    with pytest.raises(ValueError, match="'os.system' is not part of fastvlm.models"):
        construct({"_target_": "os.system", "command": "true"})


def test_the_command_saves_a_run_and_checks_it(tiny_config, tmp_path, capsys):
    from fastvlm.pipeline import Pipeline

    config = tiny_config("pipeline=align", "stages.align.steps=2", "stages.align.batch_size=2")
    run = Pipeline(config)
    run.run()
    out = tmp_path / "exported"
    main([f"run={run.run_dir}", f"out={out}"])
    said = capsys.readouterr().out
    assert "fastvlm parts" in said and "resampler=identity" in said
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert files | {"processor_config.json", "generation_config.json"} <= {file.name for file in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "| align | 2 |" in card
    loaded = AutoModelForImageTextToText.from_pretrained(out)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value.cpu(), loaded.vlm.state_dict()[name]), name
    main(["--check", str(out)])
    assert "no   vLLM" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not empty"):
        main([f"run={run.run_dir}", f"out={out}"])


def test_the_card_says_what_learns_in_every_form_a_configuration_has_for_it():
    lora = {"method": "lora", "r": 4, "lr": 2e-4, "num": None}
    stage = {
        "trainable": {"projector": {"lr": 1e-3, "weight_decay": 0.1}, "encoder.norm": 1e-5, "resampler": None},
        "adapt": {"encoder": {"method": "frozen", "lr": None}, "llm": lora},
    }
    assert learning(stage) == "projector 0.001, encoder.norm 1e-05, llm (lora r=4) 0.0002"
    assert learning({"last_layers": {"num": 2, "lr": 1e-4}}) == "llm (partial num=2) 0.0001"
    assert learning({"adapt": {"encoder": {"method": "full", "lr": 1e-5}}}) == "encoder (full) 1e-05"


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_a_processors_file_of_either_name_is_enough(name, built, tmp_path):
    model, tokenizer, size = built("ours")
    save_ours(model, tokenizer, tmp_path, image_size=size)
    (tmp_path / "processor_config.json").rename(tmp_path / name)
    assert check_folder(tmp_path)[-1].loads
    (tmp_path / name).unlink()
    assert "missing: processor_config.json" in check_folder(tmp_path)[-1].why


def test_a_pretrained_model_is_not_saved_in_our_form(tmp_path):
    save_checkpoint("llava", tmp_path / "model")
    with pytest.raises(ValueError, match="form=ours: a pretrained model is saved in its own class of transformers"):
        save_run(str(tmp_path / "model"), str(tmp_path / "out"), form="ours")


def test_a_wrong_argument_is_one_line():
    with pytest.raises(ValueError, match="did you mean check="):
        parse(["chek=x"])
    with pytest.raises(ValueError, match="needs out=<folder>"):
        parse(["run=x"])


@pytest.mark.parametrize("kind", ["ours", "LlavaForConditionalGeneration", "paligemma"])
def test_a_saved_folder_opens_like_a_run(kind, built, tmp_path):
    if kind == "paligemma":
        save_checkpoint(kind, tmp_path)
    else:
        model, tokenizer, size = built(kind)
        if kind == "ours":
            save_ours(model, tokenizer, tmp_path, image_size=size)
        else:
            for part in export_stock(model, tokenizer, image_size=size, image={"fit": "squash"})[:2]:
                part.save_pretrained(tmp_path)
    opened, words, config = load_run(tmp_path)
    if kind == "paligemma":
        assert words.template.image[1] == "<bos>" and config.image_size == 28
        return
    _, ids, views, answer = our_side(model, tokenizer, size)
    slots = opened.num_visual_tokens(config.image_size)
    assert encode_record(QUESTION, words, tokens_per_image=slots, prompt=True).input_ids == ids[0].tolist()
    assert words.end_id == tokenizer.end_id
    stop = (words.end_id, words.document_end_id)
    assert opened.generate(ids, views, max_new_tokens=6, stop_ids=stop)[0].tolist() == answer
