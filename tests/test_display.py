"""Hostile text through every view: the page is parsed as a browser would, and must have the elements and attributes of a harmless one; then what JupyterLab keeps, and how large a page is."""
import json
import os
import random
import re
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from llama_nb.data_report import data_report
from llama_nb.conversation import IGNORE_INDEX, Conversation, Message, Source
from llama_nb.dialogue import encode
from llama_nb.masks import show_batch, show_mask
from llama_nb.template import toy_tokenizer
from llama_nb.doctor import Check, DoctorReport
from llama_nb.comparison import Comparison
from llama_nb.report import EvaluationReport
from llama_nb.report import _report_page
from llama_nb.formats import read_conversations
from llama_nb.generate import Reply
from llama_nb.packing import PackedCollator, pack
from llama_nb.runs import list_runs, watch
from llama_nb.views import View, bars, escape, side_by_side, table, token_strip

HARMLESS = 'harmless'
PAYLOADS = [
    '<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", '<!-- ', '--><svg/onload=alert(1)>', '</div></span></table></u></del>', '</style><iframe src=//x>', '<style>*{display:none}</style>',
    '&lt;img src=x onerror=alert(1)&gt;', '&#60;script&#62;', '<a href="javascript:alert(1)">x</a>', '<math><mtext></table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">', '<svg><![CDATA[<b>]]></svg>',
    '<IMG """><SCRIPT>alert(1)</SCRIPT>">', '<\x00script>', '<\x0bb>', '\u202e<b>', '<form action=//x><input name=a>', '<meta http-equiv=refresh content=0>', '<base href=//x>', '<object data=x><embed src=x>',
    '<plaintext>', '</title><textarea>', '` {{7*7}} ${7*7} <%= 7 %> $\\frac{$ [x](javascript:alert(1)) ![](x)', '<b x="' + '<'*50 + '" ' + "a='>" + '\ud800']


class Parsed(HTMLParser):
    "Elements with attribute names and styles, as a browser sees them, and the text."
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts = [], []
        self.feed(page)
        self.close()
    def handle_starttag(self, tag, attrs): self.elements.append((tag, *sorted((k, v if k == 'style' else '') for k,v in attrs)))
    def handle_endtag(self, tag): self.elements.append(('/' + tag,))
    def handle_comment(self, data): self.elements.append(('comment',))
    def handle_decl(self, decl): self.elements.append(('declaration',))
    def handle_pi(self, data): self.elements.append(('instruction',))
    def handle_data(self, data): self.texts.append(data)


TOY = toy_tokenizer('byte')
clean = lambda x: x.encode('utf-8', 'ignore').decode()  # the encoder refuses lone surrogates
def talk(x): return Conversation(tuple(Message(r, clean(x) + '.') for r in ('system', 'user', 'assistant', 'user', 'assistant')), Source(x, 1))
def examples(x): return [encode(talk(x), TOY), encode(talk(x), TOY)]
def padded(x):
    e = encode(talk(x), TOY)
    return dict(input_ids=[e.input_ids + [0]*9], labels=[e.labels + [IGNORE_INDEX]*9], attention_mask=[[1]*len(e) + [0]*9])


def evaluation(x):
    reply = dict(text=x, ended=False, num_tokens=3)
    sample = dict(row=x, prompt=[dict(role='user', content=x)], reference=x, replies={'tuned': reply, 'base_4bit': reply, x: reply}, loss={'tuned': 1., 'base_4bit': 2.})
    sums = np.array([[2., 1.], [3., 2.], [5., 2.]])
    return EvaluationReport({'tuned': {'bits_per_byte': sums, x: sums}, 'base_4bit': {'bits_per_byte': sums + 1, x: sums}}, [sample]*3, dict(seed=1, confidence=.95, num_bootstrap=20, data={x: x, 'dropped': [x], 'asked': 4}, template=x, by=x), {x: x},
                            {x: [0, 1], 'other': [2]}, dict(run=x, model=x, date=x))


def runs(x, folder):
    "Run folders that somebody else wrote."
    for i in (1, 2):
        home = folder/f"{i} {clean(x).replace('/', '∕').replace(chr(0), '')[:60]}"
        home.mkdir(parents=True)
        (home/'config.yaml').write_text(json.dumps(dict(model=dict(model_name=f'{x} {i}'), data={'dataset_name': f'{i}{x}'})))
        events = [dict(kind='created', id='a', time=i), *(dict(kind='train', step=s, loss=2. - s, time=i) for s in (0, 1)), dict(kind='sample', step=1, prompt=x, reply=x, time=i), dict(kind=x, time=i, **{x: x})]
        (home/'events.jsonl').write_text(''.join(json.dumps(e) + '\n' for e in events))
    return folder


