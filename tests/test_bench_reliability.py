"""The list of what the reliability tests record is complete, so that an hour of tests does not end in a name nobody knows."""
import ast
from pathlib import Path

from bench.reliability import FILES, PLAN

TESTS = Path(__file__).parent


def recorded():
    "Each name that a test records -> the files that do."
    found = {}
    for path in sorted(TESTS.glob('test_*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'record': found.setdefault(ast.literal_eval(node.args[0]), set()).add(path.stem)
    return found


def test_every_recorded_name_has_its_place_in_the_plan():
    names = recorded()
    assert set(names) == set(PLAN)
    assert set.union(*names.values()) <= set(FILES)
