"""The prices of every option of every site: one sweep over the calibration data, and one pass of probes.

They are kept in a folder: a killed run goes on where it stopped, and the next run of the same model, data and options reads
them. Moments are in memory for one block at a time and never there; what is kept of a site are its token weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effllm.checkpoint.tensors import read_tensors, write_tensors
from effllm.layers.placing import refuse_nonfinite
from effllm.method import Codec
from effllm.price import expected, price, sample_rows
from effllm.price.probe import Weights, probe
from effllm.resume import JOURNAL, RunJournal
from effllm.site import Site
from effllm.source import Batch, Source
from effllm.statistics import DRAWS, TIED, Sums, Sweep, moments, share_experts
from effllm.statistics.sums import state_of, uses_of

PROBED_BITS = 4.0  # stored bits per weight of the option that is probed, or as near as the options come
PROBE_TOKENS = 1024
Options = Mapping[str, tuple[Codec, ...]]
"""Site -> what it may get."""


@dataclass(frozen=True)
class Prices:
    """Expected KL to the model, nats per token (or image)."""

    losses: dict[str, dict[str, float]]
    """Site -> label of a codec -> its price. Sites that the data never reach have none."""
    probes: dict[str, tuple[float, float]]
    """Block, or site outside the blocks -> the predicted and the measured KL of its probe."""
    labels: int
    """Drawn labels that the sums stand for."""
    folder: Path

    def reached(self, site: Site) -> bool:
        """Whether the calibration data came by."""
        return (self.folder / f"{site.name}.safetensors").exists()

    def corrected(self, site: Site, codec: Codec) -> float:
        """The price of a codec at a site, scaled by what the probe of its block has shown."""
        predicted, measured = self.probes.get(site.block or site.name, (1.0, 1.0))
        factor = measured / predicted if predicted > 0 and measured > 0 else 1.0
        return self.losses[site.name][codec.label()] * factor


def collect_prices(
    source: Source, options: Options, batches: Sequence[Batch], folder: Path, key: str, seed: int = 0
) -> Prices:
    """Sweeps and probes, or reads what an earlier call with the same `key` found in `folder`.

    Raises:
        UsageError, EffllmError: see `Sweep.run`; a weight holds NaN or inf.
    """
    journal = RunJournal(folder, key)
    with journal.claim("prices"):
        spool = folder / "spool"
        if not _covers(journal, options):
            journal.restart()
        if TIED not in journal.all("gate"):
            sweep = Sweep(source, batches, spool, seed)
            for gate, sums in sweep.run(list(journal.all("gate"))):
                members = [site for site in source.sites if site.block == gate]
                share_experts(sums, members)
                losses, predicted = _price_gate(source, options, sums, sweep.tokens * DRAWS, spool)
                _keep(sums, {site.name for site in source.sites if site.block is None}, folder)
                journal.add("gate", gate, losses=losses, predicted=predicted, labels=sweep.tokens * DRAWS)
        if journal.find("probes", "all") is None:
            journal.add("probes", "all", kl=_probe(source, batches, journal, spool))
        shutil.rmtree(spool, ignore_errors=True)
        return _read(journal)


def cached_prices(folder: Path, key: str) -> Prices | None:
    """What `collect_prices` has found in `folder`, where it has finished."""
    if not (folder / JOURNAL).exists():
        return None
    journal = RunJournal(folder, key)
    return _read(journal) if journal.find("probes", "all") else None


def _read(journal: RunJournal) -> Prices:
    gates = list(journal.all("gate").values())
    measured = journal.all("probes")["all"]["kl"]
    predicted: dict[str, float] = {}
    for gate in gates:
        for unit, loss in gate["predicted"].items():
            predicted[unit] = predicted.get(unit, 0.0) + loss
    return Prices(
        {site: losses for gate in gates for site, losses in gate["losses"].items()},
        {unit: (predicted[unit], kl) for unit, kl in measured.items()},
        gates[-1]["labels"],
        journal.folder,
    )


def _covers(journal: RunJournal, options: Options) -> bool:
    """Whether what is recorded so far has a price for all options of the sites that it knows."""
    known = {site: prices for gate in journal.all("gate").values() for site, prices in gate["losses"].items()}
    reached = [site for site in options if (journal.folder / f"{site}.safetensors").exists()]
    return all(codec.label() in known.get(site, {}) for site in reached for codec in options[site])


def _price_gate(
    source: Source, options: Options, sums: dict[str, list[Sums]], labels: int, spool: Path
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Site -> the prices of its options; and what its probe is predicted to cost, by unit. The probe's weights are kept.

    The probe is rounded to nearest, which takes no factorisation of whole matrices: what it tells is how far the metric is
    from the truth in this block, and that depends little on where an error comes from.
    """
    losses: dict[str, dict[str, float]] = {}
    predicted: dict[str, float] = {}
    changed: Weights = {}
    for site in source.sites:
        found = moments(sums[site.name], labels) if site.name in sums and site.name in options else None
        if found is None:
            continue
        weight = site.matrix(source.model)
        refuse_nonfinite(site.parameter, weight)
        rows = index, _ = sample_rows(weight, found)
        priced = price(options[site.name], weight, found, rows)
        losses[site.name] = {codec.label(): loss for codec, loss in zip(options[site.name], priced, strict=True)}
        codec = min(options[site.name], key=lambda one: abs(8 * one.stored_bytes(site.shape) / site.size - PROBED_BITS))
        decoded = codec.decode(codec.encode(weight), site.shape).to(weight.dtype)
        unit = site.block or site.name
        predicted[unit] = predicted.get(unit, 0.0) + expected(
            decoded[index].float() - weight[index].float(), found, rows
        )
        if site.parameter not in changed:
            _spool_probe(spool, changed)
            changed = {site.parameter: source.model.get_parameter(site.parameter).detach().clone()}
        site.write(decoded, changed[site.parameter], source.model)
        if site.block is not None:
            for use in sums[site.name]:
                use.A = use.A if use.is_lookup else None  # as large as a matrix: all that is kept of it is its price
    _spool_probe(spool, changed)
    return losses, predicted


