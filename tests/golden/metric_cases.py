"""Write the golden cases of the metrics: adversarial answers, and what the official code says of each.

    python tests/golden/metric_cases.py official=/path/to/checkouts

`official` holds a checkout a folder, named as in SOURCES; it runs in an environment with numpy, python-Levenshtein,
pycocoevalcap 1.2 (its Java tokenizer too) and nothing of ours. The cases are drawn from seeds, so the same checkouts
give the same bytes. What is stored: inputs and outputs, never code.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import random
import re
import sys
import tempfile
import types
import unittest.mock
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {
    "vqa": ("GT-Vision-Lab+VQA", "a013f0043c1e2cdc995922dfe257f7149aa9af06"),
    "llava": ("haotian-liu+LLaVA", "c121f0432da27facab705978f83c4ada465e46fd"),
    "lmms-eval": ("EvolvingLMMs-Lab+lmms-eval", "75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3"),
    "mmmu": ("MMMU-Benchmark+MMMU", "bb0b95a945998d91dfef37e969e07d49d1139438"),
    "aokvqa": ("allenai+aokvqa", "83786de0b24c4fef0bfe39420684f6f73d9f3581"),
    "pope": ("RUCAIBox+POPE", "3df3ba1b110ecce25696989577fad583b67d4239"),
    "mathvista": ("lupantech+MathVista", "53d525874bdde205128e6b160b7357a88277d479"),
    # Whose own homes are no repositories: copies of GQA's eval.py and of the script of the DocVQA competitions.
    "gqa": ("SHI-Labs+VCoder", "4e85acef896cee7843257d5d844ec945407efb13"),
    "rrc": ("QwenLM+Qwen-VL", "aa00ed04091eea5fcdd32985e7915f1c53e7d599"),
}
N = 600
ODD_WORDS = (
    "a an the one two ten none zero yes no not No not. red blue left right dont don't cant won't its it's shes lets "
    "let's somebody'd somebodyd youre y'all yall'd've 'tis oclock man's mans 2 3.5 1,000 10:30 .5 5. 50% $5 t-shirt "
    'black/white U.S.A. wal-mart coca-cola (left) "quoted" what? ok! a,b a, b 3,4 x;y e.g. www.site.com É ß İ ３ '
    "10'000 -7 +1 1/2 & @ # <b> `x` \\ _under_ {c} [d] = > tennis racket frisbee umbrella cell phone"
)
WORDS = ODD_WORDS.split()
GAPS = [" "] * 12 + ["  ", "\n", "\t", ""]


# Two ways to write one answer, or what looks like it: each quirk of a normalisation tells some of them apart.
PAIRS = [
    *[("two dogs", "2 dogs"), ("none", "0"), ("ten", "10"), ("eleven", "11"), ("dont", "don't"), ("shes", "she's")],
    *[("lets", "let's"), ("somebody'd", "somebodyd"), ("youre", "you're"), ("y'allll", "y'all'll"), ("1,000", "1000")],
    *[("3,4-x", "34x"), ("a-b, c", "ab c"), ("a-b", "a b"), ("3,4 x/y", "34 xy"), ("x 3.5.", "x 3.5"), ("1.", "1")],
    *[
        ("e.g. it", "eg it"),
        ("5.a", "5a"),
        ("the man", "man"),
        ("an apple", "apple"),
        ("man's", "man 's"),
        ("Im", "i'm"),
    ],
    *[
        ("ok?", "ok"),
        ("a:b", "a b"),
        ("it's", "its"),
        ("$5", "5"),
        ("one, two", "1 2"),
        ("x&y", "x y"),
        ("ok!", "ok"),
        ("\tx\n", "x"),
    ],
]


def words(r: random.Random, low: int, high: int) -> str:
    text = ""
    for _ in range(r.randint(low, high)):
        word = r.choice(WORDS)
        text += (r.choice(GAPS) if text else "") + (word.capitalize() if r.random() < 0.1 else word)
    return text + r.choice(["", "", "", ".", "?", " ", "!", "..", " ."])


def variant(r: random.Random, text: str) -> str:
    """The text with something done to it that a normalisation may or may not undo."""
    return r.choice(
        [
            lambda t: t,
            lambda t: t.upper(),
            lambda t: f" {t}\n",
            lambda t: f"the {t}",
            lambda t: t.replace("'", ""),
            lambda t: t.replace(" ", "  "),
            lambda t: t + ".",
            lambda t: t.replace("two", "2"),
            lambda t: f'"{t}"',
            lambda t: t.replace(" ", "-"),
            lambda t: t + ", ok",
            lambda t: t[:-1],
        ]
    )(text)


def load(path: Path, name: str):
    """A module of the official code from its file; Python 2's print is the only thing that is changed."""
    text = re.sub(r'^(\s*)print (".*")$', r"\1print(\2)", path.read_text(), flags=re.M)
    module = types.ModuleType(name)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def functions(path: Path, *names: str, **names_in_scope):
    """Only these functions and classes of a file."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    for node in tree.body:
        node.decorator_list = []
    scope = dict(names_in_scope)
    exec(compile(tree, str(path), "exec"), scope)
    return [scope[name] for name in names]


def write(name: str, sources: list[str], cases: list, **more) -> None:
    named = {source: "@".join(SOURCES[source]) if source in SOURCES else source for source in sources}
    head = json.dumps({"official": named, **more}, ensure_ascii=False)[:-1]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    path = HERE / f"{name}.json"
    path.write_text(f'{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size / 1000:.0f} kB")


def vqa(official: dict[str, Path]) -> None:
    module = load(official["vqa"] / "PythonEvaluationTools/vqaEvaluation/vqaEval.py", "vqa")
    evalai = load(official["llava"] / "llava/eval/m4c_evaluator.py", "m4c").TextVQAAccuracyEvaluator
    evalai.eval_pred_list.__globals__["tqdm"] = lambda rows: rows
    r = random.Random(1)
    cases = []
    for number in range(N):
        base = [words(r, 1, 3) for _ in range(r.randint(1, 3))]
        pool = base if r.random() < 0.3 else [variant(r, r.choice(base)) for _ in range(4)]
        answers = [pool[0]] * 10 if r.random() < 0.15 else [r.choice(pool) for _ in range(10)]
        prediction = variant(r, r.choice(base)) if r.random() < 0.85 else words(r, 0, 4)
        if number % 2:
            forms = list(r.choice(PAIRS))
            # Four matches are as good as ten, so one form stands at most three times.
            few = r.randint(0, 3)
            answers = [*[forms[0]] * few, *[forms[1]] * (10 - few)]
            prediction = r.choice([*forms, *forms, forms[0].capitalize(), forms[1] + "."])
        if number % 60 == 0:
            prediction, answers = "x. " * 40, ["x"] * 5 + ["x " * 40] * 5  # more periods than are removed
        rows = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
        truth = types.SimpleNamespace(qa={0: {"answers": rows, "question_type": "", "answer_type": ""}})
        truth.getQuesIds = lambda: [0]
        scorer = module.VQAEval(truth, types.SimpleNamespace(qa={0: {"answer": prediction}}), n=10)
        with contextlib.redirect_stdout(io.StringIO()):
            scorer.evaluate()
        scored = evalai().eval_pred_list([{"pred_answer": prediction, "gt_answers": answers}])
        distinct = sorted(set(answers))
        cases.append([prediction, distinct, [distinct.index(a) for a in answers], scorer.accuracy["overall"], scored])
    write(
        "vqa_accuracy", ["vqa", "llava"], cases, columns=["prediction", "answers", "given", "official x100", "evalai"]
    )


def relaxed(official: dict[str, Path]) -> None:
    [match] = functions(official["lmms-eval"] / "lmms_eval/tasks/chartqa/utils.py", "relaxed_correctness")
    r = random.Random(2)
    cases = []
    for _ in range(N):
        value = r.choice([0, 0.0, 1, 5, 20, 0.05, 1e6, -3, 2019, 14.5, r.uniform(-100, 100)])
        text = r.choice(
            [str(value), f"{value}%", f"{value:.2f}", f"{value:,}", f" {value} ", f"{value:e}", "Yes", "nan"]
        )
        target = r.choice([text, str(value), f"{value * 100}%", "yes", "inf", f"{value}%%", "0", "0%", f"{value:g}"])
        near = value * (1 + r.choice([0.05, -0.05, 0.0500001, 0.0499999, 0.06, 1, 0]))
        prediction = r.choice([text, str(near), f"{near}%", f"{near:.1f}", variant(r, target), "Yes.", "", "%", "1_0"])
        cases.append([prediction, target, bool(match(prediction, target))])
    write("relaxed_accuracy", ["lmms-eval"], cases, columns=["prediction", "answer", "correct"])


def anls(official: dict[str, Path]) -> None:
    metrics = official["lmms-eval"] / "lmms_eval/api/metrics.py"
    [distance] = functions(metrics, "levenshtein_distance")
    [harness] = functions(metrics, "anls", levenshtein_distance=distance)
    script = load(official["rrc"] / "eval_mm/infographicsvqa_eval.py", "rrc")
    r = random.Random(3)
    cases = []
    for _ in range(N):
        answers = [words(r, 1, 4) for _ in range(r.randint(1, 4))]
        prediction = list(variant(r, r.choice(answers)))
        for _ in range(r.choice([0, 0, 1, 2, len(prediction) // 2, len(prediction) // 2 + 1])):
            if prediction:
                prediction[r.randrange(len(prediction))] = r.choice(["", "x", "xy", " "])
        prediction = "".join(prediction)
        if r.random() < 0.05:
            prediction, answers = r.choice([("", ["", "a"]), ("ab", ["ac"]), ("abcd", ["abxy"]), ("ß" * 4, ["ss" * 4])])
        cases.append([prediction, answers])
    truth = [{"questionId": i, "question": "", "answers": answers} for i, (_, answers) in enumerate(cases)]
    given = [{"questionId": i, "answer": prediction} for i, (prediction, _) in enumerate(cases)]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "truth.json"), Path(folder, "given.json")
        files[0].write_text(json.dumps({"data": truth, "dataset_name": ""}))
        files[1].write_text(json.dumps(given))
        settings = types.SimpleNamespace(answer_types=False, anls_threshold=0.5)
        scored = script.evaluate_method(*files, settings)
    for i, case in enumerate(cases):
        case += [scored["per_sample_result"][str(i)]["score"], harness(case[1], [case[0]])["anls"]]
    figures = {"anls": scored["result"]["score"]}
    columns = ["prediction", "answers", "the competition's script", "lmms-eval"]
    write("anls", ["rrc", "lmms-eval"], cases, columns=columns, corpus=figures)


def aokvqa(official: dict[str, Path]) -> None:
    [score] = functions(official["aokvqa"] / "evaluation/eval_predictions.py", "eval_aokvqa")
    r = random.Random(4)
    cases = []
    for _ in range(3 * N // 2):  # a fifth is difficult and has no score, and some options cannot be named
        choices = r.sample(["wood", "metal", "stone", "Wood", "plastic", "old wood", "A", "b."], 4)
        answers = [r.choice(["wood", "Wood", "wood ", "stone", "oak"]) for _ in range(10)]
        right, hard = r.randrange(4), r.random() < 0.2
        chosen, direct = r.choice([*choices, "none of them"]), r.choice(["wood", "Wood", "stone", "oak", "wood."])
        row = {"question_id": "q", "choices": choices, "direct_answers": answers, "correct_choice_idx": right}
        row["difficult_direct_answer"] = hard
        picked = score([row], {"q": chosen}, multiple_choice=True, strict=False)
        said = None if hard else score([row], {"q": direct}, multiple_choice=False, strict=False)
        cases.append([chosen, choices, right, picked, direct, answers, hard, said])
    columns = ["chosen", "choices", "right", "multiple choice x100", "direct", "answers", "difficult", "direct x100"]
    write("aokvqa", ["aokvqa"], cases, columns=columns)


def pope(official: dict[str, Path]) -> None:
    r = random.Random(5)
    code = (official["pope"] / "evaluate.py").read_text()
    said = ["Yes", "No", "yes", "no", "not", "NO", "No,", "no.", "Yes. No", "there is no cat", "There is, not", "none"]
    said += [
        "nothing",
        "",
        ".no",
        "No. Yes",
        "It's not. yes",
        "cannot",
        "I do not know",
        "no\n",
        "no ",
        "Yes, no",
        "n,o",
    ]
    rows = [[r.choice(said) + r.choice(["", "", ".", " ok"]), r.choice(["yes", "no"])] for _ in range(N)]
    for start in range(0, N, 20):
        rows[start] = ["Yes", "yes"]  # the original divides by the number of right yeses
    tables = []
    for start in range(0, N, 20):
        part = rows[start : start + 20]
        files = iter([[json.dumps({"answer": a}) for a, _ in part], [json.dumps({"label": b}) for _, b in part]])
        out = io.StringIO()
        scope = {"open": lambda *_, files=files: next(files), "json": json}
        with contextlib.redirect_stdout(out):
            exec(code.replace("import json", ""), scope)
        names = ("acc", "precision", "recall", "f1", "yes_ratio")
        tables.append({name: scope[name] for name in names})
        for row, answer in zip(part, scope["answers"]):
            row.append(answer["answer"])
    write("pope", ["pope"], rows, columns=["answer", "label", "read"], per_20=tables)


def gqa(official: dict[str, Path]) -> None:
    import string

    import numpy as np

    path = official["lmms-eval"] / "lmms_eval/api/metrics.py"
    [score] = functions(path, "exact_match_hf_evaluate", np=np, string=string, re=re)
    r = random.Random(6)
    cases = []
    for _ in range(N):
        answer = words(r, 1, 2).strip("\n\t ") or "x"
        prediction = variant(r, answer) if r.random() < 0.8 else words(r, 1, 2)
        loose = score([prediction], [answer], ignore_case=True, ignore_punctuation=True)["exact_match"]
        types_ = [r.choice(["query", "verify", "choose", "logical"]), r.choice(["attr", "rel", "global"])]
        cases.append([prediction, answer, *types_, bool(loose)])
    strict, figures = gqa_script(official, cases)
    cases = [[*case, bool(right)] for case, right in zip(cases, strict)]
    columns = ["prediction", "answer", "structural", "semantic", "lmms-eval", "eval.py after LLaVA's conversion"]
    write("gqa", ["lmms-eval", "gqa", "llava"], cases, columns=columns, corpus=figures)


def gqa_script(official: dict[str, Path], cases: list) -> tuple[list[float], dict[str, float]]:
    """What GQA's script makes of the answers as LLaVA's script hands them over: of each, and its percentages."""
    script = official["gqa"] / "playground/data/eval/gqa/data/eval/eval.py"
    questions, answers = {}, []
    for i, (prediction, answer, structural, semantic, _) in enumerate(cases):
        kinds = {"structural": structural, "semantic": semantic, "detailed": ""}
        row = {"question": "what", "answer": answer, "types": kinds, "isBalanced": True, "semantic": []}
        questions[str(i)] = row | {"groups": {"global": "all"}}
        answers.append(json.dumps({"question_id": str(i), "text": prediction}) + "\n")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        Path("said.jsonl").write_text("".join(answers))
        Path("testdev_balanced_questions.json").write_text(json.dumps(questions))
        said = {"tqdm": types.SimpleNamespace(tqdm=lambda rows: rows)}
        run(official["llava"] / "scripts/convert_gqa_for_eval.py", "--src=said.jsonl", "--dst=converted.json")
        options = ["--tier=testdev_balanced", "--questions={tier}_questions.json", "--predictions=converted.json"]
        # The script overwrites its lists with their means: what its mean is given is remembered.
        seen: list[list[float]] = []
        scores = run(script, *options, modules=said, sum=lambda values: seen.append(list(values)) or sum(values))[
            "scores"
        ]
    figures = {name: scores[name] for name in ("accuracy", "open", "binary")}
    figures |= {name: mean for name, (mean, _) in scores["accuracyPerStructuralType"].items()}
    figures |= {f"about {name}": mean for name, (mean, _) in scores["accuracyPerSemanticType"].items()}
    return next(values for values in seen if len(values) == len(cases)), figures


def run(path: Path, *arguments: str, modules: dict | None = None, **names_in_scope) -> dict:
    """A whole script with its arguments, in a scope of its own."""
    before, scope = dict(sys.modules), {"__name__": "__main__", **names_in_scope}
    with (
        unittest.mock.patch.object(sys, "argv", [str(path), *arguments]),
        unittest.mock.patch.dict(sys.modules, before | (modules or {})),
    ):
        exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope


def science_qa(official: dict[str, Path]) -> None:
    """The reading stands in the script's main block: its statements are run as they are."""
    path = official["llava"] / "llava/eval/eval_science_qa.py"
    tree = ast.parse(path.read_text())
    [main] = [node for node in tree.body if isinstance(node, ast.If)]
    [loop] = [node for node in main.body if isinstance(node, ast.For)]
    chain = ast.Module(
        body=[n for n in loop.body if isinstance(n, ast.If) and "pred_text" in ast.dump(n.test)], type_ignores=[]
    )
    code = compile(chain, str(path), "exec")
    [index] = functions(path, "get_pred_idx", random=random)
    r = random.Random(7)
    said = [
        "A",
        "B",
        "C",
        "D",
        "E",
        "F",
        "a",
        "(B)",
        "B.",
        "B. wood",
        "E. x",
        "F. x",
        "The answer is C.",
        "",
        "AB",
        " A",
    ]
    said += [
        "The answer is B. The answer is B.",
        "The answer is Z.",
        "So The answer is A!",
        "The answer is D",
        "A. The answer is B.",
    ]
    said += [
        "The answer is E.",
        "B.wood",
        "G. The answer is A.",
        "The answer is a.",
        "A.  x",
        "C. ",
        "The answer is (A).",
    ]
    options, cases = ["A", "B", "C", "D", "E"], []
    for _ in range(N):
        text, num = r.choice(said) + r.choice(["", "", "", ".", " "]), r.randint(2, 5)
        scope = {"pred_text": text, "args": types.SimpleNamespace(options=options), "re": re}
        exec(code, scope)
        cases.append([text, num, index(scope["answer"], ["x"] * num, options)])
    write("science_qa", ["llava"], cases, columns=["prediction", "choices", "read"])


