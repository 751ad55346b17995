"""Speed of the data engine compared with a pure JPEG decode and with other libraries (peers).

    python benchmarks/data.py                        # ours alone: 3 minutes, 2 of them once, to make the data
    python benchmarks/data.py peers=<environment>    # and the peers: about an hour on two cores, 9 minutes a round
    python benchmarks/data.py parts=shares,packing   # one minute

The peers need their own environment (`uv venv E; uv pip install -p E/bin/python -r
benchmarks/requirements-peers.txt`). Keys: peers, parts=speed,shares,packing, only=<names of peers>, images=2000 made,
count=1024 timed, rounds=5, batch_size=32, folder=<where the data is made and kept>, out=benchmarks/results/data.json.

Speed is images per CPU second of all processes of a pipeline, divided by that of a pure libjpeg-turbo decode of the
same files in the same round; medians over rounds, in which all pipelines take turns. Every process has one torch
thread, files are in the page cache, pipelines cache nothing, and start-up and the first batches are not timed. The
baseline is torchvision's decode with one image in memory at a time; simplejpeg's decode into a reused buffer is faster
and is reported, too.

All make the same batches: 32 images, longer side 336, padded to a square. "best" and ours differ by 0.2 to 0.4 of 255
on average, because ours repeats JPEG colour (`REPEATED` in fastvlm/data/transforms.py). Text is not treated alike. Ours
returns token ids, labels and positions: the index stores the ids, so they are only sliced, laid out around the image's
slots and collated. "tokenising" is ours with an index without ids, so every read parses JSON and tokenises. The peers
return the JSON as unparsed bytes, which is less work than either: training would still have to parse and tokenise it.
"best" is uint8 by torchvision's decode_jpeg and antialiased resize, "usual" PIL, float32 and normalisation, "our
decoder" fastvlm's transform in the peer's loader.
"""

from __future__ import annotations

import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import made, shares  # noqa: E402

PEERS = ("webdataset", "mosaicml", "litdata", "energon", "huggingface")
OURS = ("pure", "fastvlm", "fastvlm_tokenising")
WARM = 128  # images before timing starts
PATIENCE = 600  # seconds to wait for one answer
DEFAULTS = {
    "peers": "",
    "parts": "speed,shares,packing",
    "only": ",".join(PEERS),
    "images": "2000",
    "count": "1024",
    "rounds": "5",
    "batch_size": "32",
    "folder": "",
    "out": str(ROOT / "benchmarks" / "results" / "data.json"),
}


class Contender:
    """A process that runs `benchmarks.peers.serve`."""

    def __init__(self, name: str, python: str, *, scratch: Path):
        self.name = name
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        quiet |= {"LITDATA_DISABLE_VERSION_CHECK": "1", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
        self.log = scratch / f"{name}.log"
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=scratch,
            env={**os.environ, **threads, **quiet, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        )

    def ask(self, **request) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        if not ready:
            self._process.kill()
            raise SystemExit(f"error: {self.name}: no answer within {PATIENCE} s to {request} (see {self.log})")
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"ended with {self._process.wait()}"}
        if "error" in reply:
            raise shares.Refused(f"error: {self.name}: {reply['error']} (see {self.log.name} of its scratch folder)")
        return reply

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def once(folder: Path, make) -> Path:
    """Make a folder unless an earlier run completed it."""
    mark = folder.with_name(f"{folder.name}.done")
    if not mark.exists():
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log(f"making {folder}")
        make(folder)
        mark.touch()
    return folder


def write_photographs(folder: Path, count: int) -> None:
    from concurrent.futures import ProcessPoolExecutor

    from fastvlm.data.shards import ShardWriter

    with ShardWriter(folder, "train", max_samples=500) as writer, ProcessPoolExecutor(os.cpu_count()) as pool:
        for i, image in enumerate(pool.map(made.photograph, range(count), chunksize=20)):
            writer.write(f"{i:06d}", made.conversation(i), [image], image_ext="jpg")


