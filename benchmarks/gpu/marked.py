"""The tests that are marked as needing a GPU, those files alone that have some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from gpu.steps import ROOT, Here, Skip


def run_tests(here: Here) -> dict[str, Any]:
    """Run them, and return how many passed, and of the others which and why."""
    import pytest  # noqa: F401 - a machine that lacks it skips this step

    files = [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in path.read_text("utf-8")
    ]
    report = here.folder / "marked.xml"
    command = [*(sys.executable, "-m", "pytest", "-q", "-m", "gpu"), f"--junitxml={report}", *files]
    ended = subprocess.run(command, cwd=ROOT, stdout=sys.stdout, stderr=sys.stderr, check=False)
    if not report.is_file():
        raise RuntimeError(f"pytest ended with exit code {ended.returncode} and no report")
    found = read_report(report)
    if not found["passed"] and not found["failed"]:
        here.keep(found)
        reasons = dict.fromkeys(found["skipped"].values())
        raise Skip("; ".join(reasons) or "no test carries the mark")
    failed = found["failed"]
    why = f"{len(failed)} failed, the first of them {next(iter(failed))}" if failed else None
    return here.keep(found, failed=why)


def read_report(path: Path) -> dict[str, Any]:
    """Return a JUnit report's passes, counted, and its failures and skips, with their reasons."""
    failed, skipped, passed = {}, {}, 0
    for case in ET.parse(path).iter("testcase"):
        name = case.get("name", "")
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            failed[name] = bad.get("message", "").partition("\n")[0]
        elif (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message", "")
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}
