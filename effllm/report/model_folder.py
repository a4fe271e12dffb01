"""What a finished folder holds beside weights and config: the original's other files, and a model card."""

from __future__ import annotations

import re
from pathlib import Path

from effllm.checkpoint import INDEX
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


def model_card(name: str, source: Path, result: Result) -> str:
    """`README.md` of a compressed folder: base model, licence, plan and figures."""
    card = source / "README.md"
    front = (
        re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
        if card.is_file()
        else None
    )
    licence = re.search(r"^license: *([\w.+-]+) *$", front[1], re.M) if front else None
    lines = ["---", f"base_model: {name}", "library_name: transformers", "tags: [effllm]"]
    lines += [f"license: {licence[1]}"] if licence else []
    lines += ["---", f"# {name}, compressed by effllm", "", result.plan.get("description", ""), ""]
    lines += ["| | |", "|---|---|", f"| plan | {result.plan.get('name', 'custom')} |"]
    lines += [
        f"| weight files | {result.stored_bytes / 1e6:.1f} MB |",
        f"| bits per weight | {result.bits_per_weight:.2f} |",
    ]
    for label, value, error, count in (
        ("KL to the original, nats per token", result.kl, result.kl_stderr, result.kl_tokens),
        ("perplexity", result.perplexity, result.perplexity_stderr, result.perplexity_tokens),
        ("perplexity of the original", result.baseline_perplexity, None, result.perplexity_tokens),
        ("top-1 agreement with the original", result.top1_agreement, result.top1_agreement_stderr, result.kl_tokens),
    ):
        if value is not None:
            lines.append(f"| {label} | {value:.4f}{f' +- {error:.4f}' if error else ''} ({count} tokens) |")
    lines += ["", "```python", "import effllm  # registers the format with transformers", ""]
    lines += ["model = effllm.load('FOLDER')", "```", ""]
    return "\n".join(lines)
