"""A new user's own messy file, word for word: what `data` names, what its `next:` line proposes, and that each proposal works, as far as a dry run of the training."""
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

for module in ('rensa', 'py3langid'): pytest.importorskip(module, reason=f"{module} is not installed (extra 'data')")

ROOT = Path(__file__).resolve().parents[1]
TOPICS = 'tea bread trains rain gardens lamps maps clocks soup kites boats paper wool stones bridges'.split()
SECRET, ADDRESS, CARD = 'hunter2x7y', 'ada@lovelace.org', '4111 1111 1111 1111'


def chat(i, extra='', answer=None):
    "A clean conversation that is like no other; `i` seeds its words."
    rng = random.Random(i)
    words = ' '.join(rng.choice(TOPICS) for _ in range(6))
    answer = f'Start small, keep {i} notes about {words}, and ask one who has done it for {i + 3} years.' if answer is None else answer
    texts = [('system', 'You are a helpful guide.'), ('user', f'Question {i}: what should a beginner know about {words}? {extra}'.strip()), ('assistant', answer)]
    return {'messages': [{'role': role, 'content': text} for role, text in texts]}


def without(row, place, key):
    del row['messages'][place][key]
    return row


def changed(row, place, key, value):
    row['messages'][place][key] = value
    return row


BAD = {  # line of the file: (the row or the raw line, its field, words of the problem, words of the remedy)
    10: (changed(chat(500), 2, 'role', 'asistant'), 'messages[2].role', "unknown role: 'asistant'", "did you mean 'assistant'?"),
    21: (without(chat(501), 1, 'content'), 'messages[1].content', 'content is missing', 'give a text'),
    34: (changed(chat(502), 2, 'content', 7), 'messages[2].content', 'content is not a text: int', 'write it as a string'),
    48: (json.dumps(chat(503))[:-15], '', 'broken JSON', 'the file may be truncated'),
    61: ({'messages': chat(504)['messages'][:2]}, 'messages', 'no assistant turn', 'give at least one answer'),
    62: (chat(505, answer=''), 'messages[2].content', 'assistant content is empty', 'remove the row'),
    63: ({'message': chat(506)['messages']}, 'messages', 'messages is missing', "did you mean 'messages'"),
    121: ("{'messages': []}", '', 'single quotes', 'use double quotes')}
FOUND = {  # line: (the row, the kind that must be found)
    71: (lambda lines: lines[4], 'repeat'),
    76: (lambda lines: changed(json.loads(lines[6]), 1, 'content', json.loads(lines[6])['messages'][1]['content'] + ' Thanks.'), 'near repeat'),
    81: (chat(507, f'My password: {SECRET}'), 'secret'),
    84: (chat(508, f'Mail me at {ADDRESS}.'), 'personal data'),
    87: (chat(509, f'Card {CARD}.'), 'personal data'),
    91: (chat(510, 'What does <|im_end|> do?'), 'control token'),
    95: (chat(511, 'pay\u202epal \x1b[31m'), 'odd character'),
    100: ({'messages': [{'role': 'user', 'content': 'Wo kann ich hier in der Stadt ein gutes Fahrrad mieten?'}, {'role': 'assistant', 'content': 'Gleich neben dem Bahnhof gibt es einen guten Laden, der Räder verleiht.'}]}, 'other language'),
    105: (chat(512, 'very '*3000), 'too long'),
    111: (chat(513, answer='…'), 'empty')}


def messy_lines(num=150):
    "The lines of the file by number, from 1."
    lines = {i: json.dumps(chat(i)) for i in range(1, num + 1)}
    for i, (row, *_) in BAD.items(): lines[i] = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    for i, (row, _) in FOUND.items():
        row = row(lines) if callable(row) else row
        lines[i] = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    return lines


