"""What "Layer-Wise Quantization" (arXiv 2406.17415) claims, measured on one model.

    python evals/layerwise.py MODEL_FOLDER --out results/layerwise.json

Only the Linear weights of the decoder blocks are quantised, and every width uses the same group size, so that rows with
equal average bits have equal bytes. Embeddings, head and norms stay as they are in every row. A block that is dropped is
replaced by the identity and its weights count as gone. Three tables:

1. widths and orders: the original; all blocks at 8, 4, 3 bits; 4 and 2 bits mixed to averages of 3.5 and 3.0, the order
   given by LIM, LIM with one vector a text, ZD, reversed LIM, and three random orders;
2. lowering bits against dropping blocks: the n least important blocks by LIM;
3. how many blocks can be lowered before quality breaks, by LIM and by three random orders.

Table 1 uses all windows of held-out text, tables 2 and 3 every few of them. Standard errors are over windows; differences
are paired by window. Written are OUT (a JSON list of rows, with the keys of effllm's Result) and OUT with the suffix .md.
Finished windows are kept in a folder beside OUT: a killed run goes on with the
same command, and the same command given several times at once shares the work.

Each block is encoded once a width, by `effllm.compress`; a row then puts the decoded weights into the dense model. On the
first window one row is checked against the model that `effllm.compress` makes of the same plan.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from layerwise_rows import PAIRS, Variant, mixed, variants
from layerwise_tables import markdown, orders, sweep_of, within
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import effllm
from effllm.checkpoint import Checkpoint, resolve
from effllm.data.inputs import BATCH
from effllm.data.text import EVALUATION_TEXTS, token_windows
from effllm.layers.placing import codec_modules
from effllm.measure.evaluate import Comparison, compare, standard_error
from effllm.measure.result import Result, describe_run
from effllm.method import Codec
from effllm.plans import Calibration
from effllm.resume import RunJournal
from effllm.source import LiveModel

CHUNK = 8  # tokens whose distributions over the vocabulary are held in fp32 at once
Values = tuple[float, float, float, float]  # means over one window, as in Comparison: nll, baseline nll, KL, agreement


class Bench:
    """The dense model, its blocks decoded from every width, and the scores: puts any variant into the model."""

    def __init__(
        self, model: PreTrainedModel, rows: list[Variant], calibration: Tensor, group: int, journal: RunJournal
    ):
        self.model, self.calibration = model, calibration
        self.source = LiveModel(model)
        self.sites = {site.name: site for site in self.source.sites if site.role == "block"}
        self.plain = sum(site.size for site in self.sites.values()) * model.dtype.itemsize
        tied = {f"{name}.weight" for site in self.source.sites for name in site.tied}
        self.total = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name not in tied)
        scores = list(dict.fromkeys(score for row in rows if row.plan is not None for score in row.plan.scores()))
        self.ranks = {}
        with journal.claim("scores"):
            for score in scores:
                if journal.find("score", score.label()) is None:
                    values = score.score(self.source, [{"input_ids": part} for part in calibration.split(BATCH)])
                    journal.add("score", score.label(), values=values)
                self.ranks[score] = (journal.find("score", score.label()) or {})["values"]
        lim = next(values for score, values in self.ranks.items() if score.settings() == {"reduce": "token"})
        self.least = sorted(self.source.blocks, key=lambda block: (-lim[block], block))[::-1]  # ties as in Plan.assign
        self.hands_on_tuple = self._hands_on_tuple()
        self.decoded: dict[Codec, dict[str, Tensor]] = {}
        for bits in sorted({bits for row in rows for bits in row.pair or ()}):
            packed = effllm.compress(copy.deepcopy(model), mixed("lim", bits, bits, 0, 1, group))
            layers = codec_modules(packed)
            self.decoded[next(iter(layers.values())).codec] = {name: layer.decoded() for name, layer in layers.items()}

    def assigned(self, variant: Variant) -> dict[str, Codec]:
        """Site -> codec, as `effllm.compress` would choose."""
        return {} if variant.plan is None else variant.plan.assign(self.source.sites, self.ranks)

    def nbytes(self, variant: Variant) -> int:
        """Stored bytes of the blocks' Linears: codes, scales and zero points counted, dropped blocks gone."""
        assigned, gone = self.assigned(variant), self.least[: variant.dropped]
        kept = [site for site in self.sites.values() if site.block not in gone]
        plain = self.model.dtype.itemsize
        return sum(assigned[s.name].stored_bytes(s.shape) if s.name in assigned else s.size * plain for s in kept)

    def _hands_on_tuple(self) -> bool:
        """Whether a block returns a tuple."""
        seen: list[Any] = []
        hook = self.model.get_submodule(self.least[0]).register_forward_hook(lambda *call: seen.append(call[2]))
        with torch.no_grad():
            self.model(input_ids=self.calibration[:1, :8], use_cache=False)
        hook.remove()
        return isinstance(seen[0], tuple)

    @contextlib.contextmanager
    def applied(self, variant: Variant) -> Iterator[PreTrainedModel]:
        """The model with the variant's weights in place of its own, restored after."""

        def identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states, None, None) if self.hands_on_tuple else hidden_states

        assigned = self.assigned(variant)
        modules = {name: self.model.get_submodule(name) for name in assigned}
        gone = [self.model.get_submodule(name) for name in self.least[: variant.dropped]]
        own = {name: module.weight.data for name, module in modules.items()}
        try:
            for name, module in modules.items():
                module.weight.data = self.decoded[assigned[name]][name]
            for block in gone:
                block.forward = identity
            yield self.model
        finally:
            for name, module in modules.items():
                module.weight.data = own[name]
            for block in gone:
                del block.forward