def mmmu(official: dict[str, Path]) -> None:
    module = load(official["mmmu"] / "mmmu/utils/eval_utils.py", "mmmu")
    module.random.seed(42)
    r = random.Random(8)
    texts = [
        "3 apples",
        "the red one",
        "$1,200",
        "none of the above",
        "a",
        "increase in price",
        "B-cell",
        "0.5",
        "<img='x'>",
    ]
    pieces = [
        "(A)",
        "(B)",
        "(C)",
        " A ",
        " B ",
        "A",
        "B.",
        "so the answer is",
        "because",
        "option (D)",
        "I think",
        "!",
        "\n",
    ]
    choice = []
    for _ in range(N):
        options = dict(zip("ABCDE", r.sample(texts, r.randint(2, 5))))
        said = " ".join(r.choice([*pieces, *options.values(), "it", "is", "not"]) for _ in range(r.randint(0, 8)))
        said += r.choice(["", ".", "?", "'", ";:"])
        letter = module.parse_multi_choice_response(said, list(options), options)
        choice.append([said, list(options.values()), letter])
    write("mmmu_choice", ["mmmu"], choice, columns=["response", "options", "read, drawn with seed 42 in this order"])
    parts = [
        "the answer is",
        "so",
        "= ",
        "x =",
        "could be",
        "therefore",
        "final answer",
        "result is",
        "about",
        ":",
        "\n",
    ]
    values = [
        "24",
        "1,234",
        "3.14159",
        "-7",
        "2e3",
        "1.5E-2",
        ".5",
        "50%",
        "$3.20",
        "x",
        "y = 2",
        "Newton",
        "12,34",
        "1,000,000",
        "a b",
        "-",
    ]
    opened = []
    for _ in range(N):
        gold = r.choice([[r.choice(values)], r.sample(values, 2)])
        said = " ".join(r.choice([*parts, *values, *gold, *gold, "It is. The"]) for _ in range(r.randint(1, 9)))
        said = r.choice([said, said.capitalize(), said.upper(), said + "."])
        meant = module.parse_open_response(said)
        right = module.eval_open(gold if len(gold) > 1 else gold[0], meant)
        opened.append([said, gold, sorted(map(str, meant)), bool(right)])
    write("mmmu_open", ["mmmu"], opened, columns=["response", "answers", "meant", "correct"])


