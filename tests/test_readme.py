"""The README's example, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    text = README.read_text("utf-8")
    example = re.search(r"```python\n(from ia3 import FewShotClassifier.*?)```", text, re.S)
    printed = re.search(r"prints `(.*?)`", text)
    assert example is not None
    assert printed is not None
    done = subprocess.run(
        [sys.executable, "-c", example[1]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == printed[1]
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
