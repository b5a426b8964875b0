"""The equal work of the CPU benchmark: the same ids and taught tokens for every row, and no ratio of different work."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import cpu, row  # noqa: E402


def test_every_row_gets_the_same_ids_and_taught_tokens(monkeypatch):
    monkeypatch.setenv('LLAMA_NB_TEST_DATA', '')
    monkeypatch.setattr(row, 'EQUAL', 5)
    monkeypatch.setattr(row, 'real_conversations', lambda count=5, made=row.real_conversations: made(count))
    (made, examples, answers), (_, _, everything) = row.equal_examples('assistant'), row.equal_examples('all')
    assert len(made) == len(examples) == 5 and answers['tokens'] == everything['tokens'] and 0 < answers['taught_tokens'] < everything['taught_tokens'] < everything['tokens']
    assert answers['source'] == 'DailyDialog, the shipped sample'
    assert len(row.EQUAL_ROWS) == 7


def test_a_ratio_needs_the_same_work():
    work = dict(conversations=2, tokens=10, taught_tokens=4, seen_tokens=10, steps=1)
    rows = {'llama_nb, answers taught': dict(work, step_tokens_per_s=50., whole_tokens_per_s=20.), 'TRL as shipped, answers taught': dict(work, step_tokens_per_s=8., whole_tokens_per_s=10.)}
    found = cpu.compare_equal(rows)
    assert found == {'TRL as shipped, answers taught, a step': dict(ratio=6.25, at_least=5., reached=True), 'TRL as shipped, answers taught, the whole call': dict(ratio=2., at_least=4., reached=False)}
    rows['TRL as shipped, answers taught']['taught_tokens'] = 9
    with pytest.raises(ValueError, match='taught_tokens 9 instead of 4'): cpu.compare_equal(rows)