def mathvista(official: dict[str, Path]) -> None:
    import logging

    import Levenshtein

    folder = official["mathvista"] / "evaluation"
    [similar] = functions(folder / "calculate_score.py", "get_most_similar", distance=Levenshtein.distance)
    names = ("normalize_extracted_answer", "safe_equal")
    normalise, equal = functions(
        folder / "calculate_score.py", *names, re=re, get_most_similar=similar, logging=logging
    )
    asked = types.SimpleNamespace(get_response=lambda **_: "<asks GPT>")
    prompt = {"create_test_prompt": lambda *_: "", "demo_prompt": "", "re": re, "logging": logging}
    [extract] = functions(folder / "extract_answer.py", "extract_answer", **prompt)
    r = random.Random(9)
    said = [
        "14",
        "-3",
        "3.0",
        "1.45",
        " 7 ",
        "1e3",
        "nan",
        "inf",
        "B",
        "(b)",
        "(B) 8/11",
        "b",
        "8/11",
        "[2007, 2008]",
        "yes",
    ]
    said += [
        'The answer is "5".',
        'The answer is "B". The answer is "C".',
        "",
        "The number is 14.",
        "1,200",
        "0.65",
        "2.675",
        "(Z)",
        "five",
    ]
    cases = []
    for _ in range(N):
        kind = r.choice(["integer", "float", "list", "text"])
        choices = (
            r.sample(["3/11", "8/11", "6/11", "3/5", "yes", "B", "14"], r.randint(2, 4)) if kind == "text" else None
        )
        precision = r.choice([1.0, 2.0, 1, None]) if kind == "float" else None
        response = r.choice([*said, *(choices or [])])
        problem = {"question_type": "multi_choice" if choices else "free_form", "answer_type": kind, "choices": choices}
        found = extract(asked, response, problem | {"query": "", "pid": "1"}, quick_extract=True)
        extraction = r.choice([*said, *(choices or [])])
        parsed = normalise(extraction, choices, problem["question_type"], kind, precision)
        answer = r.choice([*said, *(choices or []), str(parsed)])
        cases.append(
            [response, choices, kind, found, extraction, precision, parsed, answer, bool(equal(parsed, answer))]
        )
    columns = [
        "response",
        "choices",
        "answer_type",
        "extracted",
        "extraction",
        "precision",
        "normalised",
        "answer",
        "equal",
    ]
    write("mathvista", ["mathvista"], cases, columns=columns)


