"""The description of the API: committed, true, and safe to throw at the API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute

from mica.api.openapi import document

ROOT = Path(__file__).parents[2]


def test_the_committed_description_is_the_present_one() -> None:
    assert (ROOT / "openapi.json").read_bytes() == document(), "run: python -m mica.api.openapi > openapi.json"


def test_it_is_the_same_in_another_process() -> None:
    """Hash randomisation and import order must not show."""
    done = subprocess.run([sys.executable, "-m", "mica.api.openapi"], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout == document()


def test_every_route_is_described_and_says_what_it_is_for(app: Litestar) -> None:
    spec = json.loads(document())
    described = {(path, method.upper()) for path, item in spec["paths"].items() for method in item}
    hidden = {("/v1/openapi.json", "GET")}
    served = {
        (route.path_format, method)
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods
        if method != "OPTIONS"
    }
    assert served == described | hidden
    operations = [operation for item in spec["paths"].values() for operation in item.values()]
    assert all(operation["summary"] for operation in operations)
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", ["ProblemBody", "VmView", "VmCreate", "Operation", "Event"])
def test_the_shapes_that_clients_need_are_there(name: str) -> None:
    spec = json.loads(document())
    assert spec["components"]["schemas"][name]["properties"]


def test_the_reference_lists_all_routes() -> None:
    spec = json.loads(document())
    expected = [
        f"| `{method.upper()}` | `{path}` | {item[method]['summary']} |"
        for path, item in sorted(spec["paths"].items())
        for method in ("get", "post", "put", "patch", "delete")
        if method in item
    ]
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    found = [line for line in page.partition("## Routes")[2].splitlines() if line.startswith("| `")]
    assert found == expected
