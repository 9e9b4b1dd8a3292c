"""Whether a model of a Triton server still works: ``python -m vflow.engines.triton_server.probe MODEL``, for a container's liveness probe.

Triton's own health endpoints go on saying yes when the process that runs the model has died. This asks that process something that it refuses at
once, and that takes no slot.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request

__all__ = ["why_dead"]

TIMEOUT = 15.0  # seconds; the question waits behind images that are being unpacked
ALIVE = ("give one of the inputs", "are waiting already", "shutting down")  # the model's own words


def why_dead(url: str, model: str) -> str | None:
    """What is wrong with a model, or None if it answers; ``url`` is that of Triton's HTTP endpoint."""
    try:
        with urllib.request.urlopen(f"{url}/v2/models/{model}/generate", data=b'{"stream": false}', timeout=TIMEOUT) as response:
            said = response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
    except OSError as error:
        return str(error)
    return None if any(words in said for words in ALIVE) else said


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="vflow.engines.triton_server.probe", description="Exit code 1 if a model of a Triton server is dead.")
    parser.add_argument("model")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    if reason := why_dead(arguments.url, arguments.model):
        sys.exit(reason)


if __name__ == "__main__":
    main()
