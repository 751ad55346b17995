import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "data"), str(HERE.parent / "models")]

from served import LIMITS, ORIGIN, Pictures, Server  # noqa: E402
from tiny_vlm import IMAGE_SIZE, build_model  # noqa: E402
from tiny_world import train_tokenizer  # noqa: E402

from fastvlm.inference.engine import Engine  # noqa: E402

torch.set_num_threads(1)  # products this small only wait for a second thread, for seconds where cores are shared


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer):
    return build_model(tiny_tokenizer)


@pytest.fixture(scope="session")
def pictures():
    """A web server with images, and what it was asked for."""
    running = Pictures()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def server(commands, tiny_tokenizer, pictures):
    from_elsewhere = (
        f"allow_hosts=localhost:{pictures.port}",
        "allow_private=true",
        f"origins={ORIGIN} , https://b.example",
    )
    running = Server(commands, tiny_tokenizer.path, *LIMITS, *from_elsewhere)
    yield running
    running.stop()


@pytest.fixture
def engine(tiny_model, tiny_tokenizer):
    return Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=12)
