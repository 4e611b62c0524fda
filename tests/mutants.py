"""Plant known faults one at a time and see which of them the tests notice: `python tests/mutants.py`.

Each fault of `mutants.toml` is put into a copy of the repository, where tests of its module run until one fails.
`mutants_old_suite.csv` says which of them the suite of commit 55b2891 noticed, before it was made smaller; the tests it
names are those of that commit.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve()
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", ".hypothesis")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--hypothesis-seed=0")


@cache
def imported(file: Path) -> frozenset[str]:
    """What a file takes from the package: `package.module`, `package.module.name`, also through a face."""
    nodes, found = list(ast.walk(ast.parse(file.read_text(encoding="utf-8")))), dict[str, str]()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {each.asname or each.name: start + each.name for each in node.names}
    chains = (ast.unparse(node).partition(".") for node in nodes if isinstance(node, ast.Attribute))
    return frozenset((*found.values(), *(f"{found[first]}.{rest}" for first, _, rest in chains if first in found)))


def is_used(module: Path, root: Path, names: frozenset[str]) -> bool:
    """Whether imports reach a module: itself, or what it defines by way of a package that it lies in."""
    parts, body = module.relative_to(root).with_suffix("").parts, ast.parse(module.read_text(encoding="utf-8")).body
    public = {each.name for each in body if isinstance(each, ast.ClassDef | ast.FunctionDef)}
    faces = {".".join((*parts[:count], name)) for count in range(1, len(parts)) for name in public}
    return not faces.isdisjoint(names) or any(f"{name}.".startswith(".".join((*parts, ""))) for name in names)


def suite_of(module: Path, root: Path, levels: int) -> list[str]:
    """The module for its examples, tests that import it, at higher levels those of its importers; shortest first."""
    reached, found = {module}, dict[Path, int]()
    for level in range(9):
        for test in (root / "tests").rglob("test_*.py"):
            if any(is_used(each, root, imported(test)) for each in reached):
                found.setdefault(test, level)
        if found and level + 1 >= levels:
            break
        files = (root / "delta_analysis").rglob("*.py")
        reached |= {file for file in files if any(is_used(each, root, imported(file)) for each in reached)}
    order = sorted(found, key=lambda test: (found[test], module.stem not in test.stem, test.stat().st_size))
    return [str(each.relative_to(root)) for each in (module, *order)]


def run_tests(tests: list[str], root: Path, limit: float, **variables: str) -> tuple[str, str]:
    """`killed` if a test failed, `survived` if none did, `timeout` if the limit in seconds came first; which failed."""
    with tempfile.TemporaryFile("w+") as out:
        # Ends the processes that tests have started too.
        command = ["timeout", "-k", "9", f"{limit:.0f}", sys.executable, "-m", "pytest", *OPTIONS, *tests]
        environment = {**os.environ, "PYTHONPATH": str(root), **variables}
        code = subprocess.run(command, cwd=root, env=environment, stdout=out, stderr=out).returncode
        out.seek(0)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", out.read(), re.MULTILINE)
    verdicts = {0: "survived", 5: "survived", 124: "timeout", 137: "timeout"}  # 5: nothing was collected
    return verdicts.get(code, "killed"), failed[1] if failed else ""


def try_mutant(mutant: dict[str, str], root: Path, limit: float, levels: int) -> tuple[str, str]:
    """The verdict on a fault, and the first test that failed; a fault that cannot be planted says so."""
    file = root / mutant["file"]
    text, date, tests = file.read_text(encoding="utf-8"), file.stat().st_mtime, suite_of(file, root, levels)
    if (count := text.count(mutant["find"])) != 1:
        return f"stands {count} times", ""
    with tempfile.TemporaryDirectory() as cache_dir:
        # Compiled callers keep what they have inlined, and look at the date of their own file alone.
        apart = {"NUMBA_CACHE_DIR": cache_dir} if "numba" in text or "@compiled" in text else {}
        file.write_text(text.replace(mutant["find"], mutant["put"]), encoding="utf-8")
        found = run_tests(tests, root, limit, **apart)
    file.write_text(text, encoding="utf-8")
    os.utime(file, (date, date))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=HERE.parent.parent, help="the repository")
    parser.add_argument("--out", type=Path, default=Path("mutants.csv"), help="results; those it has are kept")
    parser.add_argument("--minutes", type=float, default=6, help="limit for each fault")
    parser.add_argument("--levels", type=int, default=1, help="2: also tests of modules that import the faulty one")
    parser.add_argument("--only", default="", help="part of a ROOM/ID, of those to be tried")
    given = parser.parse_args()
    rows = list(csv.reader(given.out.open())) if given.out.exists() else [["id", "room", "verdict", "by", "seconds"]]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(given.root, f"{folder}/copy", ignore=LEFT_OUT))
        for mutant in tomllib.loads(HERE.with_name("mutants.toml").read_text(encoding="utf-8"))["mutant"]:
            name, started = f"{mutant['room']}/{mutant['id']}", time.perf_counter()
            if given.only not in name or mutant["id"] in (row[0] for row in rows):
                continue
            verdict, by = try_mutant(mutant, copy, 60 * given.minutes, given.levels)
            sys.stderr.write(f"{name}: {verdict} {by}\n")
            rows.append([mutant["id"], mutant["room"], verdict, by, f"{time.perf_counter() - started:.0f}"])
            with given.out.open("w", newline="") as out:
                csv.writer(out).writerows(rows)
        killers = {row[3] for row in rows[1:] if row[2] == "killed"}
        if killers and (broken := run_tests(sorted(killers), copy, 3600)[1]):
            sys.exit(f"{broken} fails without any fault; leave it out: PYTEST_ADDOPTS='--deselect {broken}'")
    if alive := [f"{row[1]}/{row[0]}" for row in rows[1:] if row[2] != "killed"]:
        sys.exit(f"not noticed: {', '.join(alive)}")


if __name__ == "__main__":
    main()
