"""Sixty bad inputs, built by code: each has one stated outcome when faults raise and one when they are skipped.

An outcome is one line per fault with file, physical line, field and remedy: at most 200 characters, at most 80 of the user's text, and never another exception.
Every text of the user below is made of the letter ж, so that what a message quotes can be counted."""
import gzip
import io
import json
import os
import zipfile

import pytest

from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from llama_nb.data import ChatDatasetLoader, DailyDialogDatasetLoader, load_data
from llama_nb.quality import check_data
from llama_nb.data_report import data_report
from llama_nb.conversation import IGNORE_INDEX
from llama_nb.dialogue import encode
from llama_nb.segments import stop_ids
from llama_nb.template import toy_tokenizer
from llama_nb.errors import DataError, LlamaNbError, one_line
from llama_nb.files import save_bad_rows, source_rows
from llama_nb.formats import read_conversations

USER = 'ж'*300
FULL = object()  # a fault of the whole file: raised in both modes


def talk(*roles, text=USER): return dict(messages=[dict(role=r, content=text) for r in roles])
def with_content(content, role='user'): return dict(messages=[dict(role=r, content=content if r == role else USER) for r in ('user', 'assistant')])
def dumps(row): return row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()


GOOD = dumps(talk('user', 'assistant'))
ROWS = {  # a bad row between two good ones: number -> (the line, what the message must say)
    1: (b'{"messages": [{"role": "user" "content": "x"}]}', 'broken JSON: column'),
    10: (GOOD[:30] + b'\xe9' + GOOD[30:], 'not UTF-8: byte 0xE9 at offset 31'),
    11: (b'{"messages": [{"role": "user", "content": "a\0b"}]}', 'raw control character U+0000'),
    13: (rb'{"messages": [{"role": "user", "content": "a \ud83d b"}, {"role": "assistant", "content": "x"}]}', 'half a surrogate pair: U+D83D'),
    14: (b"{'messages': []}", 'use double quotes'),
    15: (GOOD[:-1] + b',}', 'trailing comma'),
    18: (b'"' + USER.encode() + b'"', 'not an object: str (expected an object'),
    19: (b'{"messages": [], "messages": []}', 'key appears twice'),
    20: (GOOD[:-1] + b', "score": NaN}', 'not a JSON number: NaN'),
    21: (GOOD[:-1] + b', "n": ' + b'9'*5000 + b'}', 'integer too long: 5000 digits'),
    22: (GOOD[:-1] + b', "n": ' + b'['*5000 + b']'*5000 + b'}', 'nested too deeply'),
    25: (dumps(talk('user', 'assistant', text='ж'*5_000_000)), 'row too long: 20,000,'),
    26: ({'id': 3, 'title': USER, 'text': USER}, 'found id, title, text'),
    27: (dict(message=talk('user', 'assistant')['messages']), "did you mean 'messages' where it says 'message'?"),
    29: (dict(messages=None), 'messages is null'),
    30: (dict(messages=USER), 'messages is not a list: str'),
    31: (dict(messages=[]), 'messages is empty'),
    32: (dict(messages=[*talk('user', 'assistant')['messages'], dict(content=USER)]), 'field messages[2].role: role is missing: found content'),
    33: (with_content(None), 'field messages[0].content: content is null'),
    34: (with_content(7), 'content is not a text: int'),
    35: (with_content([dict(type='image', url=USER)]), "field messages[0].content[0]: not a text: 'image'"),
    36: (with_content(' \n\t'), 'user content is empty'),
    37: (with_content('', 'assistant'), 'the model would learn empty replies'),
    38: (talk('user', 'usr'), "unknown role: 'usr' (use system, user, assistant, tool"),
    40: (talk('assistant', 'assistant'), 'assistant speaks first'),
    41: (talk('user', 'assistant', 'assistant'), 'field messages[2].role: two assistant turns in a row'),
    42: (talk('user', 'assistant', 'system', 'user', 'assistant'), 'system message is not first'),
    43: (talk('user'), 'nothing to train on'),
}
MORE_ROWS = {  # further forms of the same numbers
    11.1: (b'{"messages": [{"role": "user", "content": "' + USER.encode() + b'\x01"}]}', 'raw control character U+0001'),
    18.1: (b'[1, 2]', 'not an object: list'), 18.2: (b'17', 'not an object: int'),
    20.1: (GOOD[:-1] + b', "score": -Infinity}', 'not a JSON number: -Infinity'), 20.2: (GOOD[:-1] + b', "score": 1e999}', 'not a JSON number'),
    22.1: (b'['*5000, 'nested too deeply'),
    32.1: (dict(messages=[USER, USER]), 'field messages[0]: not an object: str'), 32.2: (dict(messages=[dict(role='user')]), 'field messages[0].content: content is missing'),
    38.1: (talk('user', 'ass\nistant'), 'unknown role'), 38.2: (talk('user', '<b>' + USER), 'unknown role'),
    42.1: (talk('system', 'system', 'user', 'assistant'), 'system message is not first'),
    36.1: (with_content('\u3000\xa0'), 'user content is empty'),
}
WHOLE = {  # the whole file: number -> (name, bytes, what the message must say)
    4: ('rows.jsonl', b'', 'file is empty'),
    5: ('rows.jsonl', b'\n  \n\r\n', 'no rows'),
    9: ('rows.jsonl', GOOD.decode().encode('utf-16'), 'looks like UTF-16 (save it as UTF-8)'),
    17: ('rows.jsonl', json.dumps(talk('user', 'assistant'), indent=2).encode(), 'rename it to .json'),
    23: ('rows.jsonl.gz', gzip.compress(os.urandom(64).hex().encode()*50 + GOOD*50)[:-40], 'incomplete or damaged'),
    24: ('rows.jsonl.gz', gzip.compress((b' '*999_999 + b'\n')*100), 'expands to over'),
}
GOOD_FILES = {  # accepted: number -> (name, bytes, lines of the conversations, notes)
    6: ('rows.jsonl', b'\n\n' + GOOD + b'\n\n' + GOOD + b'\n\n', [3, 5], {}),
    7: ('rows.jsonl', GOOD + b'\r\n' + GOOD + b'\r\n', [1, 2], {}),
    8: ('rows.jsonl', b'\xef\xbb\xbf' + GOOD + b'\n' + GOOD, [1, 2], {}),
    12: ('rows.jsonl', dumps(with_content('a\0b')), [1], {'NUL character kept': 1}),
    17: ('rows.json', json.dumps(talk('user', 'assistant'), indent=2).encode(), [1], {}),
    28: ('rows.jsonl', dumps(dict(conversations=[{'from': 'human', 'value': USER}, {'from': 'gpt', 'value': USER}])), [1], {}),
    39: ('rows.jsonl', dumps(talk('Human', ' GPT')) + b'\n' + dumps(talk('User', 'Assistant')), [1, 2], {}),
    40: ('rows.jsonl', dumps(talk('assistant', 'user', 'assistant')), [1], {'opening assistant turn dropped': 1}),
    41: ('rows.jsonl', dumps(talk('user', 'user', 'assistant')), [1], {'user turns in a row joined': 1}),
    44: ('rows.jsonl', dumps(talk('user', 'assistant', 'user')), [1], {'trailing user turn dropped': 1}),
}
SEEN = set()  # numbers with a test, counted at the end


