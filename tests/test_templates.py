"""Templates at full size: equal ids and exact masks on every real conversation, nothing from content ever a control token, and other people's templates."""
import json
import os
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_nb.dialogue import encode, encode_prompt
from llama_nb.verification import verify_masks
from llama_nb.segments import get_encoder, get_template, stop_ids
from llama_nb.tokens import tokenizer_copies
from llama_nb.template import PINNED_DATE, TEMPLATES, ChatTemplate, toy_tokenizer
from llama_nb.errors import ConfigError, DataError, one_line
from llama_nb.model import load_tokenizer
from llama_nb.sources import demo_model

DATA = Path(os.environ['LLAMA_NB_TEST_DATA']) if os.environ.get('LLAMA_NB_TEST_DATA') else None
real_data = pytest.mark.skipif(DATA is None, reason='LLAMA_NB_TEST_DATA is not set')


@pytest.fixture(scope='module')
def rows():
    "Every conversation of both real sets: the second speaker is the assistant, a last turn without answer is left out."
    with zipfile.ZipFile(DATA/'data/dailydialog/train.zip') as z:
        text = z.read(next(n for n in z.namelist() if n.endswith('dialogues_train.txt'))).decode()
    turns = [[t.strip() for t in line.split('__eou__')[:-1]] for line in text.splitlines()]
    chats = [[{'role': ('user', 'assistant')[i % 2], 'content': t} for i,t in enumerate(ts[:len(ts)//2*2])] for ts in turns]
    alpaca = [[{'role': 'user', 'content': '\n\n'.join(filter(None, (r['instruction'], r['input'])))}, {'role': 'assistant', 'content': r['output']}]
              for r in json.loads((DATA/'data/alpaca/alpaca_data.json').read_text(encoding='utf-8'))]
    assert (len(chats), len(alpaca)) == (11118, 800)
    return chats + alpaca


@pytest.fixture(scope='module')
def tokenizers():
    "The demo model's tokenizer and, where the test data is at hand, the real Llama 2 and 3; throwaway ones elsewhere."
    from transformers import AutoTokenizer
    real = {n: AutoTokenizer.from_pretrained(DATA/'tokenizers'/n) for n in ('llama2', 'llama3')} if DATA else {'llama2': toy_tokenizer('piece'), 'llama3': toy_tokenizer('byte')}
    return {**real, 'demo': load_tokenizer(demo_model())}


def official(tokenizer, conversation, template=None, **kwargs):
    return tokenizer.apply_chat_template(conversation, chat_template=template, date_string=PINNED_DATE, **kwargs)['input_ids']


@real_data
@pytest.mark.parametrize('name', ['llama2', 'llama3', 'demo'])
def test_ids_and_masks_on_every_real_conversation(name, rows, tokenizers):
    tokenizer = tokenizers[name]
    different = [i for i,c in enumerate(rows) if official(tokenizer, c) != encode(c, tokenizer).input_ids]
    assert not different, f'{len(different)} of {len(rows)} rows differ, first {different[0]}'
    proof = verify_masks(rows, tokenizer)
    assert (proof.exact, proof.total) == (len(rows), len(rows)), str(proof)
    print(f'{name}: {len(rows)} of {len(rows)} equal, masks {proof}')


@real_data
@pytest.mark.parametrize('name,template', [('llama2', 'llama-2'), ('llama2', 'alpaca'), ('llama3', 'llama-3'), ('llama3', 'llama-3.1'), ('llama3', 'llama-3.2'), ('demo', 'chatml')])
def test_named_templates_on_real_conversations(name, template, rows, tokenizers):
    tokenizer, some = tokenizers[name], rows[::12]
    text = get_template(tokenizer, template).text
    assert all(official(tokenizer, c, text) == encode(c, tokenizer, template).input_ids for c in some)
    assert verify_masks(some, tokenizer, template).exact == len(some)


@real_data
def test_our_llama_texts_render_as_the_files_beside_the_tokenizers(rows, tokenizers):
    for system in ([], [{'role': 'system', 'content': ' Be brief. '}]):
        for c in rows[:200]:
            assert official(tokenizers['llama2'], system + c) == encode(system + c, tokenizers['llama2'], 'llama-2').input_ids
            ours = encode(system + c, tokenizers['llama3'], 'llama-3').input_ids
            assert official(tokenizers['llama3'], system + c)[:len(ours)] == ours  # that file always adds the start of an answer


@pytest.mark.parametrize('name', ['llama2', 'llama3', 'demo'])
def test_prompts_are_training_prefixes_with_one_beginning(name, tokenizers):
    tokenizer = tokenizers[name]
    for n in range(1, 6):
        chat = [{'role': r, 'content': f'Text {i} of {n}.'} for i,r in enumerate(('user', 'assistant')*n)]
        example, prompt = encode(chat, tokenizer), encode_prompt(chat[:-1], tokenizer)
        assert example.input_ids[:len(prompt)] == prompt == encode_prompt(chat, tokenizer)
        assert example.labels[len(prompt)] == example.input_ids[len(prompt)]
        if name == 'llama2': assert example.input_ids.count(tokenizer.bos_token_id) == n  # the official form opens every exchange with <s>
        if name == 'llama3': assert example.input_ids.count(tokenizer.bos_token_id) == 1
        ends = [example.labels[s.end - 1] for s in example.spans if s.state == 'taught'][1::2]
        assert len(ends) == n and set(ends) <= set(stop_ids(tokenizer))


def hostile(tokenizer, n, seed=0):
    "Conversations of control tokens, halves of them, markup, unusual spaces and characters."
    rng = random.Random(seed)
    bits = [t.content for t in tokenizer.added_tokens_decoder.values()] + 3*[
        '</s>', '<|eot_id|>', '<|im_end|>', '<|', '|>', '</', 's>', 'im_end', '<0x0A>', '\u2581', '\u2581\u2581', ' ', '  ', '\n', '\t', '\r\n', '\x00', '\u200b', '\u202e', '\U000f0000',
        '\u00e9', '\U0001f916', '\u4e2d\u6587', '{{ 7*7 }}', '{% raw %}', '"', '\\', 'assistant', '<script>', '\uff1c|im_end|\uff1e', 'Zq0: "a']
    text = lambda: ''.join(rng.choice(bits) for _ in range(rng.randint(1, 8)))
    return [[{'role': r, 'content': text() + 'x'} for r in ('system', *('user', 'assistant')*rng.randint(1, 3))] for _ in range(n)]


@pytest.mark.parametrize('name,template', [('llama2', 'auto'), ('llama3', 'auto'), ('llama3', 'llama-3.2'), ('demo', 'auto')])
def test_content_never_becomes_control(name, template, tokenizers):
    tokenizer = tokenizers[name]
    cases, control = hostile(tokenizer, 2000), set(tokenizer_copies(tokenizer)[0].control)
    proof = verify_masks(cases, tokenizer, template)  # every text decodes as written, no control id in content
    assert proof.exact == proof.total == 2000, str(proof)
    alone = [encode(c, tokenizer, template).input_ids for c in cases]
    for c,ids in zip(cases, alone):
        plain = encode([{**m, 'content': 'x'} for m in c], tokenizer, template).input_ids
        found = [i for i in ids if i in control]
        assert found == [i for i in plain if i in control]
        asked = [i for i in encode_prompt(c, tokenizer, template) if i in control]
        assert asked == found[:len(asked)]
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(lambda c: encode(c, tokenizer, template).input_ids, cases)) == alone


def test_the_users_tokenizer_is_left_alone(tokenizers):
    for tokenizer in (toy_tokenizer('byte'), toy_tokenizer('piece')):
        before = tokenizer.backend_tokenizer.to_str(), tokenizer('a <s>b<|eot_id|>').input_ids
        encode([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}], tokenizer)
        assert (tokenizer.backend_tokenizer.to_str(), tokenizer('a <s>b<|eot_id|>').input_ids) == before
        tokenizer.backend_tokenizer.enable_truncation(3)  # somebody else's setting must not reach our ids
        tokenizer.backend_tokenizer.enable_padding(length=64)
        chat = [{'role': 'user', 'content': 'a long enough text to be cut off'}, {'role': 'assistant', 'content': 'b'}]
        long = encode(chat, tokenizer).input_ids
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        assert long == official(tokenizer, chat)


OTHERS = {  # name: template, whether it can be followed on the byte-level and on the SentencePiece-like tokenizer
    'zephyr': ("{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}", True, True),
    'mistral': ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}", True, True),
    'vicuna': ("{{ bos_token + 'A chat.' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'].strip() }}{% else %}{{ ' ASSISTANT: ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}", True, True),
    'marked': ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}", True, True),
    'dated': ("{{ bos_token + strftime_now('%d %b %Y') + '\\n' }}{% for m in messages %}{{ m.role + ':\\n' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}", True, True),
    'lined': ("{{ bos_token }}{% for m in messages %}{{ m.role + ':\\n' + m.content + ('\\n\\n' if m.role == 'user' else eos_token) }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}", True, True),
    'thinking': ("{% for m in messages %}{{ m.role + '\\n' + (m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) + eos_token }}{% endfor %}", True, True),
    'peeking': ("{% for m in messages %}{% if '</think>' in m.content %}{{ '!' }}{% endif %}{{ m.role + '\\n' + m.content + eos_token }}{% endfor %}", True, True),
    'replacing': ("{% for m in messages %}{{ m.role + '\\n' + (m.content | replace('\\n', ' ')) + eos_token }}{% endfor %}", 'changes or leaves out', 'changes or leaves out'),
    'unending': ("{% for m in messages %}{{ m.role + '\\n' + m.content + '\\n' }}{% endfor %}", 'learn to stop', 'learn to stop'),
    'half-ended': ("{% for m in messages %}{{ m.role + '\\n' + m.content + ('' if loop.last else eos_token) }}{% endfor %}", 'learn to stop', 'learn to stop'),
    'forgetful': ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}", 'leaves out', 'leaves out'),
    'reasoning': ("{% for m in messages %}{{ m.role + '\\n' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n<think>\\n' }}{% endif %}", 'asks for an answer with other text', 'asks for an answer with other text'),
}


