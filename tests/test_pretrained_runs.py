"""A pretrained vision-language model goes through stages, handoff, a second run and the engine like one of ours."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "models"))
from tiny_checkpoints import save_checkpoint  # noqa: E402

from fastvlm.build import load_run, settle_views  # noqa: E402
from fastvlm.config import check  # noqa: E402
from fastvlm.data.conversation import encode_record  # noqa: E402
from fastvlm.data.transforms import ImageTransform  # noqa: E402
from fastvlm.inference.engine import Engine  # noqa: E402
from fastvlm.models.pretrained import from_pretrained  # noqa: E402
from fastvlm.models.pretrained.views import read_views  # noqa: E402
from fastvlm.pipeline import Pipeline  # noqa: E402
from fastvlm.tokens import Tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("llava_next", tmp_path_factory.mktemp("llava_next"))


def test_a_pretrained_model_is_tuned_handed_on_and_asked(folder, tiny_config, capsys):
    few = ["stages.instruct.steps=2", "stages.instruct.batch_size=2", "stages.instruct.max_tokens=600"]
    config = tiny_config("vlm=llava_1_6", f"vlm.path={folder}", *few, "stages.instruct.max_images=40")
    check(config)
    run = Pipeline(config)
    assert run.config.stages.instruct.image_size == 28 and run.config.stages.instruct.image.fit == "squash"
    assert [2, 2] in run.config.stages.instruct.image.tiles
    run.run()
    proof = json.loads((run.run_dir / "stages" / "instruct" / "freezing.json").read_text())["rows"]
    moved = {row["part"]: row["changed"] for row in proof if row["trainable"]}
    assert moved["projector"] > 0 and moved["llm"] > 0 and "encoder" not in moved
    model, tokenizer, loaded = load_run(run.run_dir)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value.cpu(), model.state_dict()[name]), name
    again = tiny_config("vlm=llava_1_6", f"vlm.path={folder}", *few, "stages.instruct.max_images=40")
    check(again)
    Pipeline(again).run()
    assert "instruct: finished before" in capsys.readouterr().out


def test_weights_written_anew_under_the_same_name_are_other_weights(tmp_path, tiny_config):
    folder = save_checkpoint("llava_next", tmp_path / "model")

    def first_weights() -> dict[str, str]:
        run = Pipeline(tiny_config("vlm=llava_1_6", f"vlm.path={folder}"))
        run.build()
        return run.initial

    before = first_weights()
    assert first_weights() == before
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if "projector" in name)
    save_file(weights | {name: weights[name] + 1}, file, metadata={"format": "pt"})
    after = first_weights()
    assert [part for part in before if after[part] != before[part]] == ["projector"]


def test_a_part_of_the_users_own_that_was_edited_is_another_part(tmp_path, tiny_config, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from fastvlm.models.resamplers.identity import IdentityResampler\n"
    code += "class Mine(IdentityResampler):\n    number = 1\n"
    (tmp_path / "my_part.py").write_text(code)

    def first_weights() -> dict[str, str]:
        run = Pipeline(tiny_config("pipeline=align", "resampler=identity", "resampler._target_=my_part.Mine"))
        run.build()
        return run.initial

    before = first_weights()
    assert first_weights() == before
    (tmp_path / "my_part.py").write_text(code.replace("1", "2"))
    after = first_weights()
    assert [part for part in before if after[part] != before[part]] == ["resampler"]


def test_a_size_of_null_needs_a_pretrained_model(tiny_config):
    with pytest.raises(ValueError, match="stages.dense.image_size=null is a pretrained model's own size"):
        check(tiny_config("stages.dense.image_size=null"))


def test_a_model_that_cannot_be_fetched_is_one_line(tiny_config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tiny_config("vlm=llava_1_5", "vlm.path=nobody/nothing")
    with pytest.raises(ValueError, match=r"vlm.path=nobody/nothing: .*; name a folder with config.json"):
        settle_views(config)


@pytest.mark.parametrize("kind", ["llava_next", "smolvlm", "qwen2_vl", "paligemma"])
def test_the_engine_writes_what_the_plain_loop_writes(kind, tmp_path):
    folder = save_checkpoint(kind, tmp_path / kind)
    template = "paligemma" if kind == "paligemma" else "own"
    model, tokenizer = from_pretrained(str(folder)), Tokenizer(str(folder), template=template, image_token="own")
    views = read_views(str(folder), model.config)
    transform = ImageTransform(image_size=views.image_size, **views.image)
    engine = Engine(model, tokenizer, image_size=views.image_size, transform=transform, max_new_tokens=6)
    pixels = torch.randint(0, 256, (44, 100, 3), dtype=torch.uint8).numpy()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    image = engine.transform(data.getvalue())
    assert len(image) > 1 or kind in ("qwen2_vl", "paligemma")
    question = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a circle?"}]}]}
    other = {"messages": [{"role": "user", "content": "no"}]}
    written = engine.generate([question, other], [[image], []])
    slots = [model.num_visual_tokens(views.image_size) * len(image)]
    ids = torch.tensor([encode_record(question, tokenizer, tokens_per_image=slots, prompt=True).input_ids])
    layouts = torch.tensor([image.view_layout])
    stop = (tokenizer.end_id, tokenizer.document_end_id)
    alone = model.generate(ids, image, layouts=layouts, max_new_tokens=6, stop_ids=stop)[0].tolist()
    alone = alone[: min([i for i, token in enumerate(alone) if token in stop], default=6)]
    assert written[0].token_ids == alone