def boxes(official: dict[str, Path]) -> None:
    path = official["lmms-eval"] / "lmms_eval/tasks/refcoco/utils_rec.py"
    read, overlap = functions(path, "parse_float_sequence_within", "compute_iou", re=re)
    [inside] = functions(path, "compute_center_accuracy")
    r = random.Random(10)
    cases = []
    for _ in range(N):
        x, y = sorted(round(r.random(), 3) for _ in range(2)), sorted(round(r.random(), 3) for _ in range(2))
        true = [x[0], y[0], x[1] + 0.001, y[1] + 0.001]
        near = [round(v + r.choice([0, 0, 0.01, -0.01, 0.1, -0.2]), r.choice([2, 3])) for v in true]
        a, b, c, d = near
        text = r.choice(
            [
                f"[{a}, {b}, {c}, {d}]",
                f"It is at [{a},{b},{c},{d}]. [0, 0, 1, 1]",
                f"({a}, {b}, {c}, {d})",
                f"[ {a}, {b} , {c}, {d} ]",
                f"[{a}, {b}, {c}]",
                f"[[{a}, {b}, {c}, {d}]]",
                f"[{c}, {d}, {a}, {b}]",
                "[.5, .5, 1., 1]",
                f"[{a}, {b}, {c}, {d}, 1]",
                f"[\n{a},\n{b}, {c}, {d}\n]",
                "[0, 0, 1, 1]",
                "",
            ]
        )
        box = read(text)
        cases.append([text, true, box, overlap(true, box), bool(inside(true, box))])
    write("boxes", ["lmms-eval"], cases, columns=["prediction", "true", "read", "iou", "centre inside"])


