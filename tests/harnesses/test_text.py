"""lm-eval over our language model: its own HFLM over the same weights says the same."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from tiny_vlm import IMAGE_SIZE, build_model  # noqa: E402

from fastvlm.harnesses.text import TextModel  # noqa: E402
from fastvlm.harnesses.text_guard import TextGuard  # noqa: E402
from fastvlm.inference.engine import Engine  # noqa: E402
from fastvlm.tokens import TEMPLATES  # noqa: E402

TEXT = "the small grey digit stands left of the seven and nine is below three "


@pytest.fixture(scope="module")
def ours(tiny_model, tiny_tokenizer):
    return TextModel(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, batch_size=3)


@pytest.fixture(scope="module")
def theirs(tiny_model, tiny_tokenizer):
    from lm_eval.models.huggingface import HFLM

    # Ours ends where the decoder says; theirs is told.
    return HFLM(
        pretrained=tiny_model.llm.hf,
        tokenizer=tiny_tokenizer.hf,
        backend="causal",
        batch_size=1,
        max_length=256,
        device="cpu",
        prefix_token_id=tiny_tokenizer.document_end_id,
    )


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_likelihoods_are_hflms(ours, theirs):
    pairs = [("the digit", " seven"), ("what is", " a small grey nine"), (TEXT * 2, "three"), ("digit ", "nine z")]
    pairs += [(TEXT * 30, " above"), ("which number", " " + "here " * 20)]  # the first is longer than the model
    mine, expected = (m.loglikelihood(requests("loglikelihood", *pairs)) for m in (ours, theirs))
    for (a, a_best), (b, b_best) in zip(mine, expected):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4) and a_best == b_best


def test_a_greedy_continuation_is_called_greedy(ours, tiny_model, tiny_tokenizer):
    said = ours.engine.generate([{"document": [{"type": "text", "text": "the digit"}]}], [[]], max_new_tokens=3)[0]
    ids, _ = ours.encode_pair("the digit", " x")
    rows = [(ids + said.token_ids, [-100] * len(ids) + said.token_ids)]
    assert said.token_ids and ours._score(rows)[0][1].all()


def test_whole_texts_are_hflms_windows_included(ours, theirs):
    texts = [("the seven",), (TEXT * 40,), (TEXT,)]
    mine, expected = (m.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for m in (ours, theirs))
    assert mine == pytest.approx(expected, rel=1e-4)


def test_generated_text_is_hflms(ours, theirs):
    asked = [("the digit", {"until": ["\n"], "max_gen_toks": 12, "do_sample": False})]
    asked += [
        (TEXT, {"until": ["e"], "max_gen_toks": 20, "do_sample": False}),
        ("what", {"until": [], "max_gen_toks": 5}),
        ("aa" + "日本語のテキスト" * 20, {"until": [], "max_gen_toks": 16}),  # cut inside a character
    ]
    mine = ours.generate_until(requests("generate_until", *asked))
    expected = theirs.generate_until(requests("generate_until", *asked))
    assert mine == expected


@pytest.mark.parametrize("lead", range(3))
def test_a_prompt_longer_than_the_model_is_cut_to_its_length_wherever_the_cut_falls(tiny_tokenizer, lead, monkeypatch):
    short = TextModel(build_model(tiny_tokenizer, max_positions=64), tiny_tokenizer, image_size=IMAGE_SIZE)
    texts = ["a" * lead + "日本語のテキスト" * 20]
    texts.append(short.apply_chat_template([{"role": "user", "content": texts[0]}]))
    asked = []
    monkeypatch.setattr(short.engine, "_run", spied(short.engine._run, asked))
    options = {"until": [], "max_gen_toks": 16}
    short.generate_until(requests("generate_until", *((text, options) for text in texts)))
    document = tiny_tokenizer.encode_text(texts[0])
    chat = document + tiny_tokenizer.encode_template("<|assistant|>")
    assert [record["input_ids"] for [records, *_] in asked for record in records] == [document[-48:], chat[-48:]]


def spied(function, calls: list):
    def call(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return call


def say(ids: list[int], monkeypatch) -> None:
    """From here on every engine's answers are these tokens, whatever it is asked; one row at a time."""
    said = itertools.cycle(ids)

    def logits(self, hidden):
        scores = torch.zeros(len(hidden), len(self.tokenizer))
        scores[:, next(said)] = 1
        return scores

    monkeypatch.setattr(Engine, "_next_logits", logits)


def test_generated_text_keeps_its_outer_space_up_to_the_stop_string(ours, tiny_tokenizer, monkeypatch):
    say(tiny_tokenizer.encode_text("    return a + b\n\ndef"), monkeypatch)
    asked = ("def add(a, b):\n", {"until": ["\ndef"], "max_gen_toks": 100})
    assert ours.generate_until(requests("generate_until", asked)) == ["    return a + b\n"]


