import json

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from fastvlm.callbacks.samples import Samples, draw_grid, split_reference

QUESTION = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit?"}]},
        {"role": "assistant", "content": "7"},
    ]
}
CAPTION = {"document": [{"type": "image"}, {"type": "text", "text": "two digits, 7 and 3"}]}
PICTURE = torch.full((3, 16, 16), 200, dtype=torch.uint8)


class Files(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_file(self, path, folder=None):
        self.logged.append((path.name, folder))


def test_every_validation_leaves_a_picture_and_json_of_the_same_samples(fit, tmp_path):
    asked, logger = [], Files()

    def generate(model, prompts, images):
        asked.append((prompts, images))
        assert not torch.is_grad_enabled() and model.image_token_id == 3
        return [" 7. ", "one digit"]

    records = [(QUESTION, [PICTURE]), (CAPTION, [Image.new("RGB", (20, 12))]), (QUESTION, [PICTURE])]
    fit(4, [Samples(2, generate=generate, records=lambda num: records)], logger=logger)
    folder = tmp_path / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000004.json", "step-000004.png"]
    stored = json.loads((folder / "step-000004.json").read_text())
    assert stored["stage"] == "tiny" and stored["step"] == 4
    assert [row["correct"] for row in stored["samples"]] == [True, False]
    assert stored["samples"][1] == {
        "prompt": "[image]",
        "reference": "two digits, 7 and 3",
        "prediction": "one digit",
        "correct": False,
    }
    assert Image.open(folder / "step-000004.png").width > 600
    assert logger.logged == [("step-000004.png", "samples"), ("step-000004.json", "samples")]
    prompts, images = asked[0]
    assert prompts[0] == {"messages": QUESTION["messages"][:1]} and len(images[0]) == 1  # never the answer


def test_generating_leaves_random_state_and_modes_of_training_alone(fit):
    def noisy(model, prompts, images):
        torch.rand(3)
        model.eval()
        return ["7"]

    torch.manual_seed(5)
    want = torch.rand(1)
    callback = Samples(generate=noisy, records=lambda num: [(QUESTION, [PICTURE])])
    trainer = fit(1, [])
    trainer.lightning_module.train()
    trainer.lightning_module.model.llm.eval()
    torch.manual_seed(5)
    callback.on_validation_end(trainer, trainer.lightning_module)
    assert torch.equal(torch.rand(1), want)
    model = trainer.lightning_module.model
    assert model.training and model.encoder.training and not model.llm.training


def test_a_missing_answer_is_an_error(fit):
    with pytest.raises(ValueError, match="0 answers to 1 prompts"):
        fit(1, [Samples(generate=lambda *_: [], records=lambda num: [(QUESTION, [PICTURE])])])


def test_without_records_and_data_module_method_it_says_so(fit):
    with pytest.raises(ValueError, match="held_out"):
        fit(1, [Samples(generate=lambda *_: [])])


def test_running_text_asks_for_its_continuation():
    prompt, reference = split_reference({"document": [{"type": "text", "text": "one two three four"}]})
    assert prompt == {"document": [{"type": "text", "text": "one two"}]} and reference == "three four"


def test_a_record_without_words_to_say_is_refused():
    with pytest.raises(ValueError, match="assistant turn"):
        split_reference({"messages": QUESTION["messages"][:1]})
    with pytest.raises(ValueError, match="needs a text"):
        split_reference({"document": [{"type": "image"}]})


def test_grid_takes_any_number_of_pictures_and_any_letters():
    row = {"prompt": "Größe?\nñ · 你好 " * 20, "reference": "", "prediction": "ja", "correct": False}
    grid = draw_grid([row] * 3, [[], [PICTURE], [PICTURE] * 5], title="align, step 3")
    assert grid.width == 2 * 620 and grid.height > 2 * 176
