"""Is everything there that makes the package work and work fast, and if not, what to do.

It must run where anything else is broken, so it imports what it looks at when it looks.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edt_former.machine import cores, cpu, driver, first_line, gpu, threads

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "edt-kernels"
INSTALL = "pip install -e . (in a checkout)"
IMPORTED = {
    "torch": ("torch", "Tensor"),
    "numpy": ("numpy", "ndarray"),
    "rdkit": ("rdkit.Chem", "MolFromSmiles"),
    "transformers": ("transformers", "PreTrainedModel"),
    "safetensors": ("safetensors", "safe_open"),
    "tqdm": ("tqdm", "tqdm"),
    "matplotlib": ("matplotlib.figure", "Figure"),
}
"""What the package reads of its requirements: a version that is installed may still be broken."""
OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what.
        state: "ok"; "note", something is off or missing that may be meant so, or cannot be helped;
            "problem", something that slows or breaks the package and can be mended.
        told: what was found, in a line.
        remedy: what to do about it, in a line; "" where nothing need be done.
        data: the same for programs.
    """

    subject: str
    state: str
    told: str
    remedy: str = ""
    data: dict[str, object] = field(default_factory=dict)


def examine() -> list[Finding]:
    """Look at everything; nothing is raised, a look that fails is a problem found.

    >>> [finding.state for finding in examine() if finding.subject == "python"]
    ['ok']
    """
    findings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of is found
        for subject, look in LOOKS.items():
            try:
                findings += look()
            except (Exception, SystemExit) as error:
                findings.append(Finding(subject, PROBLEM, f"cannot be examined: {_line(error)}"))
    return findings


def to_json(findings: Iterable[Finding]) -> dict[str, object]:
    """All findings, and whether none is a problem, for `json.dump`.

    >>> to_json([Finding("python", "ok", "3.11.7")])["healthy"]
    True
    """
    findings = list(findings)
    healthy = all(finding.state != PROBLEM for finding in findings)
    return {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}


def _python() -> Iterator[Finding]:
    yield Finding(
        "python",
        OK,
        f"{platform.python_version()}, {sys.executable}",
        data={"version": platform.python_version(), "executable": sys.executable},
    )


def _package() -> Iterator[Finding]:
    spec = find_spec("edt_kernels")
    where = str(Path(spec.origin).parent) if spec and spec.origin else None
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        yield Finding(PACKAGE, PROBLEM, f"not installed, run from {where}", INSTALL)
        return
    yield Finding(PACKAGE, OK, f"{found}, {where}", data={"version": found, "folder": where})


def _requirements() -> Iterator[Finding]:
    for requirement in _required(""):
        yield _requirement(requirement)


def _requirement(requirement: Requirement) -> Finding:
    name, wanted = requirement.name, f'pip install "{requirement}"'
    found = _version(name)
    data = {"version": found, "required": str(requirement.specifier)}
    if found is None:
        return Finding(name, PROBLEM, "not installed", wanted, data)
    if not requirement.specifier.contains(found, prereleases=True):
        told = f"{found}, {requirement.specifier} is required"
        return Finding(name, PROBLEM, told, wanted, data)
    module, attribute = IMPORTED.get(name, (name.replace("-", "_"), "__name__"))
    try:
        getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:
        remedy = f'pip install --force-reinstall "{requirement}"'
        return Finding(name, PROBLEM, f"{found} is broken: {_line(error)}", remedy, data)
    return Finding(name, OK, found, data=data)


def _torch_build() -> Iterator[Finding]:
    import torch

    built = torch.version.cuda and f"CUDA {torch.version.cuda}"
    built = built or (torch.version.hip and f"ROCm {torch.version.hip}")
    data = {"version": torch.__version__, "built for": built or "CPU"}
    yield Finding(
        "torch build", OK, f"{torch.__version__}, for {built or 'the CPU only'}", data=data
    )