def put(folder, name, data):
    path = folder/name
    path.write_bytes(data)
    return path


def check_message(error):
    "One line per fault, short, with little of the user's text."
    lines = str(error).split('\n')
    assert all(len(line.strip()) <= 200 and line.count('ж') <= 80 for line in lines), lines
    assert len(one_line(error)) <= 200 and 'Traceback' not in str(error)
    assert isinstance(error, LlamaNbError) and error.__cause__ is None
    return lines


def refused(do, *says):
    "The lines of the `DataError` that something raises."
    with pytest.raises(DataError) as caught: do()
    lines = check_message(caught.value)
    for part in says: assert part in str(caught.value), lines
    return caught.value


def check_row(tmp_path, row, says, line=4):
    "A bad row at a physical line, in both modes."
    path = put(tmp_path, 'rows.jsonl', GOOD + b'\n\n \n' + dumps(row) + b'\n' + GOOD + b'\n')
    error = refused(lambda: read_conversations(path), f'rows.jsonl:{line}', says)
    assert [b.source.line for b in error.faults] == [line]
    kept = read_conversations(path, on_bad='skip')
    assert [c.row.line for c in kept] == [1, line + 1] and [b.source.line for b in kept.bad] == [line] and kept.num_rows == 3
    saved = save_bad_rows(kept.bad, tmp_path/'bad_rows.jsonl').read_text(encoding='utf-8')
    assert json.loads(saved)['line'] == line and saved.count('ж') <= 80


