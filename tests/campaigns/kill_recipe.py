"""Kills the tiny recipe with SIGKILL at random moments, starts it again until it is through, and compares
what it leaves with what an undisturbed run left.

    bash launch/recipe.sh tiny && mv runs /somewhere/undisturbed
    python -m tests.campaigns.kill_recipe --undisturbed /somewhere/undisturbed --kills 6 --out result.json

Compared are all weights of all models, byte for byte, and the tables. Ends with exit code 1 where they
differ.
"""

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ["bash", "launch/recipe.sh", "tiny"]


def start(log: Path) -> psutil.Process:
    """One attempt, its output at the end of `log`."""
    with log.open("ab") as output:
        return psutil.Popen(COMMAND, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def kill(recipe: psutil.Process) -> int:
    """All of its processes, launchers and ranks included. Returns how many there were."""
    victims = [recipe, *recipe.children(recursive=True)]
    for process in victims:
        process.suspend()  # none may start another one meanwhile
    victims += [child for child in recipe.children(recursive=True) if child not in victims]
    for process in victims:
        process.kill()
    psutil.wait_procs(victims, timeout=60)
    return len(victims)


def stage(log: Path) -> str:
    """The one at work, from the headings of the recipe."""
    return re.findall(r"^== (\S+): ", log.read_text("utf-8", "replace"), re.MULTILINE)[-1]


def left(runs: Path) -> dict[str, str]:
    """{file: SHA-256} of what a recipe is run for."""
    files = [*runs.rglob("*.safetensors"), *runs.rglob("tables.md")]
    return {
        str(file.relative_to(runs)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)
    }


def campaign(undisturbed: Path, kills: int, shortest: float, longest: float, seed: int, log: Path) -> dict:
    dice, each, began = random.Random(seed), [], time.monotonic()
    while True:
        recipe = start(log)
        delay = dice.uniform(shortest, longest) if len(each) < kills else None
        try:
            code = recipe.wait(timeout=delay)
        except psutil.TimeoutExpired:
            at = stage(log)
            each.append({"after_seconds": round(delay, 1), "stage": at, "processes": kill(recipe)})
            print(f"kill {len(each)} in {at}", flush=True)
            continue
        if code != 0:
            raise SystemExit(f"the recipe ended with {code}; see {log}")
        break
    expected, found = left(undisturbed), left(ROOT / "runs")
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return {
        "command": " ".join(COMMAND),
        "kills": len(each),
        "each": each,
        "files_compared": len(expected),
        "files_that_differ": differ,
        "seconds": round(time.monotonic() - began),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--undisturbed", type=Path, required=True, help="runs/ of a run that nobody touched")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--shortest", type=float, default=15.0, help="seconds to a kill, at least")
    parser.add_argument("--longest", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("kill_recipe.log"))
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    if (ROOT / "runs").exists():
        parser.error(f"{ROOT / 'runs'} is there; the recipe must begin anew")
    result = campaign(
        options.undisturbed, options.kills, options.shortest, options.longest, options.seed, options.log
    )
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)
    return 1 if result["files_that_differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
