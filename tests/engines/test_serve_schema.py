"""Whatever the OpenAPI document allows, and whatever it does not, is answered as the document says and never by a crash."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving import MODEL, PATIENCE, serving
from vflow.engines import Batcher, Engine
from vflow.engines.serve.app import create_app
from vflow.engines.serve.options import ServeOptions

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
)
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
]


@pytest.fixture(scope="module")
def batcher(standin: Engine) -> Iterator[Batcher]:
    with Batcher(standin, slots=2, provider="cpu", threads=1) as batcher:
        yield batcher


@pytest.fixture(scope="module")
def address(batcher: Batcher) -> Iterator[str]:
    with serving(batcher, ServeOptions(model=MODEL)) as address:
        yield address


@pytest.fixture(scope="module")
def operations(batcher: Batcher) -> dict[tuple[str, str], Any]:
    description = create_app(batcher, ServeOptions(model=MODEL)).openapi()
    # So that not every example ends at an unknown model.
    description["components"]["schemas"]["ChatCompletionRequest"]["properties"]["model"] = {"type": "string", "enum": [MODEL]}
    schema = schemathesis.openapi.from_dict(description)
    found = [result.ok() for result in schema.get_all_operations()]
    return {(operation.method.upper(), operation.path): operation for operation in found}


def test_all_operations_are_tried_below(operations: dict[tuple[str, str], Any]) -> None:
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_every_response_is_one_that_the_document_names(
    operations: dict[tuple[str, str], Any], operation: tuple[str, str], mode: GenerationMode, address: str, batcher: Batcher
) -> None:
    chosen = operations[operation]
    if mode.is_negative and operation[0] == "GET":
        return  # nothing in it can be wrong

    @settings(max_examples=80 if operation[0] == "POST" else 3, suppress_health_check=list(HealthCheck))
    @given(chosen.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=address, checks=CHECKS, timeout=PATIENCE)

    run()
    assert batcher.stats().requests["error"] == 0