def _gpu() -> Iterator[Finding]:
    import torch

    found = gpu()
    if found is not None:
        told = "{name}, capability {capability}, driver {driver}".format(**found)
        yield Finding("GPU", OK, told, data=found)
    elif (installed := driver()) is None:
        yield Finding("GPU", NOTE, "none found, all runs on the CPU")
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides it"
        yield Finding("GPU", NOTE, hidden, "unset CUDA_VISIBLE_DEVICES to use it")
    elif torch.version.cuda is None:
        told = f"one is there (driver {installed}), this torch is built for the CPU only"
        yield Finding("GPU", PROBLEM, told, "install a CUDA build of torch, see pytorch.org")
    else:
        told = f"one is there (driver {installed}), torch's CUDA {torch.version.cuda} cannot use it"
        yield Finding("GPU", PROBLEM, told, "update the driver, or install torch for an older CUDA")


def _cpu() -> Iterator[Finding]:
    found = cpu()
    features = " ".join(found["features"]) or "no vector features known"
    told = f"{found['model']}, {found['cores']} cores: {features}"
    yield Finding("processor", OK, told, data=found)


def _threads() -> Iterator[Finding]:
    found = threads()
    count, settings = found["torch"], found["environment"]
    set_by = ", ".join(f"{name}={value}" for name, value in settings.items())
    told = f"torch uses {count} of {cores()} cores" + (f" ({set_by})" if set_by else "")
    remedy = ""
    if count < cores():
        limits = [name for name in settings if name.endswith("NUM_THREADS")]
        remedy = f"unset {' '.join(limits)}" if limits else "torch.set_num_threads(...)"
        remedy += " to use all"
    yield Finding("threads", NOTE if remedy else OK, told, remedy, found)


def _kernels() -> Iterator[Finding]:
    try:
        import edt_kernels
    except RuntimeError as error:  # stale, or an instruction set that is not there
        chosen = "EDT_CPU_ISA" in str(error)
        remedy = "unset EDT_CPU_ISA" if chosen else f"build it again: {INSTALL}"
        yield Finding("native kernels", PROBLEM, str(error), remedy)
        return
    import torch

    info = edt_kernels.build_info()
    yield _native(info)
    yield _ops(info)
    if torch.cuda.is_available() or "EDT_CUDA_NATIVE" in os.environ:
        yield _gpu_ops(info)


def _native(info: dict) -> Finding:
    if not info["native"]:
        remedy = "unset EDT_NATIVE"
        if os.environ.get("EDT_NATIVE") != "0":
            remedy = "EDT_NATIVE=1 pip install -e . shows what fails; it needs a C++ compiler"
        return Finding("native kernels", PROBLEM, info["reason"], remedy, info)
    sources = Path(info["file"]).parents[1] / "csrc"
    origin = f"built from {sources} as it is" if sources.is_dir() else "no sources beside it"
    told = f"{info['cpu_isa']}, {info['file']}, {origin}"
    if "EDT_CPU_ISA" in os.environ:
        told += ", chosen by EDT_CPU_ISA"
        remedy = "unset EDT_CPU_ISA for the best of this processor"
        return Finding("native kernels", NOTE, told, remedy, info)
    return Finding("native kernels", OK, told, data=info)


def _ops(info: dict) -> Finding:
    """Which backend serves CPU tensors, and why."""
    ops = info["ops"]
    why = {
        "native": f"native module, {info['cpu_isa']}",
        "reference": info["reason"] or "no native kernel for this op",
    }
    # A backward is named where it is served otherwise than its forward.
    shown = [name for name in ops if ops.get(name.removesuffix("_bwd")) != ops[name]]
    shown += [name for name in ops if not name.endswith("_bwd")]
    parts = []
    for backend, reason in why.items():
        names = sorted(name for name in shown if ops[name] == backend)
        if names:
            parts.append(f"{backend} ({reason}): {', '.join(names)}")
    data = {name: {"backend": backend, "why": why[backend]} for name, backend in ops.items()}
    return Finding("ops", OK if info["native"] else NOTE, "; ".join(parts), data=data)


