"""`audit` beside the real thing: what TRL's SFTTrainer prepares, in each of its modes, and the command line on what tools save."""
import json
import os
import random
import subprocess
import sys

import pytest

from llama_nb.auditing import audit
from llama_nb.dialogue import encode
from llama_nb.row_faults import TurnGrammar
from llama_nb.template import toy_tokenizer

QUESTIONS = ('How far is it to the mill?', 'Is the shop open today?', 'What is a comet?', 'Can you count to three?', 'Why is the sky blue?')
ANSWERS = ('Two miles, along the river.', 'Yes, until six.', 'A ball of ice and dust.', 'One, two, three.', 'Because air scatters blue light.')


def talk(i, exchanges=2):
    "A small conversation, another one for every `i`."
    said = [dict(role='system', content=f'You are guide {i}.')] if i % 3 == 0 else []
    for k in range(exchanges):
        said += [dict(role='user', content=f'{i}.{k}: {QUESTIONS[(i + k) % 5]}'), dict(role='assistant', content=f'{ANSWERS[(i + 2*k) % 5]} ({i})')]
    return said


CHATS = [talk(i, 1 + i % 3) for i in range(60)]


@pytest.fixture(scope='module')
def sft(tmp_path_factory):
    "A function of settings that gives TRL's trainer, on a tiny random model."
    trl = pytest.importorskip('trl', reason='trl is not installed')
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    def make(rows, template=None, **settings):
        tokenizer = toy_tokenizer()
        tokenizer.pad_token = '<|pad|>' if '<|pad|>' in tokenizer.get_vocab() else tokenizer.eos_token
        if template: tokenizer.chat_template = template
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
        config = trl.SFTConfig(output_dir=str(tmp_path_factory.mktemp('trl')), report_to='none', bf16=False, use_cpu=True, per_device_train_batch_size=4, **settings)
        return trl.SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return make


MESSAGES = [dict(messages=c) for c in CHATS]
GENERATION = toy_tokenizer().chat_template.replace(  # marks the answer and its end of turn
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}",
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}")


def test_the_template_for_masks_writes_the_same_text():
    assert 'generation %}' in GENERATION
    for chat in CHATS[:5]:
        plain, marked = [toy_tokenizer().apply_chat_template(chat, tokenize=False, **how) for how in ({}, {'chat_template': GENERATION})]
        assert plain == marked


def test_trl_as_shipped_teaches_everything(sft):
    report = audit(sft(MESSAGES), CHATS)
    assert (report.exact, report.total) == (0, 60)
    assert report.counts == {'header taught': 60, 'prompt taught': 60, 'system text taught': 20}
    assert 'assistant_only_loss' in repr(report)


def test_trl_with_assistant_only_loss_is_exact(sft):
    trainer = sft(MESSAGES, GENERATION, assistant_only_loss=True)
    assert audit(trainer, CHATS).exact == 60
    assert audit(trainer.train_dataset, tokenizer=trainer.processing_class).exact == 60
    assert audit(trainer.get_train_dataloader(), CHATS, trainer.processing_class).exact == 60  # padded batches


def test_trl_without_the_end_of_turn_in_its_mask(sft):
    template = GENERATION.replace(" + '<|eot_id|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|eot_id|>' }}")
    assert audit(sft(MESSAGES, template, assistant_only_loss=True), CHATS).counts == {'end of turn not taught': 60}


def test_trl_packed(sft):
    trainer = sft(MESSAGES, GENERATION, assistant_only_loss=True, packing=True, max_length=1024)
    report = audit(trainer, CHATS)
    assert (report.exact, report.conversations, report.tool) == (report.total, 60, 'trl')
    assert report.total < 60
    assert audit(trainer.get_train_dataloader(), CHATS, trainer.processing_class).counts == {}  # one flat row a batch
    for batch in trainer.get_train_dataloader():
        assert audit(batch, tokenizer=trainer.processing_class).counts == {}
        seen = {k: v for k,v in batch.items() if k in ('input_ids', 'labels')}
        assert 'neighbours visible' in audit(seen, tokenizer=trainer.processing_class).counts
        break


def test_trl_packed_as_shipped(sft):
    report = audit(sft(MESSAGES, packing=True, max_length=1024), CHATS)
    assert report.exact == 0 and set(report.counts) == {'header taught', 'prompt taught', 'system text taught'}


def test_trl_wrapped_cuts_and_mixes(sft):
    found = audit(sft(MESSAGES, GENERATION, assistant_only_loss=True, packing=True, packing_strategy='wrapped', max_length=300), CHATS).counts
    assert found['neighbours visible'] > 0 and found['conversation cut'] > 0


def test_trl_cut_at_max_length(sft):
    report = audit(sft(MESSAGES, GENERATION, assistant_only_loss=True, max_length=100), CHATS)
    assert set(report.counts) == {'answer cut', 'answer missing'} or set(report.counts) == {'answer cut', 'answer missing', 'end of turn missing'}
    short = [i for i,c in enumerate(CHATS) if len(toy_tokenizer().apply_chat_template(c)['input_ids']) <= 100]
    assert report.exact == len(short)


