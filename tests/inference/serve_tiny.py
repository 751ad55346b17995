"""A server of the tiny model in a process of its own: `python serve_tiny.py TOKENIZER PORT key=value...`"""

import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]


def main(tokenizer_path: str, port: str, *settings: str) -> None:
    import torch
    from tiny_vlm import IMAGE_SIZE, build_model

    from fastvlm.inference import connections
    from fastvlm.inference.app import create_app
    from fastvlm.inference.engine import Engine
    from fastvlm.inference.settings import parse_settings
    from fastvlm.tokens import Tokenizer

    torch.set_num_threads(1)
    tokenizer = Tokenizer(tokenizer_path, template="roles")
    stores = {"image_store_bytes": 1 << 20, "prefix_store_bytes": 1 << 22}
    engine = Engine(build_model(tokenizer), tokenizer, image_size=IMAGE_SIZE, **stores)
    decode = engine._decode
    engine._decode = lambda *given: time.sleep(0.005) or decode(*given)  # a step is as slow as a larger model's
    app = create_app(engine, parse_settings(["run=tiny", *settings]))
    connections.run(app, port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
