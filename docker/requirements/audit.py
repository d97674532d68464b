"""Asks a vulnerability service about every locked package, by pip-audit: python docker/requirements/audit.py.

Options go on to pip-audit (--ignore-vuln ID). The service is OSV's, or that of PIP_AUDIT_OSV_URL. Exit status: 0 none of
the packages has a known vulnerability, 1 some have, 2 pip-audit failed, 3 no service answered, so nothing is known.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import requests

LOCKS = sorted(Path(__file__).parent.glob("*.txt"))
SERVICE = os.environ.get("PIP_AUDIT_OSV_URL", "https://api.osv.dev/v1/query")
SECONDS = 15
# Its sandbox could be left (CVE-2019-10906): a service that does not know that knows nothing of the rest either.
KNOWN = {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "version": "2.10"}


def why_not() -> str | None:
    """Why the service's answers cannot be relied on; None when they can."""
    try:
        response = requests.post(SERVICE, json=KNOWN, timeout=SECONDS)
        response.raise_for_status()
        answer = response.json()
        if isinstance(answer, dict) and answer.get("vulns"):
            return None
        return "it knows no vulnerability of jinja2 2.10, which has some"
    except requests.HTTPError as error:
        return f"HTTP {error.response.status_code}"
    except requests.JSONDecodeError:
        return "its answer is not JSON"
    except requests.RequestException as error:
        return type(error).__name__


def locked() -> list[str]:
    """Every requirement of the locks, once. A build's label (+cpu) goes: services know versions as they were published."""
    text = "\n".join(lock.read_text() for lock in LOCKS)
    return sorted({re.sub(r"\+\w+", "", line).strip() for line in re.findall(r"(?m)^[A-Za-z0-9][^\\\n]*", text)})


def audit(options: list[str]) -> tuple[list[dict], str]:
    """Per package of this platform name, version and vulns, as pip-audit gives them; and its last line."""
    with tempfile.TemporaryDirectory() as temporary:
        requirements, result = Path(temporary, "requirements.txt"), Path(temporary, "result.json")
        requirements.write_text("\n".join(locked()))
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "pip_audit",
                    "--vulnerability-service",
                    "osv",
                    "--osv-url",
                    SERVICE,
                    "--strict",
                ),
                *("--requirement", requirements, "--no-deps", "--disable-pip", "--cache-dir", temporary),
                *(
                    "--format",
                    "json",
                    "--output",
                    result,
                    "--progress-spinner",
                    "off",
                    "--timeout",
                    str(SECONDS),
                    *options,
                ),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        packages = json.loads(result.read_text())["dependencies"] if result.exists() else []
        return packages, (done.stderr.strip().splitlines() or ["no word"])[-1]


def main(options: list[str]) -> int:
    """The exit status."""
    reason = why_not()
    packages, last_line = ([], "") if reason else audit(options)
    if not packages and (reason := reason or why_not()):
        print(f"NOT RUN HERE: the audit of the locked packages: {SERVICE} does not answer as it should: {reason}")
        return 3
    if not packages:
        print(f"Error: pip-audit ended without a result: {last_line}", file=sys.stderr)
        return 2
    found = [(package, fault) for package in packages for fault in package["vulns"]]
    for package, fault in found:
        fixed = f"fixed in {', '.join(fault['fix_versions'])}" if fault["fix_versions"] else "not fixed in any version"
        print(f"{package['name']} {package['version']}: {fault['id']}, {fixed}: {fault['description'][:160]}")
    print(
        f"audited   {len(packages)} packages of {', '.join(lock.name for lock in LOCKS)}, by {SERVICE}: "
        f"{len(found) or 'no'} known vulnerabilit{'y' if len(found) < 2 else 'ies'}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
