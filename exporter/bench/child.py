"""The process of one subject: a line in, a line out. It ends when its input does.

The first line is a ``SubjectSpec``, answered with versions when it is loaded and warm; every further one a ``Request``, answered with a ``Timing``.
What a user can mend is answered as ``{"error": line}``; anything else ends the process, and its last words are the message.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ...engines.errors import EngineError
from .measurement import WARM_UP, Request, Subject
from .subjects import SubjectSpec, load_subject

__all__ = ["main"]


def main() -> None:
    """Serve requests from stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    subject: Subject | None = None
    while line := sys.stdin.readline():
        try:
            if subject is None:
                subject = load_subject(SubjectSpec(**json.loads(line)))
                subject.measure(WARM_UP)
                answer: dict[str, Any] = {"versions": subject.versions}
            else:
                answer = subject.measure(Request(**json.loads(line))).to_dict()
        except EngineError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
