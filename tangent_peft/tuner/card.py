"""What a saved axis says about itself: the model card's paragraph on how to load it."""

from __future__ import annotations

from pathlib import Path


_MARK = "<!-- tangent-peft -->"

_NOTE = """
{mark}
## Loading this axis

This is a tangent axis (TS-DPO, arXiv 2602.01128) of the `tangent_peft` package. Import the package first: without it
PEFT does not know the type and stops with `KeyError: 'TANGENT'`.

```python
import tangent_peft  # registers the adapter type
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{path}")
```

The model then runs linearized. `model.combine_axes({{"default": 0.5}})` sets the axis weight,
`with model.linearized(False):` evaluates the weights θ₀ + λτ as an ordinary network.
"""


def write_usage_note(directory: Path, subfolder: str | None = None) -> None:
    """Appends the loading instructions to the directory's README.md, once.

    Args:
        directory: where the README is.
        subfolder: where in it the axis is, if not in the directory itself.
    """
    readme = directory / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else "---\nlibrary_name: peft\n---\n"
    if _MARK not in text:
        path = "this-directory" if subfolder is None else f"this-directory/{subfolder}"
        readme.write_text(text + _NOTE.format(mark=_MARK, path=path), encoding="utf-8")
