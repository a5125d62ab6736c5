"""Run the suite on the faulty block, and print the first failure of each check."""

from driver import FaultyDriver

from nonlocal_conformance import run_checks

seen = set()
for result in run_checks(FaultyDriver(), on_failure="return"):
    if result.outcome == "failed" and result.check not in seen:
        seen.add(result.check)
        print(f"{result.id}\n    {result.message}")
