"""EDT-Former from SMILES to an answer, beside static queries and padding: time by stage, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

import edt_kernels
from edt_former.machine import gpu, load, machine
from edt_former.report.contenders import (
    PUBLISHED_SLOTS,
    Contender,
    Rectangle,
    check_rows,
    checked_tokens,
    line_up,
)
from edt_former.report.peak import Peak, peak_memory
from edt_former.report.pipeline import (
    ENCODING,
    PATCHES,
    READING,
    STAGES,
    Batch,
    Pipeline,
    Seconds,
)
from edt_former.report.timing import Spread, interleaved, paired
from edt_former.report.workload import Workload

READ = "read"  # the name under which the stages before the connectors are timed


@dataclass(frozen=True)
class Measured:
    """A contender's figures over all molecules.

    Attributes:
        name: of the contender.
        tokens: query tokens per molecule that tell of it.
        prompt_tokens: tokens of a molecule's prompt, with its question, and with padding where the
            contender leaves that in the prompt.
        computed_tokens: what the language model computes per molecule, where rows of one batch are
            padded to one length.
        seconds: by stage, of every round.
        peak: memory, in a process of its own; None where it was not measured.
    """

    name: str
    tokens: float
    prompt_tokens: float
    computed_tokens: float
    seconds: dict[str, list[float]]
    peak: Peak | None = None

    def over(self, stages: Sequence[str] = STAGES) -> list[float]:
        """Seconds of some stages together, of every round."""
        return [sum(parts) for parts in zip(*(self.seconds[s] for s in stages), strict=True)]


@dataclass(frozen=True)
class Profile:
    """What `profile` measured.

    Attributes:
        workload: models and prompts.
        molecules: how many, and `atoms`: heavy atoms of one, on average.
        rounds: timed.
        measured: EDT-Former first.
        notes: what a reader must know of this run.
        machine: see `edt_former.machine`, as it was before the first round; and its load
            after the last.
        kernels: `edt_kernels.build_info()`.
    """

    workload: Workload
    molecules: int
    atoms: float
    rounds: int
    measured: list[Measured]
    notes: list[str]
    machine: dict[str, object]
    kernels: dict[str, object]

    def ratio(self, measured: Measured, stages: Sequence[str] = STAGES) -> Spread:
        """Its time over EDT-Former's in the same round."""
        return paired(measured.over(stages), self.measured[0].over(stages))

    def molecules_per_second(self, measured: Measured, stages: Sequence[str] = STAGES) -> float:
        """By the median round."""
        return self.molecules / Spread.of(measured.over(stages)).median

    def query_tokens_per_second(self, measured: Measured) -> float:
        """From SMILES to molecule tokens, by the median round; padding does not count."""
        return measured.tokens * self.molecules_per_second(measured, ENCODING)

    def decoded_per_second(self, measured: Measured) -> float:
        """Generated tokens, all rows of a batch together, by the median round."""
        return self.workload.new_tokens * self.molecules_per_second(measured, ("decode",))

    def description(self) -> list[tuple[str, str]]:
        """What was timed: pairs of a word and its explanation."""
        of, isa = self.workload, self.kernels["cpu_isa"]
        models = {
            "published": "connector of 12 layers and width 768, GIN of 5 layers and width 512: "
            f"random weights; language model {of.llm}",
            "tiny": "as shipped",
        }
        threads = self.machine["threads"]["torch"]
        kernels = f"; ragged ops: {f'native, {isa}' if isa else 'torch reference'}"
        return [
            (
                "molecules",
                f"{self.molecules} of {self.atoms:.1f} heavy atoms (mean), batches of {of.batch}",
            ),
            (
                "prompts",
                f"molecule and {of.text_tokens} tokens of text; {of.new_tokens} new tokens",
            ),
            ("models", models[of.size]),
            (
                "run",
                f"{of.dtype} on {of.device}, {threads} thread{'s' * (threads > 1)}"
                + kernels * (of.device == "cpu"),
            ),
            (
                "baselines",
                "torch's scaled_dot_product_attention, without a mask where nothing is padded",
            ),
            (
                "figures",
                f"medians of {self.rounds} rounds; time ratio: over EDT-Former's in the same round "
                "[lowest, highest]",
            ),
        ]

    def to_json(self) -> dict[str, object]:
        """All of it, every round's seconds and the figures made of them, for `json.dump`."""
        contenders = [
            {
                "name": m.name,
                "query_tokens_per_molecule": m.tokens,
                "prompt_tokens_per_molecule": m.prompt_tokens,
                "computed_tokens_per_molecule": m.computed_tokens,
                "encoding": {
                    "molecules_per_second": self.molecules_per_second(m, ENCODING),
                    "query_tokens_per_second": self.query_tokens_per_second(m),
                    "time_over_edt_former": self.ratio(m, ENCODING)._asdict(),
                },
                "end_to_end": {
                    "molecules_per_second": self.molecules_per_second(m),
                    "decoded_tokens_per_second": self.decoded_per_second(m),
                    "time_over_edt_former": self.ratio(m)._asdict(),
                },
                "seconds": {
                    stage: {**Spread.of(rounds)._asdict(), "rounds": rounds}
                    for stage, rounds in m.seconds.items()
                },
                "peak_memory": None if m.peak is None else asdict(m.peak),
            }
            for m in self.measured
        ]
        return {
            "workload": asdict(self.workload),
            "molecules": self.molecules,
            "atoms_per_molecule": self.atoms,
            "rounds": self.rounds,
            "notes": self.notes,
            "contenders": contenders,
            "machine": self.machine,
            "kernels": self.kernels,
        }


