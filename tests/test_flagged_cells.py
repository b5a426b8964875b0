"""Cells behind a flag (slow, gpu, network) do not run in CI. That every name in them exists is checked all the same."""
import ast
import builtins
import importlib
import json
import re
import symtable
from pathlib import Path

import pytest
from conftest import FLAGS

NBS = Path(__file__).resolve().parents[1]/'nbs'
FLAGGED = re.compile(rf"^#\|\s*({'|'.join(FLAGS)})\b", re.M)


def code_cells(path):
    "Index and source of the code cells; lines that only IPython understands are left out."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [(i, re.sub(r'^[%!].*$', '', ''.join(c['source']), flags=re.M)) for i, c in enumerate(cells) if c['cell_type'] == 'code']


def tables(table):
    "A symbol table and all below it."
    yield table
    for child in table.get_children(): yield from tables(child)


def bound(source):
    "Names a cell leaves at the top of the notebook, star imports included."
    top = symtable.symtable(source, 'cell', 'exec')
    names = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    names |= {s.get_name() for t in tables(top) for s in t.get_symbols() if s.is_declared_global()}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == '*':
            module = importlib.import_module(node.module)
            names |= set(getattr(module, '__all__', [n for n in dir(module) if n[0] != '_']))
    return names


def wanted(source):
    "Names a cell reads from the top of the notebook."
    top = symtable.symtable(source, 'cell', 'exec')
    return {s.get_name() for t in tables(top) for s in t.get_symbols() if s.is_referenced() and (s.is_global() or t is top)}


def undefined(cells):
    "`(index, name)` of the names that flagged cells read and that neither they nor an earlier cell define."
    known, wrong = {*dir(builtins), '__file__', '__name__', 'get_ipython', 'display'}, []
    for i, source in cells:
        known |= bound(source)
        if FLAGGED.search(source): wrong += [(i, name) for name in sorted(wanted(source) - known)]
    return wrong


NOTEBOOKS = [p for p in sorted(NBS.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts and any(FLAGGED.search(s) for _, s in code_cells(p))]


def test_the_check_finds_a_missing_name():
    cells = [(0, 'import math\ndef f(x): return helper(x)'), (1, '#| gpu\nf(math.pi)'), (2, '#| slow\nmissing(1); [y for y in range(3)]; (lambda z: z + other)(1)')]
    assert undefined(cells) == [(2, 'missing'), (2, 'other')]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_name_in_a_flagged_cell_exists(path):
    assert not undefined(code_cells(path))