def report(x, folder):
    "A report on a file with this text in its name, its rows, its faults and its settings."
    path = folder/f"{clean(x).replace('/', '∕').replace(chr(0), '')[:60]}.jsonl"
    good = dict(messages=[dict(role='user', content=clean(x)), dict(role='assistant', content=clean(x))])
    path.write_text('\n'.join(json.dumps(r) for r in [good, good, dict(messages=[{'role': x, 'content': x}]), {x: x}, dict(messages=[{'role': 'user', 'content': x, x: x}]*2)]))
    read = read_conversations(path, format='messages', on_bad='skip')
    return data_report(list(read), list(read)[:1], [read], {x: x}, {x: 2})


PATHS = {
    'show_mask': lambda x, _: [show_mask(talk(x), TOY), show_mask(examples(x)[0], TOY)],
    'show_mask with turns left out': lambda x, _: [show_mask(talk(x), TOY, max_length=len(encode(talk(x), TOY)) - 1)],
    'show_batch of examples': lambda x, _: [show_batch(examples(x), TOY)],
    'show_batch of packed rows': lambda x, _: [show_batch(pack(examples(x), 4096), TOY)],
    'show_batch of a collated batch': lambda x, _: [show_batch(PackedCollator(0, pad_to=4096)(pack(examples(x), 4096)), TOY)],
    'show_batch of a padded batch': lambda x, _: [show_batch(padded(x), TOY)],
    'show_batch with faults': lambda x, _: [show_batch([replace(e, labels=[IGNORE_INDEX]*len(e)) for e in examples(x)], TOY)],
    'DataReport': lambda x, d: [report(x, d)],
    'EvaluationReport': lambda x, _: [evaluation(x), evaluation(x).table(), _report_page(evaluation(x))],
    'compare': lambda x, _: [Comparison((dict(row=x, prompt=(Message('user', x),), reference=x, base=Reply(x, [1], False, None), tuned=Reply(x + ' 1', [1], True, None)),))],
    'run': lambda x, d: [watch(p) for p in sorted(runs(x, d).iterdir())],
    'runs': lambda x, d: [list_runs(runs(x, d))],
    'doctor': lambda x, _: [DoctorReport((Check(x, 'fail', x, x),))],
    'side_by_side': lambda x, _: [View(side_by_side([(x, escape(x))]), x)],
    'table': lambda x, _: [table([{x: x, 'n': x}], caption=x), table([[x, x]], marks=['red'])],
    'bars': lambda x, _: [bars({x: 1.0, x + '2': 2.0}, {x: 4.0}, title=x, unit=x)],
    'token_strip': lambda x, _: [token_strip([(x, s, x) for s in ('taught', 'context', 'template', 'padding', 'cut')] + [(x, ('role', x), x), ('', 'border', x)])],
}


def pages(name, x, folder):
    "The HTML and the text of a display path, as a front end gets them and as saved pages."
    folder.mkdir()
    bundles = [v._repr_mimebundle_() for v in PATHS[name](x, folder)]
    return [b['text/html'] for b in bundles], [b['text/plain'] for b in bundles]


@pytest.mark.parametrize('name', PATHS)
def test_no_element_or_attribute_from_content(name, tmp_path):
    assert len(PAYLOADS) == 25
    want = [Parsed(p).elements for p in pages(name, HARMLESS, tmp_path/'harmless')[0]]
    assert sum(map(len, want)) > 1
    for i,x in enumerate(PAYLOADS):
        html, text = pages(name, x, tmp_path/str(i))
        found = [Parsed(p).elements for p in html]
        if name == 'DataReport': found, want = [*map(set, found)], [*map(set, want)]  # how many lines it has depends on what is wrong with the rows
        assert found == want, f'{name}: {x!r}'
        assert not any(c in t for t in text for c in '\x00\x0b\u202e\ud800'), f'{name}: {x!r}'  # nor does it steer a terminal


def test_the_payloads_are_dangerous():
    assert sum(Parsed(f'<p>{x}</p>').elements != Parsed(f'<p>{HARMLESS}</p>').elements for x in PAYLOADS) >= 18  # the others are meant for attributes, for text unescaped twice, for templates and Markdown
    assert sum(Parsed(f'<p title="{x}">').elements != Parsed(f'<p title="{HARMLESS}">').elements for x in PAYLOADS) >= 4


def test_saved_pages_are_inert_too(tmp_path):
    for i,x in enumerate([HARMLESS, *PAYLOADS]):
        evaluation(x).save(tmp_path/str(i))
        show_mask(talk(x), TOY).save(tmp_path/str(i)/'mask.html')
        found = [Parsed((tmp_path/str(i)/p).read_text(encoding='utf-8')).elements for p in ('report.html', 'mask.html')]
        if i == 0: want = found
        assert found == want, repr(x)


