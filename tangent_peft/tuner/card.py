"""What a saved axis says about itself: the model card's paragraph on how to load it.

`PeftModel.push_to_hub` writes a card of its own over the README.md of what it saved (transformers 5), so the same text
also goes into a file of its own, `LOADING.md`.
"""

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
    """Appends the loading instructions to the directory's README.md, once, and writes them into LOADING.md.

    Args:
        directory: where the README is.
        subfolder: where in it the axis is, if not in the directory itself.
    """
    path = "this-directory" if subfolder is None else f"this-directory/{subfolder}"
    readme, note = directory / "README.md", _NOTE.format(mark=_MARK, path=path)
    text = readme.read_text(encoding="utf-8") if readme.is_file() else "---\nlibrary_name: peft\n---\n"
    if _MARK not in text:
        readme.write_text(text + note, encoding="utf-8")
    (directory / "LOADING.md").write_text(note.lstrip(), encoding="utf-8")