def captions(official: dict[str, Path]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    r = random.Random(11)
    text = "man woman dog cat bus tv t-shirt surfboard o'clock man's dogs' 2-year-old 10:30 1/2 50% $5 U.S. Mr. A&W"
    nouns = text.split()
    nouns += [
        "kid's",
        '"stop"',
        "'stop'",
        "(left)",
        "black-and-white",
        "can't",
        "isn't",
        "they're",
        "1990s",
        "20th",
        "1,000",
        "and/or",
        "cannot",
        "#5",
    ]
    text = "sitting standing on top of a the an in front next to eating and while looking at near is are"
    verbs = text.split()
    marks = [".", ",", "!", "?", " .", ";", ":", " - ", " -- ", "...", ""]

    def caption(low: int = 3, high: int = 10) -> str:
        picked = [r.choice(verbs if r.random() < 0.6 else nouns) for _ in range(r.randint(low, high))]
        picked = [w + (r.choice(marks) if r.random() < 0.1 else "") for w in picked]
        return " ".join(picked).capitalize() + r.choice([".", ".", "", " .", "!"])

    references, predictions = [], []
    for _ in range(500):
        texts = [caption() for _ in range(r.choice([1, 2, 2, 3, 5]))]
        mine = r.choice(texts).split(" ")
        for _ in range(r.randint(0, 4)):
            mine[r.randrange(len(mine))] = r.choice(verbs + nouns)
        references.append(texts)
        predictions.append(
            r.choice([" ".join(mine), " ".join(mine), caption(), texts[0], "a", " ".join(mine * 2), "."])
        )
    truth = PTBTokenizer().tokenize({i: [{"caption": t} for t in texts] for i, texts in enumerate(references)})
    given = PTBTokenizer().tokenize({i: [{"caption": t}] for i, t in enumerate(predictions)})
    with contextlib.redirect_stdout(io.StringIO()):
        cider, each = Cider().compute_score(truth, given)
        bleu, _ = Bleu(4).compute_score(truth, given)
        rouge, rouges = Rouge().compute_score(truth, given)
    # Tokens are stored where they are not the words themselves in lower case: they halve the file.
    cases = []
    for i, (prediction, texts) in enumerate(zip(predictions, references)):
        cases.append([prediction, texts, given[i][0], truth[i], round(float(each[i]), 9), round(float(rouges[i]), 9)])
    figures = {"cider": float(cider), "bleu": [float(b) for b in bleu], "rouge_l": float(rouge)}
    half = len(cases) // 2
    source = "pycocoevalcap 1.2 (salaniz/pycocoevalcap@ad63453c)"
    columns = ["prediction", "references", "prediction tokens", "reference tokens", "cider", "rouge_l"]
    write("captions_1", [source], cases[:half], columns=columns, corpus=figures)
    write("captions_2", [source], cases[half:], columns=columns, corpus=figures)


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if "official" not in given:
        sys.exit(__doc__)
    official = {name: Path(given["official"]) / folder for name, (folder, _) in SOURCES.items()}
    makers = (vqa, relaxed, anls, aokvqa, pope, gqa, science_qa, mmmu, mathvista, boxes, captions)
    for make in makers:
        if given.get("only") in (None, make.__name__):
            make(official)


if __name__ == "__main__":
    main()