def _gpu_ops(info: dict) -> Finding:
    """Which backend serves CUDA tensors, and why."""
    ops, installed = info["cuda_ops"], info["triton"]
    why = {
        "native, unmeasured": "CUDA C++ that nobody has timed on a GPU, chosen by EDT_CUDA_NATIVE",
        "triton": f"Triton {installed}",
        "reference": "no Triton kernel for this op" if installed else "Triton is not installed",
    }
    by_backend = {backend: sorted(name for name in ops if ops[name] == backend) for backend in why}
    told = "; ".join(
        f"{backend} ({why[backend]}): {', '.join(names)}"
        for backend, names in by_backend.items()
        if names
    )
    data = {name: {"backend": backend, "why": why[backend]} for name, backend in ops.items()}
    if not installed:
        return Finding("ops on the GPU", PROBLEM, told, "pip install triton", data)
    if by_backend["native, unmeasured"]:
        remedy = "unset EDT_CUDA_NATIVE to leave it out"
        return Finding("ops on the GPU", NOTE, told, remedy, data)
    return Finding("ops on the GPU", OK, told, data=data)


def _compiler() -> Iterator[Finding]:
    wanted = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    command = next(filter(shutil.which, wanted), None)
    found = {tool: first_line(tool, "--version") for tool in ("cmake", "ninja")}
    found["c++"] = command and first_line(command, "--version")
    if found["c++"] is None:
        remedy = "install g++ or clang++ (CXX names another) to build the native kernels"
        yield Finding("compiler", NOTE, f"none of {', '.join(wanted)} runs", remedy, found)
        return
    tools = (f"{tool}: {found[tool] or 'pip brings its own'}" for tool in ("cmake", "ninja"))
    yield Finding("compiler", OK, f"{found['c++']}; {'; '.join(tools)}", data=found)


def _triton() -> Iterator[Finding]:
    found = _version("triton")
    if found is None:
        yield Finding("triton", NOTE, "not installed, needed on a GPU only")
        return
    try:
        import_module("triton")
    except (Exception, SystemExit) as error:
        remedy = f"pip install --force-reinstall triton=={found}"
        yield Finding("triton", NOTE, f"{found} cannot be imported: {_line(error)}", remedy)
        return
    yield Finding("triton", OK, found, data={"version": found})


def _extras() -> Iterator[Finding]:
    for extra in metadata(PACKAGE).get_all("Provides-Extra") or ():
        found = {r.name: _version(r.name) for r in _required(extra)}
        told = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
        missing = [name for name, number in found.items() if number is None]
        remedy = f"pip install {' '.join(missing)}, or -e '.[{extra}]' in a checkout"
        remedy = remedy if missing else ""
        yield Finding(f"extra {extra}", NOTE if missing else OK, told, remedy, found)


def _models() -> Iterator[Finding]:
    from edt_former import shipped

    import_module("edt_former.model")  # what cannot be imported is not damaged
    names = shipped.connectors()
    if not names:
        told = f"not in {shipped.folder()}"
        yield Finding("shipped models", PROBLEM, told, "install the package again")
        return
    for name in names:
        try:
            shipped.load(name)
        except (OSError, ValueError, KeyError) as error:
            told = f"{name} is damaged: {_line(error)}"
            yield Finding("shipped models", PROBLEM, told, "install the package again")
            return
    told = f"{', '.join(names)}; hashes of all frozen weights agree with the manifests"
    yield Finding("shipped models", OK, told, data={"connectors": names})


LOOKS: dict[str, Callable[[], Iterable[Finding]]] = {
    "python": _python,
    PACKAGE: _package,
    "requirements": _requirements,
    "torch build": _torch_build,
    "processor": _cpu,
    "threads": _threads,
    "native kernels": _kernels,
    "compiler": _compiler,
    "GPU": _gpu,
    "triton": _triton,
    "shipped models": _models,
    "extras": _extras,
}
"""By subject, in the order in which they are told. Each stands alone."""


def _required(extra: str) -> list[Requirement]:
    """The package's requirements: its own, or those that an extra adds."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requires(PACKAGE) or ()]
    if not extra:
        return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        r
        for r in parsed
        if r.marker is not None
        and r.marker.evaluate({"extra": extra})
        and not r.marker.evaluate({"extra": ""})
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
