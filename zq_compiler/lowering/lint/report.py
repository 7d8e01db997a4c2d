"""What the lint found, as a table, as text, or as JSON."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group


class Severity(StrEnum):
    """What becomes of a node; from worst to mildest."""

    REFUSED = "refused"  # the file is not loaded, or fails when it runs
    WRONG = "wrong"  # it runs, and the results are not those that the file defines
    UNFUSED = "unfused"  # computed in floats, for all its quantization
    SLOW = "slow"  # as meant, but on a slow path
    NOTE = "note"  # depends on the machine or on the data


FAILING = (Severity.REFUSED, Severity.WRONG, Severity.UNFUSED)


@dataclass(frozen=True)
class Finding:
    """One node that a rule complains of.

    Args:
        rule: the rule's id.
        name: the rule's name.
        node: the node's name, or what it computes when it has none.
        op: its operator, with its domain unless that is ONNX's own.
        why: what is the matter with this node.
        mend: what to do about it.
    """

    rule: str
    name: str
    severity: Severity
    node: str
    op: str
    why: str
    mend: str


@dataclass
class LintReport:
    """Everything that is found in a file.

    Args:
        file: its path, or the model's name.
        target: the runtime.
        findings: by rule.
        nodes: how many were looked at.
        notes: what could not be looked at.
    """

    file: str
    target: str
    findings: list[Finding]
    nodes: int
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is refused, wrong or unfused."""
        return not any(f.severity in FAILING for f in self.findings)

    def by_rule(self) -> dict[str, list[Finding]]:
        """Findings of each rule, the worst first."""
        groups: dict[str, list[Finding]] = {}
        for finding in sorted(self.findings, key=lambda f: list(Severity).index(f.severity)):
            groups.setdefault(finding.rule, []).append(finding)
        return groups

    def to_json(self) -> dict[str, Any]:
        """Everything in plain types, for `json.dumps`."""
        return {**asdict(self), "ok": self.ok}

    def summary(self) -> str:
        """One line."""
        counts = {s: sum(f.severity is s for f in self.findings) for s in Severity}
        found = ", ".join(f"{n} {s.value}" for s, n in counts.items() if n) or "nothing to complain of"
        return f"{self.file} for {self.target}: {found} ({self.nodes} nodes)"

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        if self.findings:
            table = Table(show_lines=True)
            for column in ("rule", "", "nodes", "what is wrong", "to mend it"):
                table.add_column(column, overflow="fold")  # names whole, in narrow terminals too
            for found in self.by_rule().values():
                first = found[0]
                rule = Text(f"{first.rule}\n{first.name}")
                table.add_row(rule, first.severity.value, str(len(found)), Text(_where(found)), Text(first.mend))
            parts.append(table)
        return Group(*parts, *(Text(f"note: {note}") for note in self.notes), Text(self.summary()))

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=140).print(self)
        return out.getvalue().rstrip()


def _where(found: list[Finding], most: int = 2) -> str:
    """The first nodes of some findings, each with its reason."""

    def lines() -> Iterator[str]:
        for finding in found[:most]:
            yield f"{finding.node} ({finding.op}): {finding.why}"
        if len(found) > most:
            yield f"... and {len(found) - most} more"

    return "\n".join(lines())
