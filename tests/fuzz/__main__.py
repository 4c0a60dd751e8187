"""The command line of the fuzzer; see the package."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    commands = parser.add_subparsers(dest="command", required=True)
    folders = commands.add_parser("folders", help="mutated folders through every command")
    folders.add_argument("--inputs", type=int, default=1000)
    folders.add_argument("--seed", type=int, default=0, help="number of the first input")
    folders.add_argument("--jobs", type=int, default=os.cpu_count())
    worker = commands.add_parser("worker", help="the inputs of one process, one JSON line each")
    worker.add_argument("seeds", type=int, nargs=3, metavar="START STOP STEP")
    single = commands.add_parser("parser", help="one parser, guided by coverage (atheris)")
    single.add_argument("name")
    single.add_argument("--seconds", type=int, default=60)
    given = parser.parse_args()
    if given.command == "parser":
        fuzz_parser(given.name, given.seconds)
    elif given.command == "worker":
        run_inputs(range(*given.seeds))
    else:
        sys.exit(fuzz_folders(given.inputs, given.seed, given.jobs))


def fuzz_parser(name: str, seconds: int) -> None:
    """Follows the coverage of one parser for some seconds; atheris then ends the process."""
    import atheris

    with atheris.instrument_imports(include=["gralora_convert"]):
        from tests.fuzz.parsers import PARSERS, seeds

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(name)):
            Path(corpus, str(number)).write_bytes(seed)
        limits = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=10"]
        atheris.Setup([sys.argv[0], corpus, *limits, "-max_len=8192"], PARSERS[name])
        atheris.Fuzz()


def run_inputs(seeds: Sequence[int]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tests.fuzz.folders import fuzz, limit_memory

    limit_memory()
    for seed in seeds:
        statuses, failures = fuzz(seed)
        print(json.dumps({"statuses": statuses, "failures": failures}), flush=True)


def fuzz_folders(inputs: int, seed: int, jobs: int) -> int:
    """Runs all inputs in `jobs` processes, prints what was found; the exit status."""
    started, statuses = time.monotonic(), Counter[str]()
    failed = 0

    def work(job: int) -> None:
        nonlocal failed
        seeds = range(seed + job, seed + inputs, jobs)
        while seeds:
            done = 0
            arguments = [str(number) for number in (seeds.start, seeds.stop, seeds.step)]
            command = [sys.executable, "-m", "tests.fuzz", "worker", *arguments]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    found = json.loads(line)
                    done += 1
                    statuses.update(found["statuses"])
                    failed += bool(found["failures"])
                    for failure in found["failures"]:
                        print(failure, flush=True)
            seeds = seeds[done:]
            if seeds:  # the process died of it; the next one goes on behind it
                failed += 1
                print(f"input {seeds[0]}: killed the process ({process.returncode})", flush=True)
                seeds = seeds[1:]

    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(work, range(jobs)))
    seconds = time.monotonic() - started
    print(f"{inputs} inputs, {statuses.total()} commands in {seconds:.0f} s; {failed} failed")
    for name, count in sorted(statuses.items()):
        print(f"  {name}: {count}")
    return bool(failed)


if __name__ == "__main__":
    main()
