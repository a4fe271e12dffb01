"""Text as batches of tokens, for calibration and for measuring."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from effllm.data import spread
from effllm.errors import EffllmError, UsageError

DEFAULT, SELF = "default", "self"
CALIBRATION_TEXTS = {"books": "calibration.txt", "code": "code.txt"}
"""What the package ships to calibrate on, by the names of sources; `default` is both."""
EVALUATION_TEXTS = {"default": "evaluation.txt"}
"""And to measure on: a held-out book."""
Document = str | list[dict[str, Any]]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path))
    except Exception as error:  # what a damaged file or config makes of transformers and tokenizers has no common class
        reason = " ".join(str(error).split())[:200]
        raise EffllmError(f"{path} has no usable tokenizer ({reason}); text needs one: download it again") from error


def packaged_text(name: str) -> Path:
    """A text that the package ships."""
    return Path(str(files("effllm").joinpath("demo", name)))


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    samples: int | None,
    length: int,
    packaged: Mapping[str, str] = CALIBRATION_TEXTS,
    own: Callable[[int, int], Tensor] | None = None,
) -> Tensor:
    """Windows of text as token ids `[samples, length]` (int64), spread evenly over the text of each source.

    A source is a text in the package (one of `packaged`: `books`, `code`, and `default` for both in turns), `self` (what the
    model writes: `own(samples, length)`), a .txt, .json or .jsonl file, a folder of them, or a `datasets` id as
    `id:config:split:column`; `@weight` at its end sets its share of the samples.

    Each window begins with the tokenizer's begin-of-text token, if it has one. Messages go through the tokenizer's chat
    template. Windows never overlap: where the text is short, fewer come back. `samples` None takes the whole text.

    Raises:
        UsageError: a source that is no file, folder or dataset id, or a bad weight.
        EffllmError: text too short for one window, or a dataset that cannot be read.
    """
    weighted = [split_weight(source) for source in sources]
    total = sum(weight for _, weight in weighted)
    windows = []
    for source, weight in weighted:
        count = None if samples is None else max(1, round(samples * weight / total))
        if source == SELF:
            if own is None or count is None:
                raise UsageError("text of the model's own ('self') is for calibration of a model folder")
            windows.append(own(count, length))
        else:
            texts: Sequence[str | Path] = _in_package(source, packaged) or [source]
            windows.append(_in_turns(tokenizer, texts, count, length))
    return torch.cat(windows)


def _in_package(source: str, packaged: Mapping[str, str]) -> list[Path]:
    """The files of the package that a source names, all of them by `default`; a file or folder of another's name wins."""
    if source == DEFAULT:
        return [packaged_text(name) for name in packaged.values()]
    return [packaged_text(packaged[source])] if source in packaged and not Path(source).exists() else []


def _in_turns(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Path], count: int | None, length: int
) -> Tensor:
    """Windows of one text, or of several, one of each after the other."""
    shares = [None if count is None else -(-(count - place) // len(texts)) for place in range(len(texts))]
    found = [
        windows_of(tokenizer, documents(text), share, length, str(text))
        for text, share in zip(texts, shares, strict=True)
        if share != 0
    ]
    most = max(len(windows) for windows in found)
    return torch.stack([windows[turn] for turn in range(most) for windows in found if turn < len(windows)])


def split_weight(source: str) -> tuple[str, float]:
    """A calibration source and its weight, which may stand behind an @."""
    name, at, weight = source.rpartition("@")
    if not at or Path(source).exists():
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        return source, 1.0
    if not 0 < value < math.inf:
        raise UsageError(f"calibration source {source!r}: the weight after @ must be a number above zero")
    return name, value


def text_identity(source: str) -> list[Any]:
    """What tells a changed text from an unchanged one: name, size and modification time of every file of `source`."""
    name = split_weight(source)[0]
    if name == SELF:
        return [source]
    if shipped := _in_package(name, CALIBRATION_TEXTS):
        return [source, *((file.name, file.stat().st_size) for file in shipped)]
    path = Path(name)
    members = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in members]
    return [source, *((n, f.stat().st_size, f.stat().st_mtime_ns) for n, f in zip(names, members, strict=True))]


def windows_of(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Document], samples: int | None, length: int, source: str
) -> Tensor:
    """`token_windows` of the given texts or message lists, joined; `source` names them in errors."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(begin)
    ids: list[int] = []
    for document in texts:
        text = document if isinstance(document, str) else _chat_text(tokenizer, document)
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // body
    if available == 0:
        raise EffllmError(f"{source} has {len(ids)} tokens, fewer than one window of {length}; give more text")
    starts = [window * body for window in spread(available, available if samples is None else samples)]
    return torch.tensor([begin + ids[start : start + body] for start in starts])


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    if tokenizer.chat_template is None:
        raise EffllmError(
            "the text holds chat messages, but the model's tokenizer has no chat template; give plain text"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def documents(source: str | Path) -> Iterator[Document]:
    """The texts or message lists of one source, in a fixed order."""
    path = Path(source)
    if path.is_dir():
        members = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".json", ".jsonl"))
        if not members:
            raise EffllmError(f"{path} holds no .txt, .json or .jsonl file")
        for member in members:
            yield from _file_documents(member)
    elif path.is_file():
        yield from _file_documents(path)
    else:
        yield from _dataset_documents(str(source))


def _file_documents(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            for line in filter(str.strip, text.split("\n")):
                yield _document(json.loads(line), str(path))
        elif path.suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise EffllmError(f"{path} holds no JSON list of texts or of rows with 'text' or 'messages'")
            for row in rows:
                yield _document(row, str(path))
        else:
            yield text
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EffllmError(f"{path} cannot be read as text: {error}") from None


def _document(row: Any, where: str) -> Document:
    value = row.get("messages", row.get("text")) if isinstance(row, dict) else row
    if not isinstance(value, (str, list)):
        raise EffllmError(f"{where}: a row needs 'text' or 'messages', not {str(row)[:80]!r}")
    return value


def _dataset_documents(source: str) -> Iterator[Document]:
    if source.startswith((".", "/")) or source.partition(":")[0].endswith((".txt", ".json", ".jsonl")):
        raise UsageError(f"no text file or folder {source!r}")
    rows, column = load_dataset(source, streaming=True)
    import datasets

    try:
        for row in rows:
            yield _document({"text": row[column]} if column else row, source)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error) from None


def load_dataset(source: str, streaming: bool) -> tuple[Any, str]:
    """The rows of a `datasets` id written as `id:config:split:column`, and the column ("" where none is named)."""
    name, config, split, column = (source.split(":") + [""] * 3)[:4]
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{source!r} is no file or folder; to read it as a datasets id: pip install 'effllm[datasets]'"
        ) from None
    try:
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming), column
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error) from None


def _unreadable(source: str, error: Exception) -> EffllmError:
    return EffllmError(f"cannot read dataset {source!r}: {str(error).splitlines()[0]}")
