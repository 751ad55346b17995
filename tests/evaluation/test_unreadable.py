"""What happens to a question whose image cannot be read."""

from tiny_world import draw_png

from fastvlm.evaluation.answering import Asked, answer_window
from fastvlm.evaluation.prompts import Prompt
from fastvlm.inference.memory import ImageStore


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


def test_an_image_asked_about_again_is_not_encoded_again_within_the_bytes_of_the_cache(engine, monkeypatch):
    encode, encoded = engine.encode_images, []
    monkeypatch.setattr(engine, "encode_images", lambda views: encoded.append(len(views)) or encode(views))
    ask = lambda *names: answer_window(
        engine, [asked(n, draw_png(ord(n), (20, 20))) for n in names], prompt=Prompt(), max_new_tokens=3, cache=cache
    )
    cache = ImageStore(3 * 4 * engine.tokens_per_image * engine.model.llm.dim)
    first = ask("a", "b", "c")
    assert ask("a") == first[:1] and encoded == [3]
    ask("d")  # b has not been asked about for longest, and goes
    assert cache.keys() == [b"c", b"a", b"d"] and encoded == [3, 1]
    assert ask("b") == first[1:2] and encoded == [3, 1, 1]
