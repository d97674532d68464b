"""The audit of the locked packages, against a stand-in for OSV's service on loopback."""

import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import ROOT

REQUIREMENTS = ROOT / "docker/requirements"
CONTROL = ("jinja2", "2.10")


def pins(name):
    """(package, version) of a lock, whatever platform they are for."""
    return re.findall(r"(?m)^([\w.-]+)==([^\s;\\]+)", (REQUIREMENTS / f"{name}.txt").read_text())


def fault(package, number="PYSEC-2099-1", **values):
    """A vulnerability as OSV describes it: https://ossf.github.io/osv-schema/."""
    fixed = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}
    affected = [{"package": {"name": package, "ecosystem": "PyPI"}, "ranges": [fixed]}]
    return {"id": number, "summary": f"{package} lets anybody in", "affected": affected, **values}


@contextmanager
def service(known, answers=10**6, status=200, body=None):
    """(its address, what it was asked): `known` maps (package, version) to faults; after so many answers it says 503."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((query["package"]["name"], query["version"]))
            faults = known.get(asked[-1])
            self.send_response(status if len(asked) <= answers else 503)
            self.end_headers()
            self.wfile.write(body if body is not None else json.dumps({"vulns": faults} if faults else {}).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        server.server_close()


def audit(address, *options):
    environment = os.environ | {"PIP_AUDIT_OSV_URL": address, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, REQUIREMENTS / "audit.py", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


KNOWS_THE_CONTROL = {CONTROL: [fault(*CONTROL)]}


def test_every_locked_package_is_asked_for_and_none_is_vulnerable():
    with service(KNOWS_THE_CONTROL) as (address, asked):
        result = audit(address)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("audited   ")
    assert result.stdout.endswith(f"by {address}: no known vulnerability\n")
    everywhere = [lock.name for lock in REQUIREMENTS.glob("*.txt") if lock.stem not in ("base", "dev")]
    assert sorted(everywhere) == ["torch-cpu.txt", "torch-cuda.txt"]
    # what has no marker is on every platform, so on this one
    here = re.findall(r"(?m)^([\w.-]+)==(\S+) \\$", (REQUIREMENTS / "base.txt").read_text())
    assert len(here) > 70
    assert set(here) <= set(asked)
    # the CPU build's label is not part of the published version
    assert ("torch", pins("torch-cpu")[0][1].removesuffix("+cpu")) in asked
    assert not [version for _, version in asked if "+" in version]


def test_a_vulnerability_of_a_locked_package_is_named_and_fails():
    package, version = next(pin for pin in pins("base") if pin[0] == "click")
    with service(KNOWS_THE_CONTROL | {(package, version): [fault(package, aliases=["CVE-2099-7"])]}) as (address, _):
        result = audit(address)
        ignored = audit(address, "--ignore-vuln", "CVE-2099-7")
    assert result.returncode == 1
    line, summary = result.stdout.splitlines()
    assert line == f"click {version}: PYSEC-2099-1, fixed in 99.1: click lets anybody in"
    assert summary.endswith("1 known vulnerability")
    assert ignored.returncode == 0
    assert ignored.stdout.endswith("no known vulnerability\n")


def test_a_vulnerability_in_any_of_the_locks_is_found():
    known = {
        pin: [fault(pin[0])] for name in ("dev", "torch-cuda") for pin in pins(name) if pin[0] in ("pytest", "torch")
    }
    assert len(known) == 2
    with service(KNOWS_THE_CONTROL | known) as (address, _):
        result = audit(address)
    assert result.returncode == 1
    assert [line.split()[0] for line in result.stdout.splitlines()[:-1]] == ["pytest", "torch"]


@pytest.mark.parametrize(
    "what,why",
    [
        ({"known": {}}, "it knows no vulnerability of jinja2 2.10"),
        ({"known": {}, "body": b"[]"}, "it knows no vulnerability of jinja2 2.10"),
        ({"known": {}, "body": b"<html>log in here</html>"}, "its answer is not JSON"),
        ({"known": {}, "status": 403}, "HTTP 403"),
        ({"known": KNOWS_THE_CONTROL, "answers": 10}, "HTTP 503"),  # ten packages were audited, the rest were not
    ],
    ids=["empty answers", "another answer", "a log-in page", "refused", "stops half-way"],
)
def test_a_service_that_cannot_be_relied_on_is_said_loudly_and_is_no_clean_audit(what, why):
    with service(**what) as (address, _):
        result = audit(address)
    assert result.returncode == 3
    assert result.stdout.startswith(
        f"NOT RUN HERE: the audit of the locked packages: {address} does not answer as it should"
    )
    assert why in result.stdout
    assert result.stdout.count("\n") == 1


def test_a_service_that_is_not_there_is_said_loudly():
    with service({}) as (address, _):
        pass
    result = audit(address)
    assert (result.returncode, result.stderr) == (3, "")
    assert result.stdout.startswith("NOT RUN HERE: the audit of the locked packages: ")
    assert result.stdout.endswith("ConnectionError\n")


def test_a_pip_audit_that_fails_by_itself_is_no_missing_service():
    with service(KNOWS_THE_CONTROL) as (address, _):
        result = audit(address, "--no-such-option")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: pip-audit ended without a result: ")
    assert "no-such-option" in result.stderr


@pytest.mark.parametrize(
    "status,required,goes_on", [(0, "0", True), (1, "0", False), (2, "0", False), (3, "0", True), (3, "1", False)]
)
def test_ci_goes_on_without_a_service_and_stops_at_a_vulnerability(status, required, goes_on, tmp_path):
    line = re.search(r"(?m)^.*audit\.py.*$", (ROOT / ".ci/run").read_text()).group()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {status}\n")
    python.chmod(0o755)
    environment = os.environ | {"REQUIRE_AUDIT": required}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{line}\necho on"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert (done.stdout == b"on\n") == goes_on


def test_pip_audit_is_in_no_image():
    assert "pip-audit" in dict(pins("dev"))
    for name in ("base", "torch-cpu", "torch-cuda"):
        assert "pip-audit" not in dict(pins(name))
