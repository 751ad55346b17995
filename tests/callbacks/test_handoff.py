"""A handoff is whole or absent, and loads strictly."""

import json

import pytest
import torch
from torch import nn

from fastvlm.callbacks.handoff import MANIFEST, load_component, read_manifest, write_handoff

MANIFEST_FIELDS = {"hash": "abc", "tokenizer": "t1", "stage": "align"}


@pytest.fixture
def handoff(tmp_path):
    part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    manifest = write_handoff(tmp_path / "handoff", {"llm": part}, MANIFEST_FIELDS)
    return tmp_path / "handoff", part, manifest


def test_what_was_written_loads_bit_for_bit_buffers_included(handoff):
    folder, part, _ = handoff
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    load_component(other, "llm", folder, read_manifest(folder), tokenizer="t1")
    assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), other.state_dict().values(), strict=True))


def test_without_its_manifest_a_stage_is_not_finished(handoff):
    folder, *_ = handoff
    (folder / MANIFEST).unlink()
    assert read_manifest(folder) is None


def test_another_tokenizer_is_refused(handoff):
    folder, part, manifest = handoff
    with pytest.raises(ValueError, match="trained with tokenizer t1, this run has t2"):
        load_component(part, "llm", folder, manifest, tokenizer="t2")


def test_other_shapes_and_names_are_refused_with_the_list(handoff):
    folder, _, manifest = handoff
    with pytest.raises(ValueError, match=r"0.weight \(4, 3\) is \(5, 3\) here"):
        load_component(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), "llm", folder, manifest)
    with pytest.raises(ValueError, match="1.bias is not in this model"):
        load_component(nn.Sequential(nn.Linear(3, 4)), "llm", folder, manifest)
    with pytest.raises(ValueError, match="lacks 2 tensors .* choose the llm it was trained with, or drop the handoff"):
        bigger = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        load_component(bigger, "llm", folder, manifest)


def test_a_changed_file_is_refused(handoff):
    folder, part, manifest = handoff
    path = folder / "llm.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not the file the manifest names"):
        load_component(part, "llm", folder, manifest)


def test_a_broken_manifest_names_its_file(handoff):
    folder, *_ = handoff
    (folder / MANIFEST).write_text(json.dumps({"hash": 1})[:-3])
    with pytest.raises(ValueError, match=r"manifest.json: not a handoff manifest"):
        read_manifest(folder)


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    def tied():
        net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        net["head"].weight = net["embed"].weight
        return net

    first, second = tied(), tied()
    manifest = write_handoff(tmp_path, {"llm": first}, MANIFEST_FIELDS)
    load_component(second, "llm", tmp_path, manifest)
    assert torch.equal(first["embed"].weight, second["head"].weight)
    assert second["embed"].weight is second["head"].weight