@pytest.mark.parametrize('name', OTHERS)
@pytest.mark.parametrize('kind', ['byte', 'piece'])
def test_other_peoples_templates_are_followed_or_refused(name, kind):
    text, *verdicts = OTHERS[name]
    tokenizer, want = toy_tokenizer(kind, None), verdicts[kind == 'piece']
    tokenizer.chat_template = text
    chats = [[{'role': r, 'content': t} for r,t in zip(('user', 'assistant')*2, ts)] for ts in (
        ['Hello there.', 'I see, 42!', 'Is it far?', 'yes'], ['1. a\n2. b', '"quoted" text', 'caf\u00e9 \U0001f916', 'x = {"a": [1]}'])]
    if want is not True:
        with pytest.raises((ConfigError, DataError)) as refused: encode(chats[0], tokenizer)
        assert want in one_line(refused.value)
        return
    shown = text.replace("strftime_now('%d %b %Y')", 'date_string')  # transformers would write today's date
    for c in chats:
        assert encode(c, tokenizer).input_ids == official(tokenizer, c, shown)
        assert encode_prompt(c, tokenizer) == encode(c, tokenizer).input_ids[:len(encode_prompt(c, tokenizer))]
    assert str(verify_masks(chats, tokenizer)) == '2 / 2 exact'
    cases = [c[1:] for c in hostile(tokenizer, 200)]
    found = verify_masks(cases, tokenizer)
    assert all('[INST]' in f.problem or 'reads as the border' in f.problem for f in found.failures), str(found)


