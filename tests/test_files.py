import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm.files import replacing, write_whole

ROOT = Path(__file__).resolve().parents[1]


def test_a_reader_sees_the_old_file_or_the_new_one_and_a_failure_leaves_the_old_alone(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old ä")
    with pytest.raises(OSError, match="full"), replacing(path) as part:
        part.write_text("half")
        assert path.read_text(encoding="utf-8") == "old ä"
        raise OSError("the disk is full")
    assert path.read_text(encoding="utf-8") == "old ä" and os.listdir(tmp_path) == ["a.json"]
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text(encoding="utf-8") == "old ä"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_two_processes_that_write_one_file_never_share_a_part(tmp_path):
    code = "import sys; from fastvlm.files import replacing\nwith replacing(sys.argv[1]) as part: print(part)"
    code += "; part.write_text('x')"
    command = [sys.executable, "-c", code, str(tmp_path / "a.json")]
    parts = {subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(parts) == 2 and os.listdir(tmp_path) == ["a.json"]
