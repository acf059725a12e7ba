"""`edt doctor`: what this machine gives the package, and what to do about what is off."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="what is installed, active and missing, and what to do about it",
        description="Look at Python, torch, processor, native kernels, compiler, GPU, packages and "
        "shipped models. Exits with 1 when a problem is found: something that slows or breaks the "
        "package and can be mended; with 0 otherwise. A note is something that may be meant so.",
        epilog="example: edt doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 when there is a problem."""
    from edt_former.doctor import PROBLEM, examine, to_json

    findings = examine()
    problems = [finding.subject for finding in findings if finding.state == PROBLEM]
    if args.json:
        print(json.dumps(to_json(findings), indent=1))
        return 1 if problems else 0
    width = max(len(finding.subject) for finding in findings)
    terminal = shutil.get_terminal_size((10_000, 0)).columns
    indent = " " * (width + 11)
    for finding in findings:
        head = f"{finding.state:<9}{finding.subject:<{width + 2}}"
        print(textwrap.fill(head + finding.told, terminal, subsequent_indent=indent))
        if finding.remedy:
            print(f"{indent}-> {finding.remedy}")
    counted = f"{len(problems)} problem{'s' * (len(problems) > 1)}: {', '.join(problems)}"
    print(f"\n{counted if problems else 'no problem found'}")
    return 1 if problems else 0
