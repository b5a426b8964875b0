"""What a user sees in a notebook when something of theirs is wrong: the message, not our calls."""
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def outputs(*sources):
    "The outputs of cells in a fresh kernel, errors included."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(nb, timeout=120, kernel_name='python3', allow_errors=True, resources={'metadata': {'path': str(ROOT)}}).execute()
    return [cell.outputs for cell in nb.cells]


def test_a_fault_is_told_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.delenv('LLAMA_NB_DEBUG', raising=False)
    (tmp_path/'chats.jsonl').write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "robot", "content": "Hello"}]}\n')
    told, setting, ours, debug = outputs(f'from llama_nb import *; read_conversations({str(tmp_path/"chats.jsonl")!r})', 'DataConfig(on_bad="skp")', '1/0',
                                         f'import os; os.environ["LLAMA_NB_DEBUG"] = "1"; read_conversations({str(tmp_path/"chats.jsonl")!r})')
    assert told[-1].ename == 'DataError'
    assert len(told[-1].traceback) == 2 and "chats.jsonl:1 field messages[1].role: unknown role: 'robot'" in told[-1].traceback[1]
    assert all('File' not in line and len(line) <= 202 for line in told[-1].traceback)
    assert len(setting[-1].traceback) <= 2 and "did you mean 'skip'?" in '\n'.join(setting[-1].traceback), setting[-1].traceback
    assert any('ZeroDivisionError' in line for line in ours[-1].traceback) and len(ours[-1].traceback) > 2  # not ours: as usual
    assert any('formats.py' in line for line in debug[-1].traceback)