@pytest.mark.parametrize('number', [*ROWS, *MORE_ROWS])
def test_a_bad_row_is_named_or_skipped(number, tmp_path):
    check_row(tmp_path, *{**ROWS, **MORE_ROWS}[number])
    SEEN.add(int(number))


@pytest.mark.parametrize('number', WHOLE)
def test_a_bad_file_is_refused_in_both_modes(number, tmp_path):
    name, data, says = WHOLE[number]
    path = put(tmp_path, name, data)
    for on_bad in ('raise', 'skip'): assert len(str(refused(lambda: read_conversations(path, on_bad=on_bad), says)).split('\n')) == 1
    SEEN.add(number)


@pytest.mark.parametrize('number', GOOD_FILES)
def test_what_looks_odd_and_is_right_is_read(number, tmp_path):
    name, data, lines, notes = GOOD_FILES[number]
    for on_bad in ('raise', 'skip'):
        got = read_conversations(put(tmp_path, name, data), on_bad=on_bad)
        assert [c.row.line for c in got] == lines and dict(got.notes) == notes and not got.bad
    SEEN.add(number)


def test_02_a_last_line_that_is_cut_off(tmp_path):
    path = put(tmp_path, 'rows.jsonl', GOOD + b'\n' + GOOD[:-40])
    refused(lambda: read_conversations(path), 'rows.jsonl:2', 'the file may be truncated')
    assert len(read_conversations(path, on_bad='skip')) == 1
    SEEN.add(2)


def test_03_a_late_fault_in_a_large_file_has_its_line(tmp_path):
    row = dumps(talk('user', 'assistant', text='ж'*230))
    path = put(tmp_path, 'rows.jsonl', b'\n'.join([row]*19_999 + [b'{"messages": 1}', row]))
    assert path.stat().st_size > 19e6
    assert [b.source.line for b in refused(lambda: read_conversations(path), 'rows.jsonl:20000 field messages').faults] == [20_000]
    assert len(read_conversations(path, on_bad='skip')) == 20_000
    SEEN.add(3)


def test_16_an_array_in_a_jsonl_file(tmp_path):
    one, many = json.dumps([talk('user', 'assistant')]*2), json.dumps([talk('user', 'assistant')]*2, indent=1)
    refused(lambda: read_conversations(put(tmp_path, 'one.jsonl', one.encode())), 'one.jsonl:1', 'belongs in a .json file')
    refused(lambda: read_conversations(put(tmp_path, 'many.jsonl', many.encode())), 'rename it to .json')
    assert len(read_conversations(put(tmp_path, 'one.json', one.encode()))) == len(read_conversations(put(tmp_path, 'many.json', many.encode()))) == 2
    SEEN.add(16)


def encoded(tokenizer, rows, max_length=150, **settings):
    from llama_nb.examples import encode_all
    return encode_all(read_conversations(rows), tokenizer, DataConfig(**settings), max_length)


def test_45_longer_than_max_length():
    tokenizer, rows = toy_tokenizer(), [talk('user', 'assistant', 'user', 'assistant', text='Hello there. '*10), talk('user', 'assistant', text='Hello.'), talk('user', 'assistant', text='ж'*500)]
    refused(lambda: encoded(tokenizer, rows), '2 conversations cannot be taught', 'list:1', 'list:3', 'max_length 150')
    done, touched = encoded(tokenizer, rows, on_overflow='drop')
    assert [str(e.row) for e in done] == ['list:2'] and touched['dropped'] == ['list:1', 'list:3']
    done, touched = encoded(tokenizer, rows, max_length=100, on_overflow='drop_turns')
    assert [str(e.row) for e in done] == ['list:1', 'list:2'] and touched['shortened'] == ['list:1'] and touched['dropped'] == ['list:3']
    assert all(e.labels[-1] in stop_ids(tokenizer) and len(e) <= 100 for e in done)  # no answer lost its end
    done, touched = encoded(tokenizer, rows, on_bad='skip')
    assert len(done) == 1 and touched['bad'] == ['list:1', 'list:3']
    SEEN.add(45)


def test_46_nothing_taught_is_left():
    tokenizer = toy_tokenizer()
    row = talk('user', 'assistant', 'user', 'assistant', text='Hello there. '*10)
    row['messages'][3]['train'] = False
    refused(lambda: encoded(tokenizer, [row], max_length=100, on_overflow='drop_turns'), 'list:1', 'nothing to train on')
    done, touched = encoded(tokenizer, [row], max_length=100, on_overflow='drop_turns', on_bad='skip')
    assert not done and touched['bad'] == ['list:1']
    SEEN.add(46)


