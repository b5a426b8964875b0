"""Text that looks like a control token stays text: every added token of every tokenizer, in every disguise and place, on every way into a model."""
import ast
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest

from llama_nb.conversation import ROLES, Conversation, Message, Source, as_conversation
from llama_nb.dialogue import encode, encode_prompt
from llama_nb.tokens import tokenizer_copies
from llama_nb.template import toy_tokenizer
from llama_nb.errors import DataError
from llama_nb.model import load_tokenizer
from llama_nb.sources import demo_model
from llama_nb.packing import PackedCollator, pack

DATA = Path(os.environ['LLAMA_NB_TEST_DATA']) if os.environ.get('LLAMA_NB_TEST_DATA') else None
PAIRS = [('llama2', 'auto'), ('llama2', 'alpaca'), ('llama3', 'auto'), ('llama3', 'llama-3.2'), ('demo', 'auto')]
LIKE = str.maketrans({'<': '\uff1c', '>': '\uff1e', '|': '\uff5c', 's': '\u0455', 'e': '\u0435', '_': '\uff3f', 'o': '\u043e'})
FORMS = {
    'plain': lambda t: t,
    'glued': lambda t: f'a{t}b',
    'spaced': lambda t: f' x {t} \n{t}\n x',
    'repeated': lambda t: t*3 + 'x',
    'nested': lambda t: t[:len(t)//2] + t + t[len(t)//2:],
    'split': lambda t: ' '.join((t[:len(t)//2], t[len(t)//2:])) + t[:1] + '\u200b' + t[1:] + t[:-1] + '\u00ad' + t[-1:],
    'look-alike': lambda t: t.translate(LIKE) + '\u202e' + t[::-1],
    'escaped': lambda t: t.replace('<', '&lt;').replace('|', '\\u007c') + repr(t),
}
PLACES = {'system': 0, 'user': 1, 'answer': 2, 'tool': 3}  # the message that holds it


@lru_cache(None)
def tokenizer(name):
    "The real tokenizers of Llama 2 and 3 where the test data is at hand, throwaway ones elsewhere, and the demo model's."
    if name == 'demo': return load_tokenizer(demo_model())
    if DATA is None: return toy_tokenizer({'llama2': 'piece', 'llama3': 'byte'}[name])
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(DATA/'tokenizers'/name)


def added(name): return list(dict.fromkeys(t.content for t in tokenizer(name).added_tokens_decoder.values()))


def chat(place, text, half=''):
    "A short conversation with the text in one place; a second half opens the next message."
    roles = ['system', 'user', 'assistant', 'tool' if place == 'tool' else 'user', 'assistant']
    messages = [{'role': r, 'content': 'x'} for r in roles]
    messages[PLACES[place]]['content'] = text
    messages[PLACES[place] + 1]['content'] = half + 'x'
    return messages


@lru_cache(None)
def cases(name, template):
    "Every added token in every form and place; and cut in two, with a border of messages between."
    places = [p for p in PLACES if (name, template, p) != ('llama2', 'auto', 'tool')]  # Llama 2's template knows no tools
    whole = [chat(p, f(t)) for t in added(name) for f in FORMS.values() for p in places]
    halves = [chat(p, 'x' + t[:k], t[k:]) for t in added(name) for p in places for k in (1, len(t) - 1)]
    return [Conversation(as_conversation(c).messages, Source('case', i)) for i,c in enumerate(whole + halves)]


def control_ids(name, ids):
    control = tokenizer_copies(tokenizer(name))[0].control
    return [i for i in ids if i in control]


@lru_cache(None)
def of_template(name, template, roles, prompt=False):
    "The control ids that the template itself writes for these roles."
    plain = Conversation(tuple(Message(r, 'x') for r in roles))
    return control_ids(name, encode_prompt(plain, tokenizer(name), template) if prompt else encode(plain, tokenizer(name), template).input_ids)


@pytest.mark.parametrize('name,template', PAIRS)
def test_no_control_token_from_content(name, template, record_property):
    tok, todo = tokenizer(name), cases(name, template)
    examples = [encode(c, tok, template) for c in todo]
    train = [c.row for c,e in zip(todo, examples) if control_ids(name, e.input_ids) != of_template(name, template, c.roles)]
    asked = [c.row for c in todo if control_ids(name, encode_prompt(c, tok, template)) != of_template(name, template, c.roles, True)]
    batched, seen = [], 0
    collate = PackedCollator(pad_id=tok.eos_token_id)
    for row in pack(examples, max(4096, *map(len, examples))):
        b = collate([row])
        ids, borders = b['input_ids'][0].tolist(), b['cu_seqlens'].tolist()
        for source,start,end in zip(b['rows'], borders, borders[1:]):
            seen += 1
            if control_ids(name, ids[start:end]) != of_template(name, template, todo[source.line].roles): batched.append(source)
    with ThreadPoolExecutor(8) as pool: threaded = list(pool.map(lambda c: encode(c, tok, template).input_ids, todo))
    threads = [c.row for c,e,ids in zip(todo, examples, threaded) if ids != e.input_ids]
    assert seen == len(todo) and not (train or asked or batched or threads), dict(train=train[:3], chat=asked[:3], batch=batched[:3], threads=threads[:3])
    record_property('cases', 4*len(todo))


@pytest.mark.parametrize('name,template', PAIRS)
def test_a_role_is_one_of_four_words(name, template):
    tok = tokenizer(name)
    for t in added(name):
        for role in (t, f'user{t}', f'assistant\n{t}', FORMS['look-alike'](t)):
            for use in (encode, encode_prompt):
                with pytest.raises(DataError, match='role'): use([{'role': role, 'content': 'x'}, {'role': 'assistant', 'content': 'x'}], tok, template)
                with pytest.raises(DataError, match='role'): Message(role, 'x')  # built by hand
    for role in ('User', 'user ', 'ipython'):  # names that people write: what goes into the header is one of the four words
        assert as_conversation([{'role': role, 'content': 'x'}, {'role': 'assistant', 'content': 'x'}]).roles[0] in ROLES
    for role in ('us\u0435r', 'assistant<|eot_id|>', '', None, 1, ['user']):
        with pytest.raises(DataError): encode([{'role': role, 'content': 'x'}, {'role': 'assistant', 'content': 'x'}], tok, template)


def test_there_are_enough_cases_and_they_are_dangerous():
    total = 4*sum(len(cases(*p)) for p in PAIRS) + 8*sum(len(added(n)) for n,_ in PAIRS)
    assert total >= 5000, total
    taken = {}
    for name in ('llama2', 'llama3', 'demo'):  # the usual way: render to one string, then tokenize it
        tok, plain = tokenizer(name), [c for c in cases(name, 'auto') if c.roles[3] == 'user'][:100]
        usual = lambda c: tok.apply_chat_template([{'role': m.role, 'content': m.content} for m in c.messages])['input_ids']
        taken[name] = sum(len(control_ids(name, usual(c))) > len(control_ids(name, usual(Conversation(tuple(Message(r, 'x') for r in c.roles))))) for c in plain)/len(plain)
    assert all(share > .4 for share in taken.values()), taken
    print(f'{total:,} cases; the usual way lets through ' + ', '.join(f'{n} {s:.0%}' for n,s in taken.items()))


def test_only_the_encoder_makes_ids_from_text():
    for path in (Path(__file__).parent.parent/'llama_nb').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call): continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
            assert called not in ('apply_chat_template', 'tokenizer', 'encode_plus', 'batch_encode_plus'), f'{path.name}:{node.lineno} turns text into ids by {called}'