# What JupyterLab's sanitizer keeps in a notebook that is not trusted: packages/apputils/src/sanitizer.ts, cut down to what a strip uses
COLOR = r'(#[0-9a-f]+|rgba\(\d{1,3},\d{1,3},\d{1,3},0?\.\d+\))'
KEPT = {'background': COLOR, 'color': COLOR, 'border': rf'\d+px (solid|dotted|dashed) {COLOR}', 'border-top': rf'\d+px (dashed|dotted) {COLOR}', 'border-bottom': rf'\d+px (dashed|dotted) {COLOR}', 'border-radius': r'\d+px',
        'font-family': 'monospace', 'font-size': r'\.\d+em', 'line-height': r'[\d.]+', 'white-space': 'pre-wrap', 'overflow-wrap': 'break-word', 'padding': r'\.\d+em'}


def test_a_cleaned_strip_keeps_its_states():
    view = token_strip([(s, s) for s in ('taught', 'context', 'template', 'padding', 'cut')] + [('', ('role', 'user')), ('', 'border')])
    elements = Parsed(view.html).elements
    assert {e[0] for e in elements if e[0][0] != '/'} <= {'div', 'b', 'u', 's', 'del', 'span', 'hr'}
    styles = [d.split(':', 1) for e in elements for k,v in e[1:] if k == 'style' for d in v.split(';')]
    assert styles and all(re.fullmatch(KEPT[k], v) for k,v in styles), styles
    assert [re.search(rf'<({tag}) [^>]*>{s}</{tag}>', view.html) is not None for s,tag in (('taught', 'u'), ('padding', 's'), ('cut', 'del'))] == [True]*3


@pytest.mark.parametrize('kind,template', [('byte', 'llama-3'), ('byte', 'llama-3.1'), ('byte', 'chatml'), ('piece', 'llama-2'), ('piece', 'alpaca')])
def test_eight_rows_of_1024_tokens_stay_below_60_kB(kind, template):
    tokenizer, rng = toy_tokenizer(kind), random.Random(0)
    words = 'The quick brown fox jumps over lazy dog How was your day Long but good What did you do I baked bread Hello there'.split()
    for short in (False, True):  # the toy's words are long in tokens, so the turns are those of a real set in tokens; then tiny turns
        say = lambda: ' '.join(rng.choice(words) for _ in range(rng.randint(1, 2) if short else rng.randint(6, 14)))
        talks = [encode([{'role': r, 'content': say()} for r in ('user', 'assistant')*rng.randint(1, 5)], tokenizer, template) for _ in range(400)]
        rows = [r for r in pack(talks, 1024) if len(r) > 900][:8]
        assert len(rows) == 8
        batch = PackedCollator(0)(rows)
        for view in (show_batch(rows, tokenizer, n=8, template=template), show_batch(batch, tokenizer, template=template)):
            size = len(view.html.encode())
            print(kind, template, 'tiny turns' if short else '', f'{size:,} bytes', 'not drawn' in str(view))
            assert size <= 60_000 and (short or 'not drawn' not in str(view))
        assert len(show_batch(rows, tokenizer, n=8, template=template, detail=True).html) > 200_000


@pytest.mark.skipif(not os.environ.get('LLAMA_NB_TEST_DATA'), reason='LLAMA_NB_TEST_DATA is not set')
@pytest.mark.parametrize('name', ['llama2', 'llama3'])
def test_eight_full_rows_of_real_dialogues_are_drawn_whole(name):
    from transformers import AutoTokenizer
    home = Path(os.environ['LLAMA_NB_TEST_DATA'])
    tokenizer = AutoTokenizer.from_pretrained(home/'tokenizers'/name)
    with zipfile.ZipFile(home/'data/dailydialog/train.zip') as z: text = z.read(next(n for n in z.namelist() if n.endswith('dialogues_train.txt'))).decode()
    turns = [[t.strip() for t in line.split('__eou__')[:-1]] for line in text.splitlines()[:1500]]
    found = [encode([{'role': ('user', 'assistant')[i % 2], 'content': t} for i,t in enumerate(ts[:len(ts)//2*2])], tokenizer) for ts in turns if len(ts) > 1]
    rows = [r for r in pack([e for e in found if len(e) <= 1024], 1024) if len(r) > 1000][:8]
    for view in (show_batch(rows, tokenizer, n=8), show_batch(PackedCollator(0)(rows), tokenizer)):
        print(f'{name}: {sum(map(len, rows)):,} tokens, {len(view.html.encode()):,} bytes')
        assert len(view.html.encode()) <= 60_000 and 'not drawn' not in str(view)


def test_the_drawn_set_is_the_labels():
    for template in ('llama-3', 'llama-3.1', 'llama-3.2', 'chatml'):
        found = [encode(talk('How was your day?'), TOY, template), encode(talk('yes'), TOY, template)]
        row = pack(found, 4096)
        drawn = ''.join(re.findall(r'<u [^>]*>(.*?)</u>', show_batch(row, TOY, template=template, detail=True).html.split('</div>', 1)[1], re.S))
        want = ''.join(TOY.decode([l]) for l in row[0].labels if l != IGNORE_INDEX)
        assert re.sub('↵\n', '\n', drawn).replace('&lt;', '<').replace('&gt;', '>') == want
        assert want.count('<|im_end|>' if template == 'chatml' else '<|eot_id|>') == 4