def test_trl_prompt_and_completion(sft):
    rows = [dict(prompt=c[:-1], completion=c[-1:]) for c in CHATS]
    report = audit(sft(rows), CHATS)
    assert (report.exact, report.notes[0]) == (60, 'of several answers only the last is taught, in every conversation')


def with_tool(i):
    "A conversation of all four roles, another one for every `i`."
    result = [dict(role='tool', content=f'{{"miles": {i}}}'), dict(role='assistant', content=f'It is {i} miles away.')]
    return [dict(role='system', content=f'You are guide {i}.'), *talk(i, 1 + i % 2)[-2:], *result]


def turn(g, ids, role, span): return [t for t in g.turns(ids, *span) if t.role == role][-1]


def teach(row, a, b): row['labels'][a:b] = row['input_ids'][a:b]


def place(row, k, token, label=-100):
    "Another token in a row, which attends to itself like the others."
    row['input_ids'].insert(k, token)
    row['labels'].insert(k, label)


def taught(role):
    def plant(g, row, span):
        t = turn(g, row['input_ids'], role, span)
        teach(row, t.begin, t.end)
    return plant


def header(g, row, span):
    t = turn(g, row['input_ids'], 'assistant', span)
    teach(row, t.open, t.begin)


def end_ignored(g, row, span): row['labels'][turn(g, row['input_ids'], 'assistant', span).close] = -100


def one_ignored(g, row, span): row['labels'][turn(g, row['input_ids'], 'assistant', span).begin + 1] = -100


def other_label(g, row, span):
    k = turn(g, row['input_ids'], 'assistant', span).begin
    row['labels'][k] = row['input_ids'][k + 1] + 1


def all_ignored(g, row, span): row['labels'][span[0]:span[1]] = [-100]*(span[1] - span[0])


def end_lost(g, row, span):
    k = turn(g, row['input_ids'], 'assistant', span).close
    del row['input_ids'][k], row['labels'][k]


def cut(g, row, span):
    k = turn(g, row['input_ids'], 'assistant', span).begin + 5
    del row['input_ids'][k:], row['labels'][k:]


def typed(g, row, span): place(row, turn(g, row['input_ids'], 'user', span).begin + 1, g.eos)


def two_starts(g, row, span): place(row, 0, g.bos)


def shifted(g, row, span): row['labels'] = row['labels'][1:] + [-100]


def padded(g, row, span):
    row['attention_mask'] = [1]*len(row['input_ids']) + [0]*3
    for _ in range(3): place(row, len(row['input_ids']), g.eos, g.eos)


IN_LABELS = {'prompt taught': taught('user'), 'system text taught': taught('system'), 'tool output taught': taught('tool'),
             'header taught': header, 'end of turn not taught': end_ignored, 'answer partly taught': one_ignored, 'labels unequal': other_label}
IN_ROWS = {**IN_LABELS, 'nothing taught': all_ignored, 'end of turn missing': end_lost, 'answer cut': cut, 'control token from content': typed,
           'two start tokens': two_starts, 'labels shifted': shifted, 'padding taught': padded}


def as_rows(dataset):
    "TRL's rows: ids, labels, and the lengths of packed conversations."
    for row in dataset: yield {k: list(row[k]) for k in ('input_ids', 'labels', 'seq_lengths') if k in row}


def check_planted(rows, plants, chats, tokenizer):
    "Plant each fault in every seventh row: these rows are named with that fault, and no other row is."
    g = TurnGrammar(tokenizer)
    assert audit(rows, chats, tokenizer).counts == {}
    for kind,plant in plants.items():
        spoiled, chosen = [{k: list(v) for k,v in row.items()} for row in rows], range(len(kind) % 7, len(rows), 7)
        for i in chosen:
            first = (rows[i].get('seq_lengths') or [len(rows[i]['input_ids'])])[0]
            plant(g, spoiled[i], (0, first))
        report = audit(spoiled, chats, tokenizer)
        named = {int(f.row) for f in report.faults}
        assert {int(row) for row in report.rows.get(kind, ())} == named == {*chosen}, (kind, report.counts)


TOOL_CHATS = [with_tool(i) for i in range(210)]


def test_faults_planted_in_what_trl_makes(sft):
    trainer = sft([dict(messages=c) for c in TOOL_CHATS], GENERATION, assistant_only_loss=True)
    assert len(IN_ROWS) >= 12
    check_planted(list(as_rows(trainer.train_dataset)), IN_ROWS, TOOL_CHATS, trainer.processing_class)


def test_faults_planted_in_what_trl_packs(sft):
    trainer = sft([dict(messages=c) for c in TOOL_CHATS], GENERATION, assistant_only_loss=True, packing=True, max_length=1024)
    rows = list(as_rows(trainer.train_dataset))
    assert len(rows) < len(TOOL_CHATS)/2
    check_planted(rows, {**IN_LABELS, 'neighbours visible': lambda g,row,span: row.pop('seq_lengths')}, TOOL_CHATS, trainer.processing_class)


