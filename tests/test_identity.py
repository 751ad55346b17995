"""What decides a result changes its hash, and words about it do not."""

from fastvlm.identity import bare_code

CODE = '''"""A module."""

import os  # for its names


class A:
    """A class.

    Of two paragraphs.
    """

    text = """
# not a comment

"""  # a comment

    def f(self, x):
        # a comment of its own line
        "A method."
        return [
            x,  # the first

            "#",
        ]


def g(): "a docstring on the line of its function"
'''


def hashed(tmp_path, text: str) -> str:
    (tmp_path / "a.py").write_text(text)
    return bare_code(tmp_path / "a.py")


def test_words_leave_the_code_as_it_is(tmp_path):
    code = hashed(tmp_path, CODE)
    told = CODE.replace("A module.", "Another.").replace("Of two paragraphs.", "Of\n    more.")
    told = told.replace("the first", "x").replace("        # a comment of its own line\n", "")
    told = told.replace("\n\nclass", "\n\n# c\n\nclass")
    assert told != CODE and hashed(tmp_path, told) == code
    wordless = {}
    exec(compile(code, "a.py", "exec"), wordless)
    assert wordless["A"]().f(1) == [1, "#"] and wordless["A"].text == "\n# not a comment\n\n"


def test_every_other_change_is_seen(tmp_path):
    code = hashed(tmp_path, CODE)
    for old, new in (
        ("x,", "x, x,"),
        ('"#"', '"##"'),
        ("# not a comment", "# another text"),
        ('comment\n\n"""', 'comment\n"""'),
        ("def g", "def h"),
        ("import os", "import sys"),
    ):
        assert old in CODE and hashed(tmp_path, CODE.replace(old, new, 1)) != code, old
