"""What the software has, it uses: no function is there for tests alone."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minitron_megatron"
# Called by the libraries whose classes they are written for.
OF_OTHERS = {
    "MegatronLM": {"loglikelihood_rolling"},
    "TransformersLM": {"loglikelihood_rolling", "_create_model"},
    "_StreamPlanner": {"set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"},
    "_Unpickler": {"find_class"},
    "_Console": {"on_broken_pipe"},
    "_Stream": {"record_event"},
    "Epochs": {"index_split"},
}


def used_names() -> Counter[str]:
    """How often each name stands in the package's code, in its templates and in what conf/ and launch/ call."""
    found: Counter[str] = Counter()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Name):
                found[node.id] += 1
            elif isinstance(node, ast.Attribute):
                found[node.attr] += 1
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                # Commands are named "module:function"; annotations may be in quotes.
                found.update(re.findall(r"(?:^|:)(\w+)$", node.value))
    beside = [*(ROOT / "conf").rglob("*.*"), *(ROOT / "launch").glob("*.py")]
    for file in [*beside, *PACKAGE.rglob("*.jinja"), *PACKAGE.rglob("*.html")]:
        found.update(re.findall(r"\w+", file.read_text()))
    return found


def test_every_function_is_used_by_the_software_itself():
    used, unused, others = used_names(), [], set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            inside = [one for one in node.body if isinstance(one, ast.FunctionDef) and not one.name.startswith("__")]
            for name in (node.name, *(one.name for one in inside if isinstance(node, ast.ClassDef))):
                if name in OF_OTHERS.get(node.name, ()):
                    others.add((node.name, name))
                elif not used[name]:
                    unused.append(f"{file.relative_to(ROOT)}: {name}")
    assert unused == []
    assert others == {(kind, name) for kind, names in OF_OTHERS.items() for name in names}
