"""What `check_data` finds: planted defects of every class, false alarms on clean conversations, and what `fix` takes out."""
import json
import random
from dataclasses import replace

import pytest

from llama_nb.config import DataConfig
from llama_nb.data import DataSplits, load_data, sample_path
from llama_nb.quality import check_data
from llama_nb.data_report import CHECKS, data_report
from llama_nb.quality import near_repeats
from llama_nb.conversation import Conversation, Message, Source
from llama_nb.template import toy_tokenizer
from llama_nb.formats import Conversations, read_conversations

for module in ('rensa', 'py3langid'): pytest.importorskip(module, reason=f"{module} is not installed (extra 'data')")

PLANTED = 25  # of each class
CLEAN = [c for name in ('dialogues', 'instructions') for c in read_conversations(sample_path(name))]
FOREIGN = [('Bonjour, pourriez-vous me dire où se trouve la gare ?', 'Bien sûr, tournez à gauche après le pont.'), ('Quel temps fera-t-il demain ?', 'Il pleuvra toute la matinée, puis le soleil reviendra.'),
          ('Wo kann ich hier ein Fahrrad mieten?', 'Gleich neben dem Bahnhof gibt es einen guten Laden.'), ('Was möchtest du heute Abend kochen?', 'Vielleicht eine Suppe mit Kartoffeln und Lauch.'),
          ('¿Dónde puedo comprar entradas para el concierto?', 'En la taquilla del teatro, hasta las ocho de la tarde.'), ('¿Qué libro me recomiendas para el verano?', 'Una novela corta que transcurre junto al mar.')]


def say(text, row, answer='I see, thank you for telling me about it.'):
    return Conversation((Message('user', text), Message('assistant', answer)), Source('planted', row))


def luhn(rng):
    "A random number of 16 digits that passes the check."
    digits = [4, *(rng.randrange(10) for _ in range(14))]
    total = sum(d if i % 2 else sum(divmod(2*d, 10)) for i,d in enumerate(digits))
    return ''.join(map(str, [*digits, -total % 10]))


def word(rng, n, alphabet='abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'): return ''.join(rng.choice(alphabet) for _ in range(n))


SECRETS = [lambda r: 'hf_' + word(r, 34), lambda r: 'sk-' + word(r, 40), lambda r: 'AKIA' + word(r, 16, 'ABCDEFGHIJKLMNOP0123456789'), lambda r: 'ghp_' + word(r, 36), lambda r: 'password: ' + word(r, 8) + 'x7',
           lambda r: 'xoxb-' + word(r, 24), lambda r: 'AIza' + word(r, 35), lambda r: '-----BEGIN RSA PRIVATE KEY-----', lambda r: f'https://bob:{word(r, 8)}@host.net/', lambda r: f'my API key is {word(r, 20)}7q']
PERSONAL = [lambda r: f'{word(r, 6)}.{word(r, 5)}@mail{r.randrange(99)}.org', lambda r: f'+49 30 {r.randrange(10**6, 10**7)}', lambda r: f'({r.randrange(200, 999)}) {r.randrange(200, 999)}-{r.randrange(1000, 9999)}',
            lambda r: (lambda n: ' '.join(n[i:i + 4] for i in range(0, 16, 4)))(luhn(r)), luhn, lambda r: 'GB82 WEST 1234 5698 7654 32', lambda r: f'{r.randrange(100, 600)}-{r.randrange(10, 99)}-{r.randrange(1000, 9999)}']
ODD = ['\u202e', '\u2066', '\u200b', '\u2060', '\ufeff', '\U000e0041', '\ue123', '\U000f0000', '\ufffd', '\x07', '\x9d', '\0', 'p\u0430y', 'â€™', 'Ã©']
CONTROL = ['<|im_end|>', '<|eot_id|>', '</s>', '[INST]', '<<SYS>>', '<|begin_of_text|>', '<pad>']


def another(text, rng):
    "The text with one word changed."
    words = text.split()
    words[rng.randrange(len(words))] = 'something'
    return ' '.join(words)


def plant(seed=0):
    "Clean conversations with defects in between, as splits; and which (part, place) holds which kind."
    rng, number = random.Random(seed), iter(range(1, 10**6))
    clean = CLEAN.copy()
    rng.shuffle(clean)
    train, held, bad = clean[:200], clean[200:], {}
    def add(kind, conversation, part='train'):
        place = train if part == 'train' else held
        bad.setdefault(kind, set()).add((part, len(place)))
        place.append(replace(conversation, row=Source('planted', next(number))))
    def inside(i, text):  # in the middle of a conversation that occurs nowhere else
        return say(f'Question {i} of {word(rng, 12)} {word(rng, 9)}: what do you make of {text} here?', i, f'It reminds me of {word(rng, 10)} and of {word(rng, 11)}.')
    def changed(c, edit): return replace(c, messages=tuple(replace(m, content=edit(m.content)) if k == 0 else m for k,m in enumerate(c.messages)))
    originals, validation = train[:2*PLANTED], held[:2*PLANTED]
    for i in range(PLANTED):
        add('repeat', changed(originals[i], lambda t: rng.choice([t, t.upper(), '  ' + t.replace(' ', '  ')])))
        add('near repeat', changed(originals[PLANTED + i], lambda t: another(t, rng) + rng.choice(['', ' Please.'])))
        add('leak', changed(validation[i], lambda t: rng.choice([t, t.lower()])))
        add('near leak', changed(validation[PLANTED + i], lambda t: another(t, rng)))
        add('empty', replace(inside(i, 'this'), messages=(*inside(i, 'this').messages[:1], Message('assistant', ['…', '', ' \n', '-- ?!'][i % 4]))))
        add('control token', inside(i, CONTROL[i % len(CONTROL)]))
        add('odd character', inside(i, f'pay{ODD[i % len(ODD)]}pal'))
        add('secret', inside(i, SECRETS[i % len(SECRETS)](rng)))
        add('personal data', inside(i, PERSONAL[i % len(PERSONAL)](rng)))
        question, answer = FOREIGN[i % len(FOREIGN)]
        add('other language', say(f'{question} ({word(rng, 4)})', i, f'{answer} {i}'))
        add('too long', say(' '.join(word(rng, 5) for _ in range(900)), i))
    return Conversations(train, 'planted', 'messages', num_rows=len(train)), Conversations(held, 'planted', 'messages', num_rows=len(held)), bad