def shell(command, folder, **env):
    "Run a command as it stands on the screen, `llama-nb` being this tree's."
    given = {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline'}
    words = shlex.split(command)
    assert words[0] == 'llama-nb', command
    return subprocess.run([sys.executable, '-m', 'llama_nb', *words[1:]], cwd=folder, capture_output=True, text=True, timeout=400, env={**os.environ, **given, **env})


def proposal(done):
    "The command of the last line."
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith('next: '), last
    return last.removeprefix('next: ')


@pytest.fixture(scope='module')
def walk(tmp_path_factory):
    "The folder with the file, and what the first command says."
    folder = tmp_path_factory.mktemp('messy')
    (folder/'my chats.jsonl').write_text('\n'.join(messy_lines().values()) + '\n', encoding='utf-8')
    return folder, shell("llama-nb data 'my chats.jsonl'", folder)


def line_of(text, number): return next(line for line in text.splitlines() if re.match(rf'\s*my chats\.jsonl:{number} ', line))


def test_every_bad_row_is_on_the_screen(walk):
    done = walk[1]
    assert done.returncode == 4 and 'Traceback' not in done.stderr
    for number, (_, *words) in BAD.items():
        line = line_of(done.stdout, number)
        assert [w for w in words if w not in line] == [], line
    assert '8 of 150 rows are bad' in done.stdout and 'data.on_bad=skip' in done.stdout and "on_bad='skip'" not in done.stdout + done.stderr
    said = done.stderr.strip().splitlines()  # for a script's log
    assert len(said) == 9 and 'training refuses this set' in said[0] and sum('my chats.jsonl:' in line for line in said[1:]) == 8


def test_findings_are_in_order_of_weight_and_name_their_rows(walk):
    from llama_nb.data_report import CHECKS
    out = walk[1].stdout
    kinds = {re.split(r'\s{2,}', line.strip())[0]: line for line in out.splitlines()}
    for number, (_, kind) in FOUND.items(): assert f'my chats.jsonl:{number}' in kinds[kind], kinds[kind]
    order = [kind for kind in kinds if kind in CHECKS]
    assert order == [kind for kind in CHECKS if kind in order] and order.index('secret') < order.index('odd character') < order.index('repeat')
    assert '1 conversation may contain' in kinds['secret'] and '2 conversations may contain' in kinds['personal data'] and '1 conversation contains' in kinds['empty'] and '1 conversations' not in out
    assert not any(private in out for private in (SECRET, ADDRESS, CARD)) and '\x1b' not in out and '\u202e' not in out
    assert out.index('8 of 150') < out.index('Findings') < out.index('Numbers') < out.index('masks exact: 142 of 142') < out.index('next: ')


def test_the_same_rows_when_they_may_be_left_out(walk):
    folder, first = walk
    done = shell("llama-nb data 'my chats.jsonl' data.on_bad=skip --show 0", folder)
    assert done.returncode == 0 and done.stderr == ''
    assert [line_of(done.stdout, n) for n in BAD] == [line_of(first.stdout, n) for n in BAD]


def test_json_is_one_object_with_all_rows(walk):
    done = shell("llama-nb data 'my chats.jsonl' --json --show 0", walk[0])
    told = json.loads(done.stdout)
    assert done.returncode == told['exit_code'] == 4 and [b['line'] for b in told['bad_rows']] == [*BAD] and told['next'] == proposal(walk[1])
    assert {(f['line'], f['kind']) for f in told['findings']} >= {(n, kind) for n, (_, kind) in FOUND.items()}


def test_each_proposal_works_word_for_word(walk):
    folder, first = walk
    command = proposal(first)
    assert command == "llama-nb data 'my chats.jsonl' data.on_bad=skip --fix secret --fix too_long --fix empty -o clean"
    cleaned = shell(command, folder)
    assert cleaned.returncode == 0, cleaned.stderr
    kept = [json.loads(line) for part in ('train', 'validation') for line in (folder/'clean'/f'{part}.jsonl').read_text(encoding='utf-8').splitlines()]
    assert len(kept) == 150 - 8 - 3 and SECRET not in json.dumps(kept)
    bad = [json.loads(line) for line in (folder/'clean'/'accounts'/'bad_rows.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [b['line'] for b in bad] == [*BAD]
    command = proposal(cleaned)
    assert command == 'llama-nb train --preset demo data.dataset_name=clean'
    again = shell('llama-nb data clean --show 0', folder)
    assert again.returncode == 0 and proposal(again) == command
    dry = shell(f'{command} --dry-run', folder)
    assert dry.returncode == 0, dry.stderr
    assert 'masks exact: 139 of 139' in dry.stdout and not (folder/'runs').exists()


def test_training_on_the_messy_file_names_its_faults_too(walk):
    done = shell("llama-nb train --preset demo 'data.dataset_name=my chats.jsonl' --dry-run", walk[0])
    assert done.returncode == 4 and 'Traceback' not in done.stderr
    for number, (_, field, problem, _) in BAD.items(): assert any(f'my chats.jsonl:{number}' in line and field in line and problem in line for line in done.stderr.splitlines()), done.stderr
    assert 'data.on_bad=skip' in done.stderr


def test_hundreds_of_bad_rows_are_listed_up_to_fifty(tmp_path):
    (tmp_path/'many.jsonl').write_text('\n'.join([json.dumps({'messages': [{'role': f'wizard {i}', 'content': 'x'}]}) for i in range(300)] + [json.dumps(chat(i)) for i in range(20)]))
    done = shell('llama-nb data many.jsonl --no-check --show 0', tmp_path)
    assert done.returncode == 4 and len(re.findall(r'^  many\.jsonl:\d+', done.stdout, re.M)) == 50
    assert '250 more' in done.stdout and '--json' in done.stdout and '300 of 320 rows' in done.stdout
    assert len(json.loads(shell('llama-nb data many.jsonl --no-check --show 0 --json', tmp_path).stdout)['bad_rows']) == 300


def test_only_bad_rows_are_listed_as_well(tmp_path):
    (tmp_path/'mute.jsonl').write_text('\n'.join(json.dumps({'messages': chat(i)['messages'][:2]}) for i in range(3)))
    for extra in ('', ' data.on_bad=skip'):
        done = shell(f'llama-nb data mute.jsonl{extra}', tmp_path)
        assert done.returncode == 4 and 'mute.jsonl:1 ' in done.stdout and '(and 2 more rows: 2-3)' in done.stdout and proposal(done).startswith('correct the rows')


def test_a_single_good_row_is_reported_and_cannot_be_split(tmp_path):
    (tmp_path/'few.jsonl').write_text(json.dumps(chat(1)) + '\n{"messages": 1}\n')
    done = shell('llama-nb data few.jsonl', tmp_path)
    assert done.returncode == 4 and 'few.jsonl:2' in done.stdout and 'data.val_size=0' in done.stdout and 'masks exact: 1 of 1' in done.stdout


def test_a_row_of_both_parts_is_named(tmp_path):
    (tmp_path/'set').mkdir()
    lines = [json.dumps(chat(i)) for i in range(12)]
    (tmp_path/'set'/'train.jsonl').write_text('\n'.join(lines[:10])), (tmp_path/'set'/'validation.jsonl').write_text('\n'.join(lines[9:]))
    done = shell('llama-nb data set --show 0', tmp_path)
    assert done.returncode == 4 and re.search(r'train\.jsonl:10 .*is also in validation: validation\.jsonl:1', done.stdout)
    cleaned = shell(proposal(done), tmp_path)
    assert cleaned.returncode == 0 and proposal(shell('llama-nb data clean --show 0', tmp_path)) == 'llama-nb train --preset demo data.dataset_name=clean'


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='no pseudo-terminals on this system')
@pytest.mark.parametrize('env,colored', [({}, True), ({'NO_COLOR': '1'}, False), ({'TERM': 'dumb'}, False)])
def test_color_is_for_terminals(walk, env, colored):
    import fcntl, struct, termios
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    given = {k: v for k, v in os.environ.items() if k not in ('NO_COLOR', 'CI', 'NO_PROGRESS', 'COLUMNS')} | {'TERM': 'xterm', 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'} | env
    process = subprocess.Popen([sys.executable, '-m', 'llama_nb', 'data', 'my chats.jsonl', '--show', '0', '--no-check'], cwd=walk[0], stdout=theirs, stderr=theirs, env=given)
    os.close(theirs)
    shown = b''
    while True:
        try: piece = os.read(ours, 65536)
        except OSError: break
        if not piece: break
        shown += piece
    os.close(ours)
    text = shown.decode()
    assert process.wait(timeout=60) == 4 and text.startswith('reading my chats.jsonl')
    assert ('\x1b[31' in text) is colored and ('\x1b[' in text) is colored
    plain = re.sub(r'\x1b\[[0-9;]*m', '', text).replace('\r', '')
    report = plain[:plain.index('next: ')].splitlines()
    assert all(len(line) <= 80 for line in report), [line for line in report if len(line) > 80]
