"""Plans: which method acts where. YAML on disk, the same objects in Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from effllm.budget import Budget
from effllm.errors import UsageError, nearest
from effllm.method import Codec, Edit, Score
from effllm.registry import CodecField, as_spec, from_spec, method_class, validated
from effllm.site import Site, examples, select

Effort = Literal["fast", "normal", "best"]
BUDGET = "budget"  # the preset that a budget without a plan means
LARGEST_PLAN = 1_000_000


def _budget(text: str) -> str:
    Budget.parse(text)
    return text


def _memory(text: str) -> str:
    if Budget.parse(text).unit != "bytes":
        raise ValueError(f"memory to run in is written as 3GB or 800MB, not {text!r}")
    return text


def _choice(value: Any) -> str | Codec:
    """A codec with its settings, or the name of one, which stands for its whole grid."""
    if isinstance(value, str) and ":" not in value:
        method_class(value, Codec)
        return value
    return from_spec(value, Codec)  # type: ignore[no-any-return]


EditField = Annotated[Edit, BeforeValidator(lambda value: from_spec(value, Edit)), as_spec]
ChoiceField = Annotated[
    str | Codec,
    BeforeValidator(_choice),
    PlainSerializer(lambda choice: choice if isinstance(choice, str) else {choice.name(): choice.settings()}),
]
BudgetField = Annotated[str, AfterValidator(_budget)]
MemoryField = Annotated[str, AfterValidator(_memory)]
ScoreField = Annotated[Score, BeforeValidator(lambda value: from_spec(value, Score)), as_spec]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """The data that methods learn from."""

    sources: list[str] = Field(default=["default"], min_length=1)
    """Texts in the package (`books`, `code`, or `default`: both), `self` (what the model writes), files, folders, or
    `datasets` ids; each may end in `@weight`."""
    samples: int = Field(default=64, ge=1)
    sequence_length: int = Field(default=512, ge=8)


class Step(_Strict):
    """What happens to some sites: one codec for all (`use`), or two, given out by an ordering of the blocks.

    Or several, among which the allocator chooses one a site within the plan's budget (`choose`): codecs with settings, or
    names of codecs, each of which stands for all options that it has for a site. Or, without sites, an edit of the whole
    model: `apply`.

    `sites` are globs on module paths, or the words `blocks` (weights inside the repeated blocks), `embeddings` and
    `head`. With `order`, the most important blocks get `high` and the others `low`, with as many blocks at `high` as
    keep the mean width at or below `average_bits` (scales and zero points not counted).
    """

    sites: list[str] = []
    apply: EditField | None = None
    use: CodecField | None = None
    choose: list[ChoiceField] = []
    order: ScoreField | None = None
    high: CodecField | None = None
    low: CodecField | None = None
    average_bits: float | None = Field(default=None, ge=2, le=8)

    @model_validator(mode="after")
    def _one_form(self) -> Step:
        ordered = [self.order, self.high, self.low, self.average_bits]
        if self.apply is not None:
            if self.sites or self.use is not None or self.choose or ordered.count(None) < 4:
                raise ValueError("'apply' edits the whole model: such a step has no other key")
            return self
        if not self.sites:
            raise ValueError("a step needs 'sites': globs on module paths, or blocks, embeddings, head")
        if (self.use is not None) + bool(self.choose) + (ordered.count(None) < 4) != 1:
            raise ValueError(
                "a step has either 'use', or 'choose', or all of 'order', 'high', 'low' and 'average_bits'"
            )
        if ordered.count(None) < 4:
            if None in ordered:
                raise ValueError("a step with 'order' also needs 'high', 'low' and 'average_bits'")
            low, high = (getattr(codec, "bits", None) for codec in (self.low, self.high))
            if low is None or high is None or not low < high:
                raise ValueError(f"'low' and 'high' need a field 'bits', low below high; they are {low} and {high}")
            if not low <= self.average_bits <= high:
                raise ValueError(f"average_bits = {self.average_bits} lies outside {low} to {high}")
        return self

    def codecs(self, site: Site) -> tuple[Codec, ...]:
        """What the step may give a site."""
        if self.use is not None:
            return (self.use,)
        if self.choose:
            grids = [method_class(c, Codec).grid(site) if isinstance(c, str) else [c] for c in self.choose]
            return tuple(dict.fromkeys(codec for grid in grids for codec in grid))
        assert self.high is not None and self.low is not None
        return (self.high, self.low)

    def high_blocks(self, blocks: int) -> int:
        """How many of `blocks` blocks get `high`."""
        low, high = (getattr(codec, "bits", 0) for codec in (self.low, self.high))
        return math.floor(((self.average_bits or 0) - low) / (high - low) * blocks + 1e-9)


class Plan(_Strict):
    """A budget, calibration data and ordered steps; where steps overlap, the later one decides.

    With a budget the allocator chooses for every site among what its step may give it, and may leave it as it is.
    """

    name: str = "custom"
    description: str = ""
    budget: BudgetField | None = None
    """`2GB`, `4.25bpw` or `0.25x`; see `effllm.budget`."""
    ram: MemoryField | None = None
    """A budget for weights, KV cache and scratch together, at `context` tokens."""
    context: int = Field(default=4096, ge=1)
    groups: list[list[str]] = []
    """Lists of globs: sites of one block that one list matches get the same option, as engines need that fuse them."""
    effort: Effort = "fast"
    """`fast` needs no data: options are compared by relative error, weights rounded to nearest. `normal`, what a budget
    implies, prices options in KL on the calibration data and solves each weight in its metric. `best` then learns the
    weights of each block together, so that the block returns what it did."""
    inputs: Literal["original", "compressed"] = "original"
    """What the metric is made of: the inputs that the original model sees, or those that the compressed blocks give."""
    calibration: Calibration = Calibration()
    exclude: list[str] = []
    steps: list[Step]
    """None leave the model as it is, as a budget above its size does."""

    @model_validator(mode="before")
    @classmethod
    def _a_budget_is_spent_on_data(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("budget") or values.get("ram")):
            return {"effort": "normal", **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if self.budget and self.ram:
            raise ValueError("a plan has one budget: 'budget' for weight files, or 'ram' for all that a run holds")
        if not self.limited and any(step.choose for step in self.steps):
            raise ValueError("a step with 'choose' needs a budget, such as budget: 2GB or budget: 4.25bpw (--budget)")
        return self

    @property
    def limited(self) -> bool:
        """Whether a budget decides what sites get."""
        return bool(self.budget or self.ram)

    @property
    def needs_data(self) -> bool:
        """Whether carrying out the plan needs calibration data."""
        ordered = not self.limited and any(step.order and step.order.needs_data for step in self.steps)
        return ordered or self.solves or any(edit.needs_data for edit in self.edits())

    @property
    def solves(self) -> bool:
        """Whether sites are encoded in the metric of the calibration data."""
        return self.effort != "fast"

    @property
    def priced(self) -> bool:
        """Whether the options of sites are priced: for a budget to choose among them, or for the metric to solve in."""
        return self.limited or self.solves

    def edits(self) -> list[Edit]:
        """The edits of the whole model, in order; those of its structure first."""
        found = [step.apply for step in self.steps if step.apply is not None]
        return sorted(found, key=lambda edit: not edit.structure)

    def structure(self) -> list[Edit]:
        """Those of its edits that change which weights a model has."""
        return [edit for edit in self.edits() if edit.structure]

    def scores(self) -> list[Score]:
        """The distinct scores that the plan needs, in order; none where a budget decides."""
        if self.limited:
            return []
        return list(dict.fromkeys(step.order for step in self.steps if step.order is not None))

    def assign(self, sites: list[Site], ranks: dict[Score, dict[str, float]]) -> dict[str, Codec]:
        """Site name -> codec. `ranks` holds the importance of every block for each of `scores()`.

        Raises:
            UsageError: a glob, or the whole plan, matches no site; a block that an ordering needs has no rank.
        """
        assigned: dict[str, Codec] = {}
        for step, members in self._members(sites):
            if step.use is not None:
                assigned |= {site.name: step.use for site in members}
                continue
            assert step.order is not None and step.high is not None and step.low is not None
            rank = ranks[step.order]
            undecided = next((block for block, importance in rank.items() if math.isnan(importance)), None)
            if undecided is not None:
                raise UsageError(f"{step.order.label()} gives NaN as the importance of {undecided}; use another score")
            found = {site.block for site in members if site.block}
            unseen = sorted(found - rank.keys())
            if unseen:
                raise UsageError(
                    f"plan {self.name}: the calibration data never reach {unseen[0]} ({len(unseen)} blocks in all), so "
                    f"{step.order.label()} cannot rank them: give data that do, --exclude "
                    f"'{unseen[0].rpartition('.')[0]}.*', or use a score without data (--score zd)"
                )
            blocks = sorted(found, key=lambda block: (-rank[block], block))
            important = set(blocks[: step.high_blocks(len(blocks))])
            assigned |= {site.name: step.high if site.block in important else step.low for site in members}
        return {site.name: assigned[site.name] for site in sites if site.name in assigned}

    def options(self, sites: list[Site]) -> dict[str, tuple[Codec, ...]]:
        """Site name -> the codecs it may get: one where the plan fixes it, several where an ordering or a budget decides."""
        found: dict[str, tuple[Codec, ...]] = {}
        for step, members in self._members(sites):
            found |= {site.name: choice for site in members if (choice := step.codecs(site))}
        return {site.name: found[site.name] for site in sites if site.name in found}

    def idle(self, sites: list[Site]) -> list[str]:
        """The steps that have nothing to act on in this model, as `step 2 (embeddings, head)`."""
        idle = [step for step, members in self._members(sites) if not members]
        return [f"step {self.steps.index(step) + 1} ({', '.join(step.sites)})" for step in idle]

    def _members(self, sites: list[Site]) -> list[tuple[Step, list[Site]]]:
        excluded = {site.name for pattern in self.exclude for site in select([pattern], sites)}
        steps = []
        for step in [step for step in self.steps if step.apply is None]:
            members = [site for site in select(step.sites, sites) if site.name not in excluded]
            if step.order is not None:
                members = [site for site in members if site.block]
                if not members:
                    raise UsageError(
                        f"plan {self.name}: the step on {', '.join(step.sites)} orders repeated blocks, and the model has "
                        "none there; use a uniform plan"
                    )
            steps.append((step, members))
        if steps and not any(members for _, members in steps):
            raise UsageError(f"plan {self.name} matches no layer of the model; its sites: {examples(sites)}")
        return steps

    def override(
        self,
        sets: Iterable[str] = (),
        excludes: Iterable[str] = (),
        score: str | None = None,
        spending: Mapping[str, Any] = MappingProxyType({}),
        **calibration: Any,
    ) -> Plan:
        """The plan with the command line's changes: `GLOB=METHOD:key=value`, globs to exclude, score, calibration; and
        `spending`: budget, ram, context, effort, inputs."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        asked = {key: value for key, value in spending.items() if value is not None}
        limit = asked.get("budget") or asked.get("ram")
        if limit:
            values = {key: value for key, value in values.items() if key not in ("budget", "ram")}
            values["name"] = limit if self.name == BUDGET else f"{self.name}-{limit}"
        values |= asked
        if score is not None:
            ordered = [step for step in values["steps"] if "order" in step]
            if not ordered:
                raise UsageError(f"--score {score}: plan {self.name} orders nothing; use it with a layer-wise plan")
            for step in ordered:
                step["order"] = score
        for text in sets:
            glob, _, spec = text.partition("=")
            if not spec:
                raise UsageError(f"--set {text!r}: write it as 'GLOB=METHOD:key=value,...'")
            values["steps"].append({"sites": [glob], "use": spec})
        values["exclude"] = [*values.get("exclude", []), *excludes]
        given = {key: value for key, value in calibration.items() if value is not None}
        values["calibration"] = {**values.get("calibration", {}), **given}
        return validated(Plan, values, f"plan {self.name}")  # type: ignore[no-any-return]

    def to_yaml(self) -> str:
        """The plan as a file that `load_plan` reads back to an equal plan."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=110)


@cache
def presets() -> dict[str, Path]:
    """The plans in the package by name."""
    folder = Path(str(files("effllm").joinpath("presets")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_plan(plan: str | Path | dict[str, Any] | Plan) -> Plan:
    """A plan from a preset's name, a YAML file, a dictionary, or itself.

    Raises:
        UsageError: an unknown preset, key or method (naming the nearest), a value out of range, a calibration file that
            lies outside the plan's folder.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, dict):
        return validated(Plan, plan, "plan")  # type: ignore[no-any-return]
    path = presets().get(str(plan), Path(plan))
    if not path.is_file():
        raise UsageError(f"no plan {str(plan)!r}: {nearest(str(plan), presets())}; a plan file ends in .yaml")
    if path.stat().st_size > LARGEST_PLAN:
        raise UsageError(f"{path} is larger than {LARGEST_PLAN} bytes; that is no plan")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no plan; a plan has the key 'steps'")
    loaded: Plan = validated(Plan, {"name": path.stem, **values}, str(path))
    sources = [_inside(path.parent, source) for source in loaded.calibration.sources]
    return loaded.model_copy(update={"calibration": loaded.calibration.model_copy(update={"sources": sources})})


def _inside(folder: Path, source: str) -> str:
    """A calibration source of a plan file: files are relative to the plan's folder and may not leave it."""
    name, at, weight = source.partition("@")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise UsageError(f"the plan names {name!r}, a path that leaves the plan's folder; pass it by --calibration")
    return f"{folder / path}{at}{weight}" if (folder / path).exists() else source