class Window:
    """One window of text under the original model, kept for all variants; the figures are those of `compare`."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: Tensor):
        self.ids, self.targets = tokens.unsqueeze(0), tokens[1:].unsqueeze(1)
        logits = model(input_ids=self.ids, use_cache=False).logits[0, :-1]
        self.p = torch.empty(logits.shape)
        self.top = torch.empty(len(logits), dtype=torch.int64)
        nll = negative_entropy = 0.0
        for start in range(0, len(logits), CHUNK):
            part = slice(start, start + CHUNK)
            log_p = logits[part].float().log_softmax(-1)
            torch.exp(log_p, out=self.p[part])
            self.top[part] = log_p.argmax(-1)
            negative_entropy += float((self.p[part] * log_p).sum(-1).double().sum())
            nll -= float(log_p.gather(1, self.targets[part]).double().sum())
        self.nll, self.negative_entropy = nll / len(logits), negative_entropy / len(logits)

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> Values:
        """Mean nll, the original's nll, KL from the original, and top-1 agreement with it."""
        logits = model(input_ids=self.ids, use_cache=False).logits[0, :-1]
        nll = cross = same = 0.0
        for start in range(0, len(logits), CHUNK):
            part = slice(start, start + CHUNK)
            q = logits[part].float()
            total = q.logsumexp(-1)
            nll += float((total - q.gather(1, self.targets[part]).squeeze(1)).double().sum())
            cross += float((total - (self.p[part] * q).sum(-1)).double().sum())
            same += sum(_is_first_maximum(row, int(top)) for row, top in zip(q, self.top[part], strict=True))
        count = len(logits)
        return nll / count, self.nll, self.negative_entropy + cross / count, same / count


def _is_first_maximum(row: Tensor, index: int) -> bool:
    """`row.argmax() == index`, at a fraction of its cost; bf16 logits often tie."""
    largest = row.amax()
    return bool(row[index] == largest) and not bool((row[:index] == largest).any())


def measure(bench: Bench, rows: list[Variant], tokens: Tensor) -> dict[str, Values]:
    """The figures of all `rows` on one window; rows that come to the same model are run once."""
    window = Window(bench.model, tokens)
    found: dict[str, Values] = {}
    known: dict[Any, Values] = {}
    for row in rows:
        key = (frozenset(bench.assigned(row).items()), row.dropped)
        if row.plan is None:
            known[key] = (window.nll, window.nll, 0.0, 1.0)
        elif key not in known:
            with bench.applied(row) as changed:
                known[key] = window.measure(changed)
        found[row.name] = known[key]
    return found