@pytest.fixture(scope='module')
def planted():
    "The splits, their defects, and the findings."
    train, held, bad = plant()
    data = DataSplits(train, held, data_report(train, held, [train, held]))
    return data, bad, check_data(data, toy_tokenizer(), max_length=2000)


@pytest.mark.parametrize('kind', [k for k in CHECKS if k != 'not encodable'])
def test_planted_defects_are_found(planted, kind):
    _, bad, checked = planted
    found = {(f.part, f.index) for f in checked.report.findings if f.kind == kind}
    missed = bad[kind] - found
    print(f'{kind}: {len(bad[kind] & found)} of {len(bad[kind])}')
    assert len(bad[kind]) == PLANTED and len(missed) <= 0.05*PLANTED, sorted(missed)


def test_few_false_alarms(planted):
    data, bad, checked = planted
    defects = set().union(*bad.values())
    clean = {(part, i) for part in ('train', 'validation') for i in range(len(getattr(data, part)))} - defects
    alarms = {(f.part, f.index): str(f) for f in checked.report.findings if (f.part, f.index) in clean}
    print(f'{len(alarms)} false alarms on {len(clean)} clean conversations')
    assert len(clean) == len(CLEAN) and len(alarms) <= 0.01*len(clean), alarms


@pytest.mark.parametrize('name', ['alpaca', 'dailydialog', 'both'])
def test_the_samples_are_clean(name):
    report = check_data(DataConfig(dataset_name=name, data_path='sample'), toy_tokenizer(), max_length=2000).report
    assert report.counts == {} and report.warnings == [] and report.languages.keys() <= {'en', 'unsure'} and 0 < report.tokens['taught_share'] < 1


def test_a_finding_names_the_row_and_not_the_text(planted):
    data, bad, checked = planted
    told = json.dumps(checked.report.to_dict(), ensure_ascii=False) + repr(checked.report)
    private = [m.content for kind in ('secret', 'personal data') for part, i in bad[kind] for m in getattr(data, part)[i].messages[:1]]
    assert not any(w in told for text in private for w in text.split() if len(w) > 12)
    assert all(len(line) < 400 for line in repr(checked.report).splitlines()) and all(f.row.file == 'planted' for f in checked.report.findings)
    assert {'text/html', 'image/png', 'text/plain'} == set(checked.report._repr_mimebundle_())


def test_what_is_fixed_is_gone_and_nothing_else(planted):
    data, bad, checked = planted
    for fix in ((), ('repeat', 'leak'), ('near leak', 'secret'), 'all'):
        done = check_data(data, toy_tokenizer(), max_length=2000, fix=fix)
        kinds = tuple(CHECKS) if fix == 'all' else fix
        gone = {(f.part, f.index) for f in done.removed}
        assert gone == {(f.part, f.index) for f in checked.report.findings if f.kind in kinds} and {f.kind for f in done.removed} <= set(kinds)
        assert not set(done.report.counts) & set(kinds) and sum(n for k, n in done.report.notes.items() if k.startswith('removed')) == len(gone)
        for part in ('train', 'validation'): assert list(getattr(done, part)) == [c for i, c in enumerate(getattr(data, part)) if (part, i) not in gone]
        assert done.report.num_conversations == dict(train=len(done.train), validation=len(done.validation))
        assert not set(check_data(done).report.counts) & (set(kinds) - {'near repeat'})  # looked at again
    assert not near_repeats(list(done.train), list(done.validation))


def test_what_the_template_can_not_take_is_named():
    rows = [say('What does [INST] mean?', 1), say('Hello there.', 2)]
    report = check_data(load_data(rows, val_size=0), toy_tokenizer('piece')).report
    assert [(f.kind, f.row.line) for f in report.findings if f.kind == 'not encodable'] == [('not encodable', 1)]


def test_without_the_extra_libraries_it_says_so(monkeypatch, planted):
    import sys
    monkeypatch.setitem(sys.modules, 'rensa', None), monkeypatch.setitem(sys.modules, 'py3langid', None), monkeypatch.setitem(sys.modules, 'py3langid.langid', None)
    data, bad, _ = planted
    report = check_data(data).report
    assert all("pip install '.[data]'" in how for how in report.checked.values()) and report.languages == {}
    assert {(f.part, f.index) for f in report.findings if f.kind == 'leak'} == bad['leak'] and not any('near' in f.kind for f in report.findings)