def measure_speed(folder: Path, contenders: dict[str, Contender], options: dict) -> dict:
    """Return, for every name/pixels/workers, median images per CPU second and per second, relative to pure decode."""
    runs = [("pure", "decode_reused", 0)]
    runs += [(name, "best", workers) for name in ("fastvlm", "fastvlm_tokenising") for workers in (0, 1)]
    names = [name for name in contenders if name not in OURS]
    runs += [(name, pixels, workers) for name in names for pixels in ("best", "usual", "ours") for workers in (0, 1)]
    results: dict[tuple, list[dict]] = {}
    for number in range(int(options["rounds"])):
        for name, pixels, workers in [("pure", "decode_only", 0), *runs]:
            slow = pixels == "usual"
            reply = contenders[name].ask(
                do="speed",
                folder=str(folder if name.startswith("fastvlm") else folder / ("shards" if name == "pure" else name)),
                pixels=pixels,
                workers=workers,
                batch_size=int(options["batch_size"]),
                warm=WARM,
                count=int(options["count"]) // (2 if slow else 1),
            )
            if name != "pure" and reply["image"] != [3, 336, 336, "torch.float32" if slow else "torch.uint8"]:
                raise SystemExit(f"error: {name} made images of {reply['image']}")
            results.setdefault((name, pixels, workers), []).append(reply)
            each = reply["images"] / reply["cpu"]
            log(f"  round {number}: {name:12} {pixels:12} workers={workers} {each:7.1f} images a CPU second")
    pure = results[("pure", "decode_only", 0)]
    table = {}
    for key, replies in results.items():
        cpu = [r["images"] / r["cpu"] * p["cpu"] / p["images"] for r, p in zip(replies, pure)]
        wall = [r["images"] / r["wall"] * p["wall"] / p["images"] for r, p in zip(replies, pure)]
        table["/".join(map(str, key))] = {
            "cpu": statistics.median(cpu),
            "cpu_rounds": cpu,
            "wall": statistics.median(wall),
            "ms_per_image": statistics.median(1000 * r["cpu"] / r["images"] for r in replies),
        }
    return table


def speed_lines(table: dict, names: list[str]) -> list[str]:
    def cell(name: str, pixels: str, workers: int) -> str:
        found = table.get(f"{name}/{pixels}/{workers}")
        return f"{found['cpu']:6.2f}" if found else "     -"

    pure, reused = table["pure/decode_only/0"], table["pure/decode_reused/0"]
    lines = [
        f"images a CPU second over a pure decode ({pure['ms_per_image']:.3f} ms); columns: in process, one worker",
        f"  {'':12} {'best':>14} {'usual':>14} {'our decoder':>14}",
        f"  {'fastvlm':12} {cell('fastvlm', 'best', 0)} {cell('fastvlm', 'best', 1)}",
        f"  {'  tokenising':12} {cell('fastvlm_tokenising', 'best', 0)} {cell('fastvlm_tokenising', 'best', 1)}",
    ]
    for name in names:
        columns = (f"{cell(name, pixels, 0)} {cell(name, pixels, 1)}" for pixels in ("best", "usual", "ours"))
        lines.append(f"  {name:12} " + "  ".join(columns))
    if names:
        for pixels, bar in (("best", 1.3), ("usual", 3), ("ours", None)):
            each = []
            for workers in (0, 1):
                best = max(names, key=lambda n: table[f"{n}/{pixels}/{workers}"]["cpu"])
                ratio = table[f"fastvlm/best/{workers}"]["cpu"] / table[f"{best}/{pixels}/{workers}"]["cpu"]
                each.append(f"{ratio:.2f} ({best})")
            what = {"best": "best", "usual": "usual", "ours": "our decoder"}[pixels]
            wanted = f"bar {bar}" if bar else "the loaders alone"
            lines.append(f"  ours over the fastest of the peers, {what}: {' and '.join(each)}; {wanted}")
    over = [table[f"fastvlm/best/{workers}"]["cpu"] / reused["cpu"] for workers in (0, 1)]
    lines.append(f"  ours over simplejpeg's decode ({reused['ms_per_image']:.3f} ms): {over[0]:.2f} and {over[1]:.2f}")
    lines.append("  bars for ours over pure decode: 0.70 in process, 0.55 with a worker")
    return lines


def share_lines(rows: list[dict]) -> list[str]:
    lines = [f"largest share error over every prefix of {shares.COUNT:,} samples, in largest samples' worth (bar 1)"]
    names = list(rows[0]["errors"])
    lines.append(f"  {'':30} " + " ".join(f"{n:>12.12}" for n in names))
    for row in rows:
        found = (row["errors"][n] for n in names)
        errors = " ".join(f"{statistics.median(e):12.2f}" if e else f"{'refused':>12}" for e in found)
        lines.append(f"  {row['mixture'] + ' by ' + row['unit']:30} {errors}")
    return lines