def check(bench: Bench, variant: Variant, window: Tensor, values: Values) -> dict[str, Any]:
    """One variant against `effllm.compress` of the same plan, and its figures against `effllm.measure`'s.

    Raises:
        AssertionError: codecs or decoded weights differ, or a figure by more than rounding (packed and dense layers split
            their sums differently, so bf16 logits need not be equal bit for bit).
    """
    assert variant.plan is not None
    packed: Any = effllm.compress(copy.deepcopy(bench.model), variant.plan, calibration=bench.calibration)
    codecs = {name: layer.codec for name, layer in codec_modules(packed).items()}
    assert codecs == bench.assigned(variant), "effllm.compress chose other codecs than this table"
    for name, layer in codec_modules(packed).items():
        assert torch.equal(layer.decoded(), bench.decoded[layer.codec][name]), (
            f"{name}: other weights than effllm.compress"
        )
    ids = window.unsqueeze(0)
    with torch.no_grad(), bench.applied(variant) as dense:
        difference = dense(input_ids=ids, use_cache=False).logits - packed(input_ids=ids, use_cache=False).logits
    figures = compare(packed, window.unsqueeze(0), baseline=bench.model)
    assert figures.kl is not None
    theirs, ours = (float(figures.nll[0]), float(figures.kl[0])), (values[0], values[2])
    assert max(abs(one - other) for one, other in zip(theirs, ours, strict=True)) < 0.02, (
        f"{variant.name}: {theirs}, not {ours}"
    )
    largest, mean = float(difference.abs().max()), float(difference.abs().float().mean())
    return {"largest_logit_difference": largest, "mean": mean, "nll_kl_packed": theirs, "nll_kl_here": ours}


Table = dict[str, Tensor]  # variant name -> [windows, 4], the columns of Values


def table_of(done: dict[int, dict[str, Values]], windows: list[int]) -> Table:
    """The values of the variants that were measured on all of `windows`."""
    names = [name for name in done[windows[0]] if all(name in done[window] for window in windows)]
    return {name: torch.tensor([done[w][name] for w in windows], dtype=torch.float64) for name in names}


def with_random_means(table: Table, rows: list[Variant]) -> list[Variant]:
    """`rows` and, after each set of random orders, the mean over its seeds, window by window, put into `table`."""
    found: list[Variant] = []
    for row in rows:
        found.append(row)
        same = [o for o in rows if o.order.startswith("random") and (o.pair, o.lowered) == (row.pair, row.lowered)]
        if same and row is same[-1]:
            name = row.name.rpartition(": ")[0] + f": random, mean of {len(same)}"
            table[name] = torch.stack([table[other.name] for other in same]).mean(0)
            found.append(Variant(name, row.plan, 0, "random", row.pair, row.lowered, row.tables))
    return found


