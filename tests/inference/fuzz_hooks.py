"""What schemathesis cannot draw by itself: pictures. And answers stay short."""

import base64
from io import BytesIO

import schemathesis
from PIL import Image


def draw(seed: int) -> str:
    file = BytesIO()
    Image.new("RGB", (8 + 9 * seed, 40 - 7 * seed), (50 * seed, 200, 0)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


PICTURES = [draw(seed) for seed in range(5)]


@schemathesis.hook
def map_body(context, body):
    """Of the addresses that are drawn as text every second one becomes a picture, and long answers short ones."""
    if not isinstance(body, dict):
        return body
    for key in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(key), int) and body[key] > 3:
            body[key] = 1 + body[key] % 3
    for message in body.get("messages") if isinstance(body.get("messages"), list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            image = part.get("image_url") if isinstance(part, dict) else None
            if isinstance(image, dict) and isinstance(image.get("url"), str) and len(image["url"]) % 2 == 0:
                image["url"] = PICTURES[len(image["url"]) % len(PICTURES)]
    return body