def test_47_control_tokens_in_text_are_text():
    tokenizer, hostile = toy_tokenizer(), '<|im_end|> <|eot_id|> </s> ' + 'ж'*10
    got = read_conversations([with_content(hostile), talk('user', 'assistant')])
    example = encode(got[0], tokenizer)
    clean = encode(talk('user', 'assistant', text='Hello.'), tokenizer)
    control = {tokenizer.convert_tokens_to_ids(t) for t in ('<|im_end|>', '<|eot_id|>', '<|begin_of_text|>')}
    assert sum(i in control for i in example.input_ids) == sum(i in control for i in clean.input_ids)
    assert hostile in tokenizer.decode(example.input_ids) and data_report(got).control_strings == 1
    SEEN.add(47)


def test_48_plain_text_borders_of_llama_2():
    tokenizer = toy_tokenizer('piece')
    for mark in ('[INST]', '[/INST]', '<<SYS>>'):
        rows = [with_content(f'Hello {mark}'), talk('user', 'assistant', text='Hello.')]
        refused(lambda: encoded(tokenizer, rows), 'list:1', mark, 'llama-2')
        done, touched = encoded(tokenizer, rows, on_bad='skip')
        assert len(done) == 1 and touched['bad'] == ['list:1']
    SEEN.add(48)


@pytest.mark.parametrize('number,marks', [(49, '\U000f0000\U000f0001'), (50, '\u202e\u2066'), (50, '\u200b\u2060')])
def test_49_50_marks_that_nobody_sees_are_kept_and_counted(number, marks):
    rows = read_conversations([with_content(f'Hello{mark} there {mark}.') for mark in marks] + [talk('user', 'assistant', text='Hello.')])
    assert all(mark in c.messages[0].content for mark, c in zip(marks, rows))
    tokenizer = toy_tokenizer()
    assert all(mark in tokenizer.decode(encode(c, tokenizer).input_ids) for mark, c in zip(marks, rows))
    report = check_data(load_data(rows, val_size=0)).report
    assert report.counts['odd character'] == len(marks) and any('invisible' in w for w in report.warnings)
    SEEN.add(number)


def test_51_exact_copies_are_counted():
    rows = [talk('user', 'assistant', text=f'{USER} {i}') for i in range(96)]
    report = data_report(read_conversations(rows + rows[:4]))
    assert report.duplicates == 4 and any('repeat another' in w for w in report.warnings)
    assert not any('repeat another' in w for w in data_report(read_conversations(rows)).warnings)
    SEEN.add(51)


def test_52_the_same_dialogue_in_train_and_validation(tmp_path):
    rows = [dumps(talk('user', 'assistant', text=f'{USER} {i}')) for i in range(6)]
    put(tmp_path, 'train.jsonl', b'\n'.join(rows[:5])), put(tmp_path, 'validation.jsonl', b'\n'.join(rows[4:]))
    refused(lambda: ChatDatasetLoader(tmp_path).data, 'train.jsonl:5', 'validation.jsonl:1')
    data = ChatDatasetLoader(tmp_path, on_bad='skip').data
    assert (len(data.train), len(data.validation)) == (4, 2) and data.report.notes == {'training rows dropped: also in validation': 1}
    SEEN.add(52)


def test_53_one_row_or_nothing_to_hold_out():
    refused(lambda: load_data([talk('user', 'assistant')]), 'too few to hold one out (set val_size=0')
    refused(lambda: load_data([talk('user', 'assistant')], on_bad='skip'), 'too few')
    assert load_data([talk('user', 'assistant')], val_size=0).report.warnings == ['there is one conversation to train on']
    SEEN.add(53)


def test_54_fewer_rows_than_one_batch():
    data = load_data([talk('user', 'assistant', text=f'Hello {i}.') for i in range(4)], val_size=0)
    assert any('one packed row' in w for w in check_data(data, toy_tokenizer(), max_length=2048).report.warnings)
    assert not any('one packed row' in w for w in check_data(data, toy_tokenizer(), max_length=64).report.warnings)
    SEEN.add(54)