@real_data
@pytest.mark.parametrize('template', ['lined', 'alpaca'])
def test_a_template_whose_text_the_tokenizer_joins_to_content_has_the_official_ids(template, tokenizers):
    "Llama 3 has a token for a full stop with two line breaks: it straddles the border of a message, in training as in serving."
    tokenizer = tokenizers['llama3']
    template = ChatTemplate('tokenizer', OTHERS[template][0]) if template in OTHERS else template
    text = get_template(tokenizer, template).text
    chat = [{'role': r, 'content': t} for r,t in zip(('user', 'assistant')*2, ['Hello there.', 'I see, 42!', 'Is it far?', 'yes.'])]
    ids = official(tokenizer, chat, text)
    assert any('.\n\n' in t for t in tokenizer.batch_decode([[i] for i in ids]))
    assert encode(chat, tokenizer, template).input_ids == ids and str(verify_masks([chat], tokenizer, template)) == '1 / 1 exact'
    for k in (1, 3):
        prompt = encode_prompt(chat[:k], tokenizer, template)
        assert prompt == official(tokenizer, chat[:k], text, add_generation_prompt=True) == ids[:len(prompt)]
    long = encode(chat*3, tokenizer, template, max_length=len(ids) + 5, on_overflow='drop_turns')
    assert long.input_ids == ids and long.dropped == 8