def profile(
    workload: Workload,
    smiles: Sequence[str],
    *,
    rounds: int = 5,
    memory: bool = True,
    progress: bool = False,
) -> Profile:
    """Measure EDT-Former and its baselines over the same molecules, models and prompts.

    The contenders share their weights and run in turns in one process. Before anything is timed
    the tokens of each are compared with those of the ragged kernels, and the language model's
    logits where these must be alike. Featurising and the graph encoder are the same for all, as
    are predictor and patches for those that read them: they are timed once a round.

    Args:
        workload: models and prompts.
        smiles: at least one, all readable.
        rounds: timed, at least one.
        memory: also run each contender once in a process of its own, for its peak memory.
        progress: show a bar.

    Raises:
        ValueError: no molecules or rounds; a molecule that cannot be read or has no room in the
            prompt.
        RuntimeError: contenders that must agree do not.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not smiles:
        raise ValueError("smiles must hold at least one molecule, got none")
    where = {**machine(), "gpu": gpu() if workload.device == "cuda" else None}
    timed = _time(workload, smiles, rounds, progress)
    where["load after"] = load()
    notes = []
    if timed.longest > PUBLISHED_SLOTS:
        notes.append(
            f"padding to {PUBLISHED_SLOTS} is left out: a molecule has {timed.longest} tokens"
        )
    measured = timed.measured
    if memory:
        measured, failures = _with_peaks(workload, smiles, timed)
        notes += failures
    return Profile(
        workload,
        len(smiles),
        timed.atoms,
        rounds,
        measured,
        notes,
        where,
        edt_kernels.build_info(),
    )


class _Timed(NamedTuple):
    """Contenders in their order, and the sizes of the workload: see `line_up`."""

    measured: list[Measured]
    atoms: float
    mean: float
    longest: int


@torch.inference_mode()
def _time(workload: Workload, smiles: Sequence[str], rounds: int, progress: bool) -> _Timed:
    """All but the memory; the models are gone when it returns."""
    pipeline = Pipeline(workload)
    batches = [smiles[i : i + workload.batch] for i in range(0, len(smiles), workload.batch)]
    read = [pipeline.read(batch)[0] for batch in batches]
    lengths = [length for batch in read for length in _token_counts(pipeline, batch)]
    mean, longest = sum(lengths) / len(lengths), max(lengths)
    pipeline.check_room(max(longest, PUBLISHED_SLOTS))
    field = line_up(pipeline.parts.connector, mean=mean, longest=longest)
    counts = _checked_counts(pipeline, field, read)

    runs = {READ: lambda: _sum(pipeline.read(batch)[1] for batch in batches)}
    for contender in field:
        runs[contender.name] = lambda c=contender: _sum(pipeline.run(c, batch) for batch in read)
    times = interleaved(runs, rounds, progress=progress)

    measured = []
    for contender in field:
        seconds = {stage: [t[stage] for t in times[READ]] for stage in READING}
        if not contender.reads_patches:
            seconds[PATCHES] = [0.0] * rounds
        for stage in STAGES[len(READING) :]:
            seconds[stage] = [t[stage] for t in times[contender.name]]
        tokens = (count / len(smiles) for count in counts[contender.name])
        measured.append(Measured(contender.name, *tokens, seconds))
    atoms = sum(int(batch.features.offsets[-1]) for batch in read) / len(smiles)
    return _Timed(measured, atoms, mean, longest)


def _token_counts(pipeline: Pipeline, batch: Batch) -> list[int]:
    patches = {s: p.patch_offsets.diff().tolist() for s, p in batch.patches.items()}
    return pipeline.parts.connector.token_counts(patches, len(batch.features.offsets) - 1)


def _checked_counts(
    pipeline: Pipeline, field: list[Contender], read: list[Batch]
) -> dict[str, list[int]]:
    """Query, prompt and computed tokens of all molecules, of contenders that agree."""
    counts = {contender.name: [0, 0, 0] for contender in field}
    words = pipeline.workload.text_tokens
    for batch in read:
        molecules = len(batch.features.offsets) - 1
        expected = None
        for contender, tokens in zip(field, checked_tokens(field, *batch), strict=True):
            answer, _ = pipeline.answer(contender, tokens)
            if contender.connector is field[0].connector:
                expected = answer.logits if expected is None else expected
                check_rows(contender.name, answer.logits, expected)
            packed = tokens.packed() if isinstance(tokens, Rectangle) else tokens.values
            places = tokens.values.shape[:-1].numel() + molecules * words
            found = (len(packed), places, answer.prompt.embeds.shape[:-1].numel())
            counts[contender.name] = [
                a + b for a, b in zip(counts[contender.name], found, strict=True)
            ]
    return counts


def _with_peaks(
    workload: Workload, smiles: Sequence[str], timed: _Timed
) -> tuple[list[Measured], list[str]]:
    """The same with peak memory, and why it is missing where it is."""
    at_once = 1  # on a GPU, whose memory they would share
    if workload.device == "cuda":
        torch.cuda.empty_cache()
    else:
        at_once = min(2, torch.get_num_threads())  # each spends most of its time on imports
    sizes = {"mean": timed.mean, "longest": timed.longest}
    threads = torch.get_num_threads() // at_once
    with ThreadPoolExecutor(at_once) as pool:
        jobs = [
            pool.submit(peak_memory, workload, smiles, m.name, **sizes, threads=threads)
            for m in timed.measured
        ]
    failures = [str(job.exception()) for job in jobs if job.exception()]
    measured = [
        m if job.exception() else replace(m, peak=job.result())
        for m, job in zip(timed.measured, jobs, strict=True)
    ]
    return measured, failures


def _sum(laps: Iterable[Seconds]) -> Seconds:
    """Seconds of all batches, by stage."""
    total: Seconds = {}
    for seconds in laps:
        total = {stage: total.get(stage, 0.0) + value for stage, value in seconds.items()}
    return total
