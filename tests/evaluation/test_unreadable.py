"""What happens to a question whose image cannot be read."""

from tiny_vlm import IMAGE_SIZE
from tiny_world import draw_png

from fastvlm.evaluation.answering import Asked, answer_window, keep
from fastvlm.evaluation.prompts import Prompt
from fastvlm.inference.engine import Engine


def asked(key: str, image: bytes) -> Asked:
    content = [{"type": "image"}, {"type": "text", "text": "what is here"}]
    return Asked(key, {"messages": [{"role": "user", "content": content}]}, [image], [key])


def test_an_unreadable_image_is_named_and_leaves_its_neighbours_alone(engine):
    good, other = draw_png(1, (20, 20)), draw_png(2, (20, 20))
    alone = answer_window(engine, [asked("a", good), asked("c", other)], prompt=Prompt(), max_new_tokens=5)
    both = answer_window(
        engine, [asked("a", good), asked("b", b"no image"), asked("c", other)], prompt=Prompt(), max_new_tokens=5
    )
    assert [both[0], both[2]] == alone
    assert both[1]["prediction"] == "" and both[1]["fault"].startswith("image cannot be read: ")


def test_visual_tokens_are_kept_newest_first_within_their_bytes(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    views = [engine.transform(draw_png(i, (20, 20))) for i in range(4)]
    tokens = dict(zip("abcd", engine.encode_images(views)))
    size = tokens["a"].numel() * 4
    cache: dict = {}
    keep(cache, {k: tokens[k] for k in "abc"}, 3 * size)
    keep(cache, {"a": cache["a"], "d": tokens["d"]}, 3 * size)
    assert list(cache) == ["c", "a", "d"]
    assert all(t.untyped_storage().nbytes() == size for t in cache.values())  # no view holds its whole chunk
