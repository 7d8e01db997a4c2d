"""What a rule is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .graph import Graph, Node
from .report import Severity

Complaints = Iterator[tuple[Node, str]]
Check = Callable[[Graph], Complaints]


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong with a node.

    Args:
        id: never used again for another rule.
        title: what the runtime does, in one sentence; the check's docstring.
        targets: runtimes it holds for.
        mend: what to do about it.
        source: who says so, where no test here can show it; else empty.
        check: gives the nodes of a graph that break it, each with the reason.
    """

    id: str
    name: str
    title: str
    targets: tuple[str, ...]
    severity: Severity
    mend: str
    source: str
    check: Check


REGISTERED: list[Rule] = []


def rule(
    id: str, name: str, severity: Severity, *targets: str, mend: str, source: str = ""
) -> Callable[[Check], Check]:
    """Register a check, a function of a graph whose docstring is the rule's title."""

    def register(check: Check) -> Check:
        title = " ".join((inspect.getdoc(check) or "").split())
        REGISTERED.append(Rule(id, name, title, targets, severity, mend, source, check))
        return check

    return register