def test_55_paths_that_are_no_files(tmp_path):
    refused(lambda: read_conversations(tmp_path/'none.jsonl'), 'none.jsonl: no such file')
    (tmp_path/'empty').mkdir()
    refused(lambda: read_conversations(tmp_path/'empty'), 'no data files in this folder')
    (tmp_path/'folder.jsonl').mkdir()
    refused(lambda: read_conversations(tmp_path/'folder.jsonl'), 'no data files')
    os.mkfifo(tmp_path/'pipe.jsonl')
    refused(lambda: read_conversations(tmp_path/'pipe.jsonl'), 'not a regular file')
    refused(lambda: read_conversations(put(tmp_path, 'rows.txt', GOOD)), 'unknown kind of file')
    locked = put(tmp_path, 'locked.jsonl', GOOD)
    locked.chmod(0)
    if not os.access(locked, os.R_OK): refused(lambda: read_conversations(locked), 'cannot be read')  # who may read everything sees no fault
    SEEN.add(55)


def test_56_links_and_archives_do_not_lead_out(tmp_path):
    (tmp_path/'data').mkdir()
    secret = put(tmp_path, 'secret.jsonl', GOOD)
    (tmp_path/'data'/'rows.jsonl').symlink_to(secret)
    refused(lambda: read_conversations(tmp_path/'data'), 'a link that leads out')
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, 'w') as z: z.writestr('../dialogues_train.txt', 'a __eou__ b __eou__\n')
    path = put(tmp_path, 'train.zip', packed.getvalue())
    refused(lambda: DailyDialogDatasetLoader(path).data, 'no dialogues_train.txt in this archive')
    assert not (tmp_path.parent/'dialogues_train.txt').exists()
    SEEN.add(56)


def test_57_a_file_that_changes_while_it_is_read(tmp_path):
    path = put(tmp_path, 'rows.jsonl', (GOOD + b'\n')*3000)
    rows = source_rows(path)[1]
    next(rows)
    with open(path, 'ab') as f: f.write(GOOD)
    refused(lambda: list(rows), 'changed while it was being read')
    SEEN.add(57)


def test_58_a_type_that_changes_late(tmp_path):
    rows = [dumps(talk('user', 'assistant'))]*3000
    rows[2499] = dumps(with_content(5))
    path = put(tmp_path, 'rows.jsonl', b'\n'.join(rows))
    refused(lambda: read_conversations(path), 'rows.jsonl:2500 field messages[0].content: content is not a text: int')
    assert [b.source.line for b in read_conversations(path, on_bad='skip').bad] == [2500]
    SEEN.add(58)


def trainer_of(tmp_path, vocab_size, samples=8, **training):
    "A trainer on a random model with this vocabulary and the tokenizer of a few hundred tokens."
    from llama_nb.shapes import tiny_llama
    from llama_nb.train import LLAMATrainer
    tiny_llama(vocab_size=vocab_size, max_position_embeddings=2048).save_pretrained(tmp_path/'model')
    toy_tokenizer().save_pretrained(tmp_path/'model')
    return LLAMATrainer(ModelConfig(model_name=str(tmp_path/'model'), use_4bit=False), LoRAConfig(), DataConfig(data_path='sample', max_samples=samples),
                        TrainingConfig(output_dir=str(tmp_path/'runs'), max_steps=1, compute='fp32', **training), device='cpu')


def test_54_the_run_says_it_too(tmp_path, caplog):
    trainer_of(tmp_path, 512, gradient_accumulation_steps=50).train(progress=False)
    assert 'an epoch is a single step' in caplog.text


def test_59_a_tokenizer_that_knows_more_tokens_than_the_model(tmp_path):
    trainer = trainer_of(tmp_path, 64)
    with pytest.raises(LlamaNbError, match='vocabulary') as caught: trainer.train()
    check_message(caught.value)
    assert trainer._model is None and not (tmp_path/'runs').exists()  # before weights are read and a run is made
    SEEN.add(59)


def test_60_pad_is_eos():
    tokenizer = toy_tokenizer()
    plain = encode(talk('user', 'assistant', text='Hello.'), tokenizer)
    tokenizer.pad_token = '<|eot_id|>'
    padded = encode(talk('user', 'assistant', text='Hello.'), tokenizer)
    assert padded.labels == plain.labels and padded.labels[-1] == tokenizer.pad_token_id != IGNORE_INDEX
    SEEN.add(60)


def test_no_number_is_left_out():
    if len(SEEN) < 10: pytest.skip('only some of the corpus was run')
    assert set(range(1, 61)) == SEEN