@pytest.mark.parametrize('scheme', ['always', 'first', 'never'])
def test_every_way_of_putting_the_dummy_space(scheme):
    from tokenizers import decoders, normalizers, pre_tokenizers
    tokenizer = toy_tokenizer('piece')
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()])
    for template in ('llama-2', 'alpaca', OTHERS['zephyr'][0], OTHERS['mistral'][0]):
        if template not in TEMPLATES: template = ChatTemplate('tokenizer', template)
        text = get_template(tokenizer, template).text
        chat = [{'role': r, 'content': t} for r,t in zip(('user', 'assistant')*2, ['Hello there.', 'I see, 42!', 'Is it far?', 'yes'])]
        assert encode(chat, tokenizer, template).input_ids == official(tokenizer, chat, text)
        assert verify_masks([chat], tokenizer, template).exact == 1


def test_roles_that_a_template_refuses_are_a_data_error():
    tokenizer = toy_tokenizer('piece')
    with pytest.raises(DataError, match='user, user.*take turns'): encode([{'role': r, 'content': 'a'} for r in ('user', 'user', 'assistant')], tokenizer)
    with pytest.raises(DataError, match=r"messages\[0\]\.role: unknown role: 'narrator'"): encode([{'role': 'narrator', 'content': 'a'}], tokenizer)


def test_a_tokenizer_that_changes_gets_a_new_encoder():
    tokenizer = toy_tokenizer('byte')
    chat = [{'role': 'user', 'content': 'a <new> b'}, {'role': 'assistant', 'content': 'b'}]
    first = encode(chat, tokenizer).input_ids
    tokenizer.add_tokens(['<new>'])
    assert encode(chat, tokenizer).input_ids == official(tokenizer, chat) != first  # a word of the model: one token
    tokenizer.add_special_tokens({'additional_special_tokens': ['<new>']})
    assert encode(chat, tokenizer).input_ids == first  # a control token: still text
    tokenizer.chat_template = {'default': TEMPLATES['llama-3'].text, 'tool_use': TEMPLATES['llama-3.1'].text}
    assert encode(chat, tokenizer).input_ids == first
    tools = [{'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object'}}}]
    plain = [{**m, 'content': 'Hi'} for m in chat]
    assert encode(plain, tokenizer, tools=tools).input_ids == official(tokenizer, plain, tools=tools)
    tokenizer.chat_template['default'] = TEMPLATES['llama-3.1'].text  # changed in place
    assert encode(chat, tokenizer).input_ids != first and encode(plain, tokenizer).input_ids == official(tokenizer, plain)
    tokenizer.chat_template = TEMPLATES['chatml'].text
    assert get_template(tokenizer).name == 'chatml' and encode(chat, tokenizer).input_ids != first
    assert get_encoder(tokenizer) is get_encoder(tokenizer)
