"""What a compressing run survives: resumes, kills and hostile input, counted; one JSON file each.

    python benchmarks/reliability.py all              # short forms, minutes
    python benchmarks/reliability.py resume           # every case, every step, three kinds of data, the command line
    python benchmarks/reliability.py kills --count 100
    python benchmarks/reliability.py fuzz --inputs 100000

The full forms write to ``results/reliability``; ``--short`` and ``all`` write nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
SEED = 42


def main() -> int:
    """Run one part, or the short forms of all; return 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--count", type=int, default=100, help="kills at random moments")
    parser.add_argument("--inputs", type=int, default=100_000, help="mutated inputs of all readers together")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--short", action="store_true", help="a few of each; write no results")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(ROOT))
    short = arguments.short or arguments.part == "all"
    failed = False
    for part in PARTS if arguments.part == "all" else [arguments.part]:
        begin = time.monotonic()
        result = PARTS[part](arguments, short)
        result |= {"seconds": round(time.monotonic() - begin), "seed": arguments.seed, **machine()}
        print(f"{part}: {json.dumps({k: v for k, v in result.items() if k != 'targets'})}")
        failed |= not result["passed"]
        if not short:
            RESULTS.mkdir(parents=True, exist_ok=True)
            written = without_places(json.dumps(result, indent=1))
            (RESULTS / f"{part}.json").write_text(written + "\n", encoding="utf-8")
    return int(failed)


def resume(_arguments: argparse.Namespace, short: bool) -> dict[str, Any]:
    """Compare resumed runs with the run that never stopped."""
    _quiet()
    from tests.cases import CASES
    from tests.reliability import resume_points

    cases = CASES[-1:] if short else CASES
    settings = resume_points.SETTINGS[:1] if short else resume_points.SETTINGS
    with tempfile.TemporaryDirectory() as place:
        inside = resume_points.compare_all(Path(place) / "inside", cases, settings, _say)
        typed = resume_points.compare_command_line(Path(place) / "typed")
    different = [*(inside.different or []), *(typed.different or [])]
    return {
        "compared": inside.compared + typed.compared,
        "identical": inside.identical + typed.identical,
        "of these through the command line": typed.compared,
        "cases": len(cases),
        "kinds of data": [setting.name for setting in settings],
        "different": different,
        "passed": not different,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def kills(arguments: argparse.Namespace, short: bool) -> dict[str, Any]:
    """Kill ``fiftyfold compress`` and ``fiftyfold fit``, resume after each kill, and compare what comes out."""
    _quiet()
    from tests.reliability.kills import SUBJECTS

    count = 4 if short else arguments.count
    subjects = {}
    with ProcessPoolExecutor(len(SUBJECTS), get_context("fork")) as pool:
        shares = [(count + 1 - number) // len(SUBJECTS) for number in range(len(SUBJECTS))]
        seeds = [arguments.seed + number for number in range(len(SUBJECTS))]
        for subject, report in zip(SUBJECTS, pool.map(_kill, range(len(SUBJECTS)), shares, seeds), strict=True):
            subjects[subject.name] = {**vars(report), "passed": report.survived()}
    together = ("kills", "kills_while_writing", "runs_finished", "runs_equal", "resumed_from_a_checkpoint")
    return {
        **{name: sum(each[name] for each in subjects.values()) for name in together},
        "subjects": subjects,
        "passed": all(each["passed"] for each in subjects.values()),
    }


def _kill(number: int, count: int, seed: int) -> Any:
    from tests.reliability.kills import SUBJECTS, kill_many

    with tempfile.TemporaryDirectory() as place:
        return kill_many(
            SUBJECTS[number],
            Path(place) / "place",
            at_random=count,
            while_writing=max(1, count // 4),
            seed=seed,
            progress=lambda report: _say(f"{SUBJECTS[number].name} {report}"),
        )


def fuzz(arguments: argparse.Namespace, short: bool) -> dict[str, Any]:
    """Feed mutated files to every reader, guided by coverage; in a process of its own, which atheris instruments."""
    inputs = 3000 if short else arguments.inputs
    command = [sys.executable, "-m", "tests.reliability.fuzzing", str(inputs), str(arguments.seed)]
    targets = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"target"'):
                targets.append(json.loads(line))
                _say(f"{targets[-1]['target']}: {targets[-1]['inputs']}")
    failures = {target["target"]: target["failures"] for target in targets if target["failures"]}
    return {
        "inputs": sum(target["inputs"] for target in targets),
        "refused with a clear error": sum(target["refused"] for target in targets),
        "readers": len(targets),
        "failures": failures,
        "targets": [{name: value for name, value in target.items() if name != "failures"} for target in targets],
        "passed": process.returncode == 0 and not failures,
    }


def faults(_arguments: argparse.Namespace, _short: bool) -> dict[str, Any]:
    """Run the tests of full disks, folders that refuse, losses without a value, and ranks and workers that die."""
    test = "tests/reliability/test_faults.py"
    run = subprocess.run([sys.executable, "-m", "pytest", test], cwd=ROOT, check=False, capture_output=True, text=True)
    return {"tests": run.stdout.strip().splitlines()[-1], "passed": run.returncode == 0}


def without_places(text: str) -> str:
    """Return a text whose paths begin in the project, in a library or in the folder for temporary files."""
    places = {os.path.abspath(each) for each in (str(ROOT), tempfile.gettempdir(), *sys.path) if each}
    for place in sorted(places - {os.sep}, key=len, reverse=True):
        text = text.replace(f"{place}{os.sep}", "")
    return text


def machine() -> dict[str, str]:
    """Say what it ran on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "python": sys.version.split()[0],
    }


def _quiet() -> None:
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


PARTS: dict[str, Callable[[argparse.Namespace, bool], dict[str, Any]]] = {
    "resume": resume,
    "kills": kills,
    "faults": faults,
    "fuzz": fuzz,
}

if __name__ == "__main__":
    sys.exit(main())
