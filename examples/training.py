"""Train one model under one recipe, from a seed, resumably: what the examples compare.

Two runs with one seed start from the same weights and see the same bytes in the same order, so
their losses may be subtracted step by step. A run that was interrupted goes on from its checkpoint
as if it had not been.
"""

import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from corpus import Corpus, Windows
from gpt import GPT, MEDIUM, SMALL, TINY, Shape
from graphed import Graphed
from torch import Tensor, nn

import lpcompile
from lpcompile import Recipe, Rule

LAP = 10  # steps between two looks at the losses


@dataclass(frozen=True)
class Plan:
    """What the runs of one comparison share."""

    shape: Shape
    batch: int  # windows of shape.context tokens
    steps: int
    learning_rate: float
    device: str
    codegen: str = "inductor"
    per_block: bool = False  # compile block by block: they are alike, so one compile serves all
    num_validation_batches: int = 16
    validate_every: int | None = None  # steps, a multiple of LAP; the end is validated anyway
    save_every: int = 250

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.shape.context

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up over a twentieth, then a cosine down to a tenth."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass(frozen=True)
class Size:
    """A model and how long it trains unless the command line says otherwise."""

    shape: Shape
    batch: int
    steps: int
    learning_rate: float

    def plan(self, device: str, codegen: str, steps: int | None = None, **more: int) -> Plan:
        return Plan(
            shape=self.shape,
            batch=self.batch,
            steps=steps or self.steps,
            learning_rate=self.learning_rate,
            device=device,
            codegen=codegen,
            per_block=self.shape.num_layers > TINY.num_layers,
            **more,
        )


SIZES = {
    "tiny": Size(TINY, batch=16, steps=200, learning_rate=1e-3),
    "small": Size(SMALL, batch=32, steps=1000, learning_rate=1e-3),
    "medium": Size(MEDIUM, batch=16, steps=3000, learning_rate=6e-4),
}


@dataclass
class Run:
    """What a training run left: losses by step, and on a GPU what it cost."""

    name: str
    losses: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)  # after each plan.validate_every steps
    validation: float | None = None  # at the end
    loads: list[list[int]] = field(default_factory=list)  # tokens of each expert then, by layer
    tokens_per_second: float | None = None
    peak_bytes: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.validation is not None

    @property
    def tail(self) -> float:
        """The mean training loss of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


@dataclass(frozen=True)
class Variant:
    """What a run trains under, from which seed. With no recipe: in bf16, without lpcompile.

    rules: as in lpcompile.Options.
    ending: the recipe of the last ``ending_share`` of the steps, switched to in the running model.
    """

    name: str
    recipe: str | Recipe | None
    seed: int
    rules: tuple[Rule, ...] = ()
    ending: Recipe | None = None
    ending_share: float = 0.15

    @property
    def file(self) -> str:
        return f"{self.name}-seed{self.seed}"

    def recipe_at(self, step: int, plan: Plan) -> str | Recipe | None:
        """A function of the step alone, so that a resumed run needs no memory of a switch."""
        is_ending = self.ending is not None and step >= round((1 - self.ending_share) * plan.steps)
        return self.ending if is_ending else self.recipe

    def compile(self, model: GPT, plan: Plan, step: int = 0) -> None:
        """Compile the model in place; its parameters and their names stay as they are."""
        recipe = self.recipe_at(step, plan)
        if recipe is None:
            if plan.codegen == "inductor":
                for module in model.blocks if plan.per_block else [model]:
                    module.compile(fullgraph=True)
            return
        # GEMMs this small gain nothing, and the cost model would leave them in bf16.
        options = {"rewrite": "all", "codegen": plan.codegen}
        if plan.per_block:
            lpcompile.compile_blocks(
                model, model.blocks, recipe=recipe, rules=self.rules, options=options
            )
        else:
            options |= {"recipe": recipe, "rules": self.rules}
            model.compile(backend="lowprec", options=options, fullgraph=True)


def build(plan: Plan, variant: Variant) -> tuple[GPT, torch.optim.AdamW]:
    """The model and its optimizer at step 0: the same weights on every device."""
    torch.manual_seed(variant.seed)
    model = plan.shape.build().to(plan.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    return model, optimizer


def loss_of(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch, its GEMMs in bf16 from fp32 weights."""
    with torch.autocast(model.cos.device.type, torch.bfloat16):
        return model(*batch)


class Passes:
    """What a step and a validation run of a model as it is compiled now: one call each.

    ``train`` leaves clipped gradients and gives the loss; ``validate`` gives the loss alone.
    """

    def __init__(self, model: GPT, plan: Plan) -> None:
        def train(*batch: Tensor) -> Tensor:
            model.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss.detach()

        def validate(*batch: Tensor) -> Tensor:
            # With grad, though none is taken: without it, another graph would be compiled.
            return loss_of(model, batch).detach()

        on_gpu = plan.device == "cuda"
        self.train, self.validate = (Graphed(f) if on_gpu else f for f in (train, validate))


def validation(passes: Passes, corpus: Corpus, plan: Plan) -> float:
    """The mean loss over the first windows of the validation files, the same for every run."""
    text = corpus.validation.to(plan.device)
    windows = Windows(text, context=plan.shape.context, batch=plan.batch, seed=0)
    num_batches = min(plan.num_validation_batches, windows.num_batches)
    losses = [passes.validate(*windows[i]) for i in range(num_batches)]
    return torch.stack(losses).mean().item()


