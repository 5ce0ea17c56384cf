"""The page lists the rules that there are, and no others."""

import ast
import re
from pathlib import Path

from lamina.doctor import declared

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_lists_all_rules() -> None:
    known = {*declared._FAULTS, "broken-rows", "template-refuses-rows"}
    for file in [*(ROOT / "src/lamina/doctor").glob("*.py"), ROOT / "src/lamina/commands/check.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Name(id="Finding") | ast.Attribute(attr="refuse"), args=[ast.Constant(value=str(rule)), *_]
                ):
                    known.add(rule)
    known.add("other-template")  # made by a helper of its own
    table = (ROOT / "docs/doctor.md").read_text(encoding="utf-8").split("## All rules")[1]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    listed = [rule for line in rows for rule in re.findall(r"`([a-z0-9-]+)`", line.split(" | ")[0])]
    assert sorted(listed) == sorted(known)
