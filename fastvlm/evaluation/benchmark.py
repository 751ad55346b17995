"""A benchmark: reads questions from shards, answers them in windows on every rank, scores them by a protocol."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastvlm.data.shards import ShardReader
from fastvlm.data.source import Source, shuffled
from fastvlm.data.source_index import SourceIndex
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.answering import Asked, answer_window, fingerprint_model, read_window
from fastvlm.evaluation.predictions import question_name, read_rows, write_predictions
from fastvlm.evaluation.prompts import Prompt, answer_of, split_question
from fastvlm.evaluation.protocol import Protocol
from fastvlm.evaluation.questions import spread
from fastvlm.evaluation.scores import describe, make_result
from fastvlm.inference.engine import Engine
from fastvlm.inference.memory import ImageStore
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


class Benchmark:
    """One data set with a prompt and a scoring protocol.

    Questions are divided into windows in the order of the index. A window is answered as a whole, in batches that
    depend only on its questions, and written to a file by atomic rename. So an interrupted run, even with another
    number of ranks, continues with the missing windows and ends with the same predictions.

    Args:
        name: name of the task in metrics and file names.
        source: the data set; its shards are written by `data/prepare.py source=...`.
        protocol: scores the answers.
        split: split of the shards.
        limit: number of questions, spread evenly over the split; None takes all.
        instruction, options, ocr, request, form, template: see `Prompt`.
        shots: number of examples from the train split before every question, always the same ones; 4 shots are the
            first 4 of 8.
        stop: strings that end an answer; None is a line break with form=document and nothing otherwise.
        max_new_tokens: limit on the length of an answer.
        batch_size: questions answered at once.
        window: questions that a rank answers before it saves them; an interruption loses at most these.
        cache_mb: MiB of visual tokens kept for further questions about the same image.
        thumbnails: questions shown with their image on the HTML page beside the predictions.
        resamples: bootstrap resamples; images are drawn, not questions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        name: str,
        *,
        source: Source,
        protocol: Protocol,
        split: str = "val",
        limit: int | None = None,
        instruction: str | None = None,
        options: bool | None = None,
        ocr: bool = False,
        request: str | None = None,
        form: str = "chat",
        template: str = Prompt.template,
        shots: int = 0,
        stop: Sequence[str] | None = None,
        max_new_tokens: int = 16,
        batch_size: int = 32,
        window: int = 128,
        cache_mb: int = 512,
        thumbnails: int = 200,
        resamples: int = 1000,
    ):
        for key, value, least in (
            ("shots", shots, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("batch_size", batch_size, 1),
            ("window", window, 1),
            ("limit", 1 if limit is None else limit, 1),
        ):
            if value < least:
                raise ValueError(f"task {name}: {key}={value} must be at least {least}")
        self.name, self.source, self.protocol, self.split, self.limit = name, source, protocol, split, limit
        self.prompt = Prompt(instruction, options, ocr, request, form, template)
        self.shots, self.max_new_tokens = shots, max_new_tokens
        self.stop = tuple(stop) if stop is not None else ("\n",) if form == "document" else ()
        self.batch_size, self.window, self.cache_mb = batch_size, window, cache_mb
        self.thumbnails, self.resamples = thumbnails, resamples

    def run(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        transform: ImageTransform | None = None,
        device: str | torch.device = "cpu",
        out: str | Path | None = None,
    ) -> dict:
        """Answer and score all questions in this process; returns the result of `make_result`.

        Args:
            image_size: side of a view in pixels, as in the last training stage.
            transform: turns an image file into views, as in the last training stage; None pads to squares.
            out: folder for `predictions/<name>.jsonl` and related files, from which an interrupted run resumes.
        """
        out = Path(out) if out is not None else None
        where = {"image_size": image_size, "transform": transform}
        windows = self.predict(model, tokenizer, **where, device=device, out=out)
        return self.score([row for window in windows for row in window], tokenizer=tokenizer, out=out)

    def render(self, result: dict) -> str:
        """Return the result as a table for the terminal."""
        return describe(result)

    def require_shards(self) -> None:
        """Check that there are shards of the split, and those that shots are taken from.

        Raises:
            ValueError: there are none.
        """
        self.require(self.split)
        if self.shots:
            self.require("train")

    def require(self, split: str) -> None:
        """Check that there are shards of one split; see `require_shards`."""
        if not self.source.has_split(split):
            use = "" if split == self.split else f"shots={self.shots} come from train: "
            raise ValueError(
                f"task {self.name}: {use}no {split} shards in {self.source.path}; make them with "
                f"`python data/prepare.py source={self.source.name} splits={split} path=<the data set>`"
            )

    def questions(self, tokenizer: Tokenizer) -> tuple[SourceIndex, list[np.ndarray]]:
        """Return the index of the split and the rows of each window.

        Raises:
            ValueError: there are no shards, or the source's filters leave no sample.
        """
        self.require(self.split)
        index = self.source.load(self.split, tokenizer)
        rows, _ = self.source.select(index)
        if self.limit is not None:
            rows = rows[spread(len(rows), self.limit)]
        if not len(rows):
            raise ValueError(f"task {self.name}: the {self.split} split of {self.source.path} holds no question")
        return index, [rows[i : i + self.window] for i in range(0, len(rows), self.window)]

    def predict(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        transform: ImageTransform | None = None,
        device: str | torch.device = "cpu",
        out: Path | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[dict]]:
        """Answer the windows of this rank; with `out`, windows answered earlier are read from their files.

        Returns:
            The unscored rows of this rank's windows, in order.
        """
        engine = Engine(model, tokenizer, image_size=image_size, transform=transform, device=device)
        index, windows = self.questions(tokenizer)
        examples = self.examples(tokenizer)
        folder = self.parts(out, engine, index, windows, examples) if out is not None else None
        mine = range(rank, len(windows), num_ranks)
        shown = self.shown(windows)
        cache = ImageStore(self.cache_mb << 20)
        answered, done, total = [], 0, sum(len(windows[k]) for k in mine)
        missing = [k for k in mine if folder is None or not (folder / f"{k:06d}.json").exists()]
        batches = read_window(
            [windows[k] for k in missing], index=index, source=self.source, transform=engine.transform, shown=shown
        )
        for k in mine:
            file = folder / f"{k:06d}.json" if folder is not None else None
            if k in missing:
                asked = next(batches)
                rows = answer_window(
                    engine,
                    asked,
                    prompt=self.prompt,
                    examples=examples,
                    batch_size=self.batch_size,
                    max_new_tokens=self.max_new_tokens,
                    stop=self.stop,
                    cache=cache,
                )
                rows = [self.row_of(question) | row for question, row in zip(asked, rows)]
                if file is not None:
                    beside = file.with_name(f".{file.name}.{os.getpid()}")
                    beside.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
                    beside.replace(file)
            else:
                rows = json.loads(file.read_text(encoding="utf-8"))
            answered.append(rows)
            done += len(rows)
            progress(done, total)
        return answered

    def collect(self, out: Path, *, wait: float | int | None = None) -> list[dict]:
        """Return the rows of all windows, in order, from the files that the ranks wrote.

        Args:
            wait: seconds to wait for each further window; None does not wait.

        Raises:
            ValueError: windows are missing.
        """
        folder = Path(json.loads((out / "predictions" / f".{self.name}.json").read_text())["parts"])
        count = json.loads((folder / "windows.json").read_text())["windows"]
        there, since = -1, time.monotonic()
        while len(found := sorted(folder.glob("[0-9]*.json"))) < count:
            if len(found) > there:
                there, since = len(found), time.monotonic()
            if wait is None or time.monotonic() - since > wait:
                raise ValueError(
                    f"task {self.name}: {count - len(found)} of {count} windows in {folder} are not answered; run the "
                    "same command again"
                )
            time.sleep(0.2)
        return [row for file in found for row in json.loads(file.read_text(encoding="utf-8"))]

    def score(self, rows: Sequence[dict], *, tokenizer: Tokenizer | None = None, out: Path | None = None) -> dict:
        """Score answered rows; with `out`, write the predictions, their page and the official result file."""
        result = make_result(self.name, rows, protocol=self.protocol, split=self.split, resamples=self.resamples)
        result |= {"asked": self.describe_prompt(), "data": str(self.source.path)}
        if out is not None:
            result["examples"] = write_predictions(out, result, protocol=self.protocol)
        return result

    def score_file(self, path: str | Path, tokenizer: Tokenizer, *, out: Path | None = None) -> dict:
        """Score answers from a file: our predictions, or JSON (lines) with `question_id` and answer.

        Raises:
            ValueError: an answer is missing or duplicated, or belongs to none of the questions.
        """
        index, windows = self.questions(tokenizer)
        answers, named_by = read_rows(path)
        rows, which = [], f"task {self.name} ({self.split} split)"
        read = read_window(windows, index=index, source=self.source, transform=None, shown=frozenset())
        for question in (question for window in read for question in window):
            row = self.row_of(question)
            if (name := question_name(row, named_by)) not in answers:
                raise ValueError(
                    f"{path} has no answer to question {name} of {which}, or not to each of that id; it holds answers "
                    f"such as to {next(iter(answers), 'none')}: is it of another task, split or limit?"
                )
            rows.append(row | {"prediction": answers.pop(name)})
        if answers and self.limit is None:
            raise ValueError(
                f"{path} answers {len(answers)} questions that {which} does not ask, such as "
                f"{next(iter(answers))}: is it of another task or split?"
            )
        return self.score(rows, tokenizer=tokenizer, out=out)

    def describe_prompt(self) -> dict:
        """Return the settings two scores must share to be comparable: the prompt's, and those of the protocol."""
        said = {"form": self.prompt.form, "shots": self.shots, "ocr_tokens": self.prompt.ocr}
        instruction = self.prompt.request if self.prompt.instruction is None else self.prompt.instruction
        said |= {"instruction": "as in the shards" if instruction is None else instruction}
        return said | self.protocol.describe()

    def examples(self, tokenizer: Tokenizer) -> list[tuple[dict, list[bytes]]]:
        """Return records and image files of the shots.

        Raises:
            ValueError: there is no train split, or it has too few readable samples.
        """
        if not self.shots:
            return []
        self.require("train")
        index = self.source.load("train", tokenizer)
        rows, _ = self.source.select(index)
        faults, reader, found = index.faults.to_pylist(), ShardReader(), []
        for row in rows[shuffled(len(rows), "shots", self.name)].tolist():
            if len(found) == self.shots:
                break
            if not faults[row]:
                raw = index.read(row, reader)
                found.append((self.source.edit(raw.record), list(raw.images) if self.source.images else []))
        reader.close()
        if len(found) < self.shots:
            raise ValueError(f"task {self.name}: shots={self.shots}, but train holds {len(found)} readable samples")
        return found

    def shown(self, windows: Sequence[np.ndarray]) -> frozenset[int]:
        """Return the rows that get a thumbnail, spread over the split."""
        rows = np.concatenate(windows)
        return frozenset(rows[spread(len(rows), self.thumbnails)].tolist())

    def row_of(self, question: Asked) -> dict:
        """Return a question's row for the predictions file, without the model's answer."""
        meta = dict(question.record.get("meta") or {})
        answers = meta.pop("answers", None) or [answer_of(question.record)]
        text, *_ = split_question(question.text, meta)
        return {
            "key": question.key,
            "question_id": meta.pop("question_id", question.record.get("id")),
            "image_id": meta.pop("image_id", question.image_id or question.key),
            "type": str(meta.pop("type", "") or ""),
            "question": text,
            "answers": [str(answer) for answer in answers],
            "meta": {key: value for key, value in meta.items() if key not in ("turns", "ocr_tokens")},
        } | ({"thumbnail": question.thumbnail} if question.thumbnail else {})

    def parts(
        self, out: Path, engine: Engine, index: SourceIndex, windows: Sequence[np.ndarray], examples: Sequence[tuple]
    ) -> Path:
        """Return the folder of answered windows; its name is a hash of model, data, prompt and examples."""
        transform = engine.transform
        said = {
            "task": [self.name, self.split, index.checksum, [rows.tolist() for rows in windows]],
            "prompt": [repr(self.prompt), self.shots, self.stop, self.max_new_tokens, self.batch_size, self.window],
            "source": [self.source.system, self.source.images],
            "image": [transform.image_size, transform.fit, transform.tiles, transform.padding],
            "model": fingerprint_model(engine.model),
        }
        if examples:
            said["examples"] = [(record, [hashlib.sha256(f).hexdigest() for f in files]) for record, files in examples]
        name = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]
        folder = out / "predictions" / f".{self.name}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in (
            (folder / "windows.json", {"windows": len(windows)}),
            (out / "predictions" / f".{self.name}.json", {"parts": str(folder)}),
        ):
            beside = path.with_name(f"{path.name}.{os.getpid()}")
            beside.write_text(json.dumps(content))
            beside.replace(path)
        return folder