def paired(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean and standard error of a difference, paired by window."""
    return float((one - other).mean()), standard_error(one - other)


def describe(
    bench: Bench, row: Variant, table: Table, rows: list[Variant], facts: dict[str, Any], tokens: int
) -> dict[str, Any]:
    """One row as JSON values: a Result, and what this table adds to it."""
    values, nbytes = table[row.name], bench.nbytes(row)
    nll, baseline_nll, kl, agreement = values.unbind(1)
    result = Result.model_validate(
        {
            **facts,
            **Comparison(nll, baseline_nll, kl, agreement, len(nll) * tokens).figures(),
            "plan": {} if row.plan is None else row.plan.model_dump(mode="json", exclude_defaults=True),
            "stored_bytes": bench.total - bench.plain + nbytes,
            "bits_per_weight": 8 * nbytes / sum(site.size for site in bench.sites.values()),
        }
    ).model_dump(mode="json", exclude_none=True)
    extra: dict[str, Any] = {"variant": row.name, "order": row.order, "high_low_bits": row.pair, "lowered": row.lowered}
    extra |= {"dropped": row.dropped, "block_bytes": nbytes, "windows": len(nll)}
    extra["nll_minus_baseline"], extra["nll_minus_baseline_stderr"] = paired(nll, baseline_nll)
    by_lim = {(other.pair, other.lowered): other.name for other in rows if other.order == "lim"}
    pairs = {"lim": (row.pair, row.lowered) if row.order != "lim" else None}
    pairs |= {f"{high}_{low}": ((high, low), row.dropped) for high, low in PAIRS if row.pair == (high, high)}
    for what, key in pairs.items():
        name = "lim" if what == "lim" else "lowered"
        if key in by_lim and by_lim[key] in table:
            for figure, column in (("nll", 0), ("kl", 2)):
                difference = paired(values[:, column], table[by_lim[key]][:, column])
                extra[f"{figure}_minus_{name}"], extra[f"{figure}_minus_{name}_stderr"] = difference
    return extra | result


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Measures, or goes on measuring, and returns rows and Markdown."""
    began = time.monotonic()
    folder = resolve(arguments.model)
    settings = {} if arguments.dtype is None else {"dtype": getattr(torch, arguments.dtype)}
    model = effllm.load(folder, **settings).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = arguments.text or ["default"]
    windows = token_windows(tokenizer, text, arguments.samples, arguments.sequence_length, packaged=EVALUATION_TEXTS)
    learn = Calibration(sources=["books"])
    size = (2, arguments.sequence_length) if arguments.quick else (learn.samples, learn.sequence_length)
    calibration = token_windows(tokenizer, learn.sources, *size)
    blocks = len(LiveModel(model).blocks)
    rows = variants(blocks, arguments.group_size, arguments.quick)
    _say(
        f"{blocks} blocks, {len(rows)} variants, {len(windows)} windows of {windows.shape[1]} tokens; scores and widths"
    )
    facts = describe_run(folder, model=arguments.name or folder.name, base_model=None, seconds=0.0)
    facts |= {"command": "eval", "baseline": facts["model"], "text": text, "sequence_length": windows.shape[1]}
    facts |= {"seed": 0, "seconds": None, "process_peak_memory_bytes": None}
    identity = [Checkpoint.open(folder).identity(), windows.tolist(), calibration.tolist(), [row.name for row in rows],
                arguments.group_size, str(model.dtype), facts["versions"], torch.get_num_threads()]  # fmt: skip
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    some = list(range(0, len(windows), max(1, len(windows) // arguments.sweep_samples)))[: arguments.sweep_samples]
    journal = RunJournal(arguments.out.with_suffix(".partial"), key)
    bench = Bench(model, rows, calibration, arguments.group_size, journal)
    _say(f"ready after {time.monotonic() - began:.0f} s")
    for wait in (False, True):
        for index, tokens in enumerate(windows):
            with journal.claim(f"window-{index}", wait) as mine:
                if mine and journal.find("window", str(index)) is None:
                    wanted = [row for row in rows if "main" in row.tables or index in some]
                    values = measure(bench, wanted, tokens)
                    journal.add("window", str(index), values=values)
                    if index == 0:
                        one = next(row for row in rows if row.order == "lim" and "main" in row.tables)
                        _say(f"against effllm.compress, {one.name}: {check(bench, one, tokens, values[one.name])}")
                    _say(
                        f"window {index + 1} of {len(windows)}, {len(wanted)} variants, {time.monotonic() - began:.0f} s"
                    )
    done = {index: (journal.find("window", str(index)) or {})["values"] for index in range(len(windows))}
    found: list[dict[str, Any]] = []
    for table, which in (("main", list(range(len(windows)))), ("drop", some), ("sweep", some)):
        measured = table_of(done, which)
        members = [row for row in rows if table in row.tables]
        if table == "drop":
            members.sort(key=lambda row: (-(row.pair or (0,))[0], row.lowered or row.dropped, row.dropped))
        members = with_random_means(measured, members)
        described = [describe(bench, row, measured, rows, facts, windows.shape[1] - 1) for row in members]
        found += [{"table": table, **json.loads(json.dumps(row))} for row in described]
    swept = [row for row in found if row["table"] == "sweep"]
    for high, low in PAIRS:
        for order in [*orders(), "random"]:
            top, *inner, _ = sweep_of(swept, high, low, order)
            for measured_row in inner:
                measured_row["within_limits"] = within(measured_row, top)
    shape = f"{len(windows)} windows of {windows.shape[1]} tokens of {', '.join(text)}"
    note = (
        f"{facts['model']}, {blocks} blocks, {str(model.dtype).removeprefix('torch.')} arithmetic; range search, groups of "
        f"{arguments.group_size}; {shape} (default: the held-out slice in the package), "
        f"{len(windows) * (windows.shape[1] - 1):,} predicted tokens; tables 2 and 3 on {len(some)} of the windows. "
        "Bits a weight: stored bits of the blocks' Linears, scales and zero points counted, over their number in the "
        "original; nothing else is quantised. KL is from the original. Standard errors over windows."
    )
    return found, markdown(found, blocks, note)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, 'demo', an alias or a hub id")
    parser.add_argument("--out", type=Path, default=Path("results/layerwise.json"))
    parser.add_argument("--name", help="the model's name in the results (its folder's)")
    parser.add_argument("--text", action="append", help="held-out text, as in effllm eval; repeatable")
    parser.add_argument("--samples", type=int, help="windows of table 1 (33)")
    parser.add_argument("--sweep-samples", type=int, help="windows of tables 2 and 3 (8)")
    parser.add_argument("--sequence-length", type=int, help="tokens a window (512)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the arithmetic (the checkpoint's)"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="two short windows and few counts: a trial run, no result")
    arguments = parser.parse_args()
    for name, usual, short in (("samples", 33, 2), ("sweep_samples", 8, 1), ("sequence_length", 512, 64)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, short if arguments.quick else usual)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    logging.getLogger("effllm").setLevel(logging.ERROR)  # that embeddings stay as they are is said in the table
    found, tables = run(arguments)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main()