class Clock:
    """Median seconds a step, from intervals of several that end when the device has finished."""

    def __init__(self, step: int) -> None:
        self.start, self.step = time.perf_counter(), step
        self.intervals: list[float] = []

    def lap(self, step: int) -> None:
        """So many steps have finished by now."""
        now = time.perf_counter()
        self.intervals.append((now - self.start) / (step - self.step))
        self.start, self.step = now, step

    @property
    def seconds(self) -> float:
        later = sorted(self.intervals[1:] or self.intervals)  # the first one compiled
        return later[len(later) // 2]


class Checkpoint:
    """Where one run stands, in a folder: its losses as JSON, and until it ends everything else.

    A folder that holds a run of another plan, or on other text, is an error and not a start.
    """

    def __init__(self, folder: Path, variant: Variant, plan: Plan, corpus: Corpus) -> None:
        self.training = folder / f"{variant.file}.pt"
        self.losses = self.training.with_suffix(".json")
        self.identity = {
            "plan": {k: v for k, v in asdict(plan).items() if k not in ("device", "save_every")},
            "bytes": [corpus.train.numel(), corpus.validation.numel()],
        }
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, model: GPT, optimizer: torch.optim.Optimizer) -> Run | None:
        """The run as it was left, and unless it is finished the model and optimizer with it."""
        if self.losses.exists():
            record = json.loads(self.losses.read_text())
            self.check(record["identity"])
            run = Run(**record["run"])
            if run.is_finished:
                return run
        if not self.training.exists():
            return None
        state = torch.load(self.training, map_location="cpu")
        self.check(state["identity"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["cpu_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        return Run(**state["run"])

    def check(self, identity: dict[str, object]) -> None:
        if identity != self.identity:
            raise ValueError(
                f"{self.losses.parent} holds a run with another plan or on other text: name "
                f"another folder, or delete it (there: {identity}; here: {self.identity})"
            )

    def save(self, run: Run, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Leave the run so that ``load`` goes on with it, whenever the process is killed."""
        state = {
            "identity": self.identity,
            "run": asdict(run),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "cpu_rng": torch.get_rng_state(),  # stochastic rounding draws its seeds from these
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        fresh = self.training.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(self.training)

    def write(self, run: Run) -> None:
        """Leave the losses so far to be read; of a run that is finished they are all that stays."""
        fresh = self.losses.with_suffix(".tmp")
        record = {"identity": self.identity, "machine": machine(), "run": asdict(run)}
        fresh.write_text(json.dumps(record))
        fresh.replace(self.losses)
        if run.is_finished:
            self.training.unlink(missing_ok=True)


def train(
    variant: Variant,
    plan: Plan,
    corpus: Corpus,
    on_lap: Callable[[Run], None],
    folder: Path | None = None,
    deadline: float = math.inf,
) -> Run:
    """Train to the plan's end and validate; or, past the deadline, save and leave off.

    ``on_lap`` is called every few steps, when the losses so far have come from the device.
    """
    model, optimizer = build(plan, variant)
    checkpoint = Checkpoint(folder, variant, plan, corpus) if folder else None
    run = (checkpoint and checkpoint.load(model, optimizer)) or Run(variant.name)
    on_lap(run)
    if run.is_finished:
        return run
    start = len(run.losses)
    variant.compile(model, plan, start)
    recipe, passes = variant.recipe_at(start, plan), Passes(model, plan)
    text = corpus.train.to(plan.device)
    windows = Windows(text, context=plan.shape.context, batch=plan.batch, seed=variant.seed)
    start_of_memory(plan.device)
    clock = Clock(start)
    losses: list[Tensor] = []
    for step in range(start, plan.steps):
        if variant.recipe_at(step, plan) != recipe:
            recipe = variant.recipe_at(step, plan)
            lpcompile.switch(model, recipe)
            passes = Passes(model, plan)
        losses.append(passes.train(*windows[step]))  # it stays on the device: nothing waits for it
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        optimizer.step()
        num_done = step + 1
        if num_done % LAP and num_done < plan.steps:
            continue
        run.losses += torch.stack(losses).tolist()
        losses.clear()
        clock.lap(num_done)
        if plan.validate_every and num_done % plan.validate_every == 0:
            run.validations.append(validation(passes, corpus, plan))
            if checkpoint:
                checkpoint.write(run)
        on_lap(run)
        is_late = time.monotonic() > deadline
        if checkpoint and (is_late or num_done % plan.save_every == 0):
            checkpoint.save(run, model, optimizer)
            checkpoint.write(run)
        if is_late:
            return run
    if clock.intervals:
        run.tokens_per_second = plan.tokens / clock.seconds
    run.peak_bytes = peak_memory(plan.device)
    loads = [b for name, b in model.named_buffers() if name.endswith(".load")]
    for load in loads:
        load.zero_()
    run.validation = validation(passes, corpus, plan)
    run.loads = [load.tolist() for load in loads]
    if checkpoint:
        checkpoint.write(run)
    return run


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"torch {torch.__version__}, {device}"


def start_of_memory(device: str) -> None:
    if device == "cuda":
        gc.collect()  # what a run before left behind
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
