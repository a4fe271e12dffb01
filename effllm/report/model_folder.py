"""What a finished folder holds beside weights and config: the original's other files, and a model card."""

from __future__ import annotations

import re
from pathlib import Path

from effllm.checkpoint import INDEX, aliases
from effllm.errors import EffllmError
from effllm.measure.result import Result

COPIED = (".json", ".jsonl", ".txt", ".model", ".jinja", ".md", ".tiktoken")
REWRITTEN = ("config.json", INDEX, "README.md")
LARGEST_FILE = 200_000_000


def other_files(source: Path) -> dict[str, Path]:
    """Name -> file of tokenizer, processor, chat template, generation config, licence and other small text files.

    Raises:
        EffllmError: a link that leaves the model folder (a hub cache's own blobs are fine).
    """
    found = {}
    for file in sorted(source.iterdir()):
        named = file.suffix in COPIED or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if not named or not file.is_file() or file.name in REWRITTEN or file.name.endswith(".index.json"):
            continue
        real, home = file.resolve(), source.resolve()
        if real.parent != home and real.parent != home.parent.parent / "blobs":
            raise EffllmError(f"{file} is a link to {real}, outside the model folder; replace it by a copy")
        if real.stat().st_size <= LARGEST_FILE:
            found[file.name] = real
    return found


def model_card(name: str | None, source: Path | None, result: Result, address: str = "FOLDER") -> str:
    """`README.md` of a compressed folder: base model, licence, plan and figures.

    Args:
        name: the base model, as it was named: a folder's name, `demo`, an alias or a hub id.
        source: the folder whose own card states the licence.
        result: what was measured.
        address: the folder or hub id that the card's example loads.
    """
    base = aliases().get(name or "", {}).get("hub", name)
    lines = ["---", "library_name: transformers", "tags: [effllm]"]
    if base and base.count("/") == 1:  # the hub refuses what is no hub id
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    lines += [*_licence(source), "---", f"# {name or 'A model'}, compressed by effllm", ""]
    lines += [result.plan.get("description", ""), "", "| | |", "|---|---|"]
    lines += [f"| base model | {base} |"] if base else []
    lines += [
        f"| plan | {result.plan.get('name', 'custom')} |",
        f"| weight files | {result.stored_bytes:,} bytes ({result.stored_bytes / 1e6:.1f} MB) |",
        f"| bits per weight | {result.bits_per_weight:.2f} |",
    ]
    for label, value, error, over in result.figures():
        lines.append(f"| {label} | {value:.4f}{f' +- {error:.4f}' if error else ''} ({over}) |")
    lines += ["", "```python", "import effllm  # registers the format with transformers", ""]
    lines += [f"model = effllm.load('{address}')", "```", ""]
    return "\n".join(lines)


def _licence(source: Path | None) -> list[str]:
    """The lines about the licence in the front matter of a folder's `README.md`."""
    card = source / "README.md" if source else None
    if card is None or not card.is_file():
        return []
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    return re.findall(r"^license(?:_name|_link)?: *[\w.+:/#-]+ *$", front[1], re.M) if front else []