def _spool_probe(spool: Path, changed: Weights) -> None:
    for name, tensor in changed.items():
        write_tensors(spool / f"probe-{name}.safetensors", {name: tensor})


def _keep(sums: dict[str, list[Sums]], outside: set[str], folder: Path) -> None:
    """Token weights; of the few sites outside the blocks the moments, for a second forward does not compute the head."""
    for name, uses in sums.items():
        write_tensors(folder / f"{name}.safetensors", state_of(uses, whole=name in outside))


def kept_sums(name: str, columns: int, folder: Path) -> list[Sums]:
    """What the sweep has kept of a weight of so many columns: its uses, of a look-up with the moments, of others with the
    token weights. Or of the output of a block, which has no columns."""
    return uses_of(columns, read_tensors(folder / f"{name}.safetensors"))


def _probe(source: Source, batches: Sequence[Batch], journal: RunJournal, spool: Path) -> dict[str, float]:
    units = {unit: unit for gate in journal.all("gate").values() for unit in gate["predicted"]}

    def changed(unit: str) -> Weights:
        names = {site.parameter: spool / f"probe-{site.parameter}.safetensors" for site in source.sites
                 if unit in (site.block, site.name)}  # fmt: skip
        return {n: read_tensors(file, source.device)[n] for n, file in names.items() if file.exists()}

    return probe(source, _first(batches, PROBE_TOKENS), units, changed)


def _first(batches: Sequence[Batch], positions: int) -> list[Batch]:
    """The first inputs, as many as have about so many positions between them; of anything but tokens, 64. A batch whose
    inputs cannot be told apart (patches of several images in one tensor) is taken whole."""
    name = next((key for key in batches[0] if key == "input_ids"), next(iter(batches[0])))
    length = batches[0][name].shape[1] if name == "input_ids" else positions // 64
    count = max(1, positions // length)
    found: list[Batch] = []
    for batch in batches:
        left = count - sum(len(one[name]) for one in found)
        if left > 0:
            apart = all(len(tensor) == len(batch[name]) for tensor in batch.values())
            found.append({key: tensor[:left] for key, tensor in batch.items()} if apart else batch)
    return found