def packing_lines(rows: list[dict]) -> list[str]:
    lines = ["sft_minimal in rows (bar 98 % useful)   tokens  rows   useful   padding of batches of 8 rows"]
    for row in rows:
        useful = "      -" if row["useful"] is None else f"{row['useful']:7.2%}"
        lines.append(f"  {row['packer']:36} {row['max_tokens']:6} {row['rows']:6} {useful} {row['padding']:8.1%}")
    return lines


def machine() -> dict:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = named[0] if named else model
    import torch
    import torchvision

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def keep(result: dict, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    options = dict(DEFAULTS)
    for argument in sys.argv[1:]:
        key, equals, value = argument.partition("=")
        if key not in options or not equals:
            sys.exit(f"error: {argument} is not one of {', '.join(f'{k}=' for k in options)}")
        options[key] = value
    parts = options["parts"].split(",")
    if unknown := set(parts) - {"speed", "shares", "packing"}:
        sys.exit(f"error: parts={','.join(sorted(unknown))}; there are speed, shares and packing")
    import torch

    torch.set_num_threads(1)
    count = int(options["images"])
    folder = Path(options["folder"] or Path(tempfile.gettempdir()) / f"fastvlm-benchmark-{count}").resolve()
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    python = options["peers"]
    if python and Path(python).is_dir():
        python = str(Path(python) / "bin" / "python")
    names = [name for name in options["only"].split(",") if name] if python else []
    begun, out = time.time(), Path(options["out"])
    once(folder / "tokenizer", lambda to: made.train_tokenizer(to))
    result: dict = {
        "machine": machine(),
        "options": {k: options[k] for k in ("images", "count", "rounds", "batch_size")},
    }
    contenders = {name: Contender(name, python, scratch=scratch) for name in names}
    result["versions"] = {name: contender.ask(do="version")["version"] for name, contender in contenders.items()}
    lines = [f"{result['machine']['cpu']}, {result['machine']['cores']} cores, torch {result['machine']['torch']}"]
    if names:
        lines.append("peers: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    if "speed" in parts:
        once(folder / "shards", lambda to: write_photographs(to, count))
        for name in names:
            ask = {"do": "convert", "shards": str(folder / "shards")}
            once(folder / name, lambda to: contenders[name].ask(**ask, to=str(to)))  # noqa: B023
        own = {name: Contender(name, sys.executable, scratch=scratch) for name in OURS}
        result["speed"] = measure_speed(folder, own | contenders, options)
        lines += ["", *speed_lines(result["speed"], names)]
        keep(result, out)
        for contender in own.values():
            contender.close()
    if "shares" in parts or "packing" in parts:
        from fastvlm.tokens import Tokenizer

        tokenizer = Tokenizer(str(folder / "tokenizer"), template="chatml")
        families = once(folder / "families", shares.write_families)
    if "shares" in parts:
        if "mosaicml" in names:
            contenders["mosaicml_stratified"] = Contender("mosaicml_stratified", python, scratch=scratch)

        def mixer(contender: Contender):
            def mix(mixture: str, weights: list[float], seed: int):
                import numpy as np

                out = scratch / f"{contender.name}.npy"
                where = str(folder / "mix" / contender.name.partition("_")[0])
                ask = {"do": "mix", "folder": where, "weights": weights, "count": shares.COUNT, "seed": seed}
                contender.ask(**ask, out=str(out))
                return np.load(out)

            return mix

        mixers = {name: mixer(contender) for name, contender in contenders.items()}
        seeds = min(3, int(options["rounds"]))
        result["shares"] = shares.measure_shares(families, tokenizer, mixers, seeds=seeds, log=log)
        lines += ["", *share_lines(result["shares"])]
    if "packing" in parts:
        result["packing"] = shares.measure_packing(families, tokenizer)
        lines += ["", *packing_lines(result["packing"])]
    for contender in contenders.values():
        contender.close()
    result["seconds"] = round(time.time() - begun)
    print("\n".join(lines))
    keep(result, out)
    log(f"written to {out} after {result['seconds']} s")


if __name__ == "__main__":
    try:
        main()
    except shares.Refused as error:
        sys.exit(str(error))