def test_a_chat_prompt_is_the_models_own_and_its_words_stay_words(ours):
    history = [{"role": "user", "content": "is <|image|> here"}]
    text = ours.apply_chat_template(history)
    ids, continuation = ours.encode_pair(text, " seven")
    assert ids == ours._ids({"messages": history}) and continuation == ours.words.encode_text(" seven")
    assert ours.words.image_id not in ids


def test_a_choice_behind_a_chat_prompt_has_the_templates_space(ours, monkeypatch):
    monkeypatch.setattr(ours.words, "template", replace(TEMPLATES["vicuna"], start=""))
    history = [{"role": "user", "content": "which digit"}]
    whole = ours._ids({"messages": [*history, {"role": "assistant", "content": "seven"}]})
    for choice in ("seven", " seven"):
        ids, continuation = ours.encode_pair(ours.apply_chat_template(history), choice)
        assert continuation == ours.words.encode_text(" seven")
        assert whole[: len(ids + continuation)] == ids + continuation


@pytest.fixture(autouse=True)
def own_tasks_alone(monkeypatch):
    """lm-eval's own thousands of task files take seconds to list, for every command anew."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture
def tasks(tmp_path):
    """A choice task, and one of code as lm-eval's HumanEval is made, over rows that lie here."""
    rows = [
        {"q": f"which number {word}", "choices": ["seven", "nine"], "label": i % 2} for i, word in enumerate("abcd")
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    program = {
        "task_id": "t/0",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
    }
    program["test"] = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
    (tmp_path / "code.json").write_text(json.dumps(program))
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
    (tmp_path / "pick.yaml").write_text(
        "task: pick\noutput_type: multiple_choice\n"
        + data % (tmp_path / "rows.json")
        + "doc_to_text: '{{q}}'\ndoc_to_target: label\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "tiny_code.yaml").write_text(
        "task: tiny_code\nunsafe_code: true\noutput_type: generate_until\n"
        + data % (tmp_path / "code.json")
        + "doc_to_text: '{{prompt}}'\ndoc_to_target: \"{{test}}\\ncheck({{entry_point}})\"\n"
        "metric_list: [{metric: !function code.pass_at_k, aggregation: mean, higher_is_better: true, k: [1]}]\n"
        'generation_kwargs: {until: ["\\nclass"], max_gen_toks: 64, do_sample: false}\n'
        "filter_list:\n- name: create_test\n"
        "  filter: [{function: custom, filter_fn: !function code.build_predictions}]\n"
    )
    (tmp_path / "code.py").write_text("from lm_eval.tasks.humaneval.utils import build_predictions, pass_at_k\n")
    return tmp_path


def test_tasks_run_and_their_samples_are_kept(tasks, tiny_model, tiny_tokenizer):
    guard = TextGuard(["pick"], include=str(tasks), limit=4, batch_size=2)
    result = guard.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, out=tasks / "out")
    assert 0 <= result["metrics"]["test/pick/acc"] <= 1
    assert len((tasks / "out/predictions/pick.jsonl").read_text().splitlines()) == 4
    assert "test/pick/acc: " in guard.render(result)


def test_code_is_run_only_with_leave_and_then_in_the_sandbox(tasks, tiny_model, tiny_tokenizer, monkeypatch):
    from fastvlm.harnesses import sandbox

    try:
        sandbox.check_sandbox()
    except ValueError as error:
        pytest.skip(str(error))
    import sys

    monkeypatch.delitem(sys.modules, "lm_eval.tasks.humaneval.utils", raising=False)
    options = {"include": str(tasks), "limit": 1}
    with pytest.raises(ValueError, match="allow it with task.run_code=true"):
        TextGuard(["tiny_code"], **options).run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.humaneval.utils", raising=False)
    wrong = TextGuard(["tiny_code"], run_code=True, **options).run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    assert wrong["metrics"]["test/tiny_code/pass@1/create_test"] == 0
    say(tiny_tokenizer.encode_text("    total = a + b\n    return total\n\nclass"), monkeypatch)
    right = TextGuard(["tiny_code"], run_code=True, **options).run(
        tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, out=tasks / "out"
    )
    assert right["metrics"]["test/tiny_code/pass@1/create_test"] == 1


def test_an_unknown_task_and_none_are_one_line(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="lm-eval has no task mmluu"):
        TextGuard(["mmluu"]).run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    with pytest.raises(ValueError, match="task.tasks is empty"):
        TextGuard([])
    assert torch.is_grad_enabled()