def test_no_false_alarm_on_5000_rows_of_trl(sft):
    chats = [talk(i, 1 + i % 3) for i in range(5000)]
    trainer = sft([dict(messages=c) for c in chats], GENERATION, assistant_only_loss=True)
    for given in (None, chats):
        report = audit(trainer.train_dataset, given, trainer.processing_class)
        assert (report.exact, report.total, report.counts) == (5000, 5000, {})


def damaged(rng, example, vocabulary):
    "A row with a few random changes: other ids, lost and added tokens, cut ends, other labels."
    ids, labels = list(example.input_ids), list(example.labels)
    for _ in range(rng.randint(0, 8)):
        k, change = rng.randrange(len(ids) + 1), rng.randrange(5)
        if change == 0: ids[k:k+1] = [rng.randrange(vocabulary)]*len(ids[k:k+1])
        if change == 1: del ids[k:k+1], labels[k:k+1]
        if change == 2: ids.insert(k, rng.randrange(vocabulary)), labels.insert(k, rng.choice([-100, ids[k]]))
        if change == 3: ids, labels = (ids[k:], labels[k:]) if rng.random() < .5 else (ids[:k], labels[:k])
        if change == 4: labels[k:k+1] = [rng.choice([-100, 3])]*len(labels[k:k+1])
    row = dict(input_ids=ids, labels=labels)
    if rng.random() < .3: row['attention_mask'] = [rng.choice([0, 1, 1]) for _ in ids]
    if rng.random() < .2: row['position_ids'] = [rng.choice([0, 1, 2]) for _ in ids]
    if rng.random() < .1: row['seq_lengths'] = [rng.randint(0, 9) for _ in range(3)]
    return row


def test_damaged_rows_give_a_report():
    rng, tokenizers = random.Random(0), [toy_tokenizer(), toy_tokenizer('piece'), toy_tokenizer(template='chatml'), toy_tokenizer(template='alpaca')]
    for _ in range(300):
        tokenizer, chats = rng.choice(tokenizers), rng.sample(CHATS, 3)
        rows = [damaged(rng, encode(c, tokenizer), len(tokenizer)) for c in chats]
        report = audit(rows, rng.choice([None, chats]), tokenizer)
        named = {f.row for f in report.faults}
        assert (report.exact, report.total) == (3 - len(named), 3)
        assert repr(report) and report._repr_html_() and json.dumps(report.to_dict())
        for i,(row,chat) in enumerate(zip(rows, chats)):  # what is right is never named, and what is named is not right
            right = encode(chat, tokenizer)
            if row['input_ids'] == right.input_ids and row['labels'] == right.labels and len(row) == 2: assert str(i) not in named


def command(*args):
    "The command line in a process of its own."
    return subprocess.run([sys.executable, '-m', 'llama_nb', 'audit', *map(str, args)], capture_output=True, text=True, timeout=240, env={**os.environ, 'NO_PROGRESS': '1'})


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A set that teaches everything and one that is right, as a tool saves them, and the conversations as a file."
    from datasets import Dataset
    from llama_nb.model import load_tokenizer
    from llama_nb.sources import demo_model
    folder, tokenizer = tmp_path_factory.mktemp('saved'), load_tokenizer(demo_model())
    rows = [dict(input_ids=e.input_ids, labels=e.labels) for e in (encode(c, tokenizer) for c in CHATS)]
    Dataset.from_list(rows).save_to_disk(folder/'right')
    (folder/'all.jsonl').write_text('\n'.join(json.dumps({'input_ids': r['input_ids']}) for r in rows))
    (folder/'chats.jsonl').write_text('\n'.join(json.dumps({'messages': c}) for c in CHATS))
    return folder


def test_the_command_on_a_right_set(saved):
    done = command(saved/'right', '--model', 'demo', '--conversations', saved/'chats.jsonl')
    assert done.returncode == 0, done.stderr
    assert '60 of 60 rows teach exactly their answers' in done.stdout and done.stderr == ''


def test_the_command_on_a_faulty_set(saved):
    done = command(saved/'all.jsonl', '--model', 'demo', '--tool', 'axolotl')
    assert done.returncode == 4 and 'roles_to_train: [assistant]' in done.stdout and 'the worst row' in done.stdout
    done = command(saved/'all.jsonl', '--model', 'demo', '--json')
    found = json.loads(done.stdout)
    assert done.returncode == 4 and found['exact'] == 0 and found['total'] == 60 and found['counts']['prompt taught'] == 60


def test_the_command_on_what_is_no_prepared_set(saved):
    done = command(saved/'chats.jsonl', '--model', 'demo')
    assert done.returncode == 4 and done.stdout == ''
    assert 'row 0: no input_ids; found messages' in done.stderr and len(done.stderr.splitlines()) == 1
    assert command(saved/'none', '--model', 'demo').returncode == 4
    assert command(saved/'right', '--model', 'demo', '--tool', 'lamafactory').returncode == 2
