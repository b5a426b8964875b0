"""The checks of the documentation site find what they look for."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent/'tools'))
import browser
import docs
import outputs


def result(text, kind='text/plain'): return [dict(output_type='execute_result', data={'text/plain': 'x', kind: text}, metadata={})]
def stream(text, name='stdout'): return [dict(output_type='stream', name=name, text=text)]


def test_a_stored_number_that_is_not_the_one_computed_is_found():
    assert outputs.stale(result('total 5.54'), result('total 5.54'), exact=True) == ''
    told = outputs.stale(result('llama-7b\ntotal 5.54'), result('llama-7b\ntotal 5.21'))
    assert 'stored: total 5.54' in told and 'now:    total 5.21' in told


@pytest.mark.parametrize('stored, fresh, same', [
    ('0.123', '0.124', True), ('0.123', '0.127', False),  # one in the last digit
    ('2e-07', '9e-07', True), ('2e-07', '2e-06', False), ('2.0e-07', '2.2e-07', False), ('63', '63.2', True), ('5.54', '5.21', False), ('12', '13', False), ('1,024', '1,025', False),
    ('a 0.10 b', 'a 0.11 c', False), ('  9.9', ' 10.0', True), ('v1.2', 'v1.3', False)])
def test_only_rounding_may_differ(stored, fresh, same):
    assert (outputs.stale(result(stored), result(fresh)) == '') == same
    assert outputs.stale(result(stored), result(fresh), exact=True)


def test_what_varies_has_to_be_there():
    assert outputs.stale(stream('a reply'), stream('another'), varies=True) == ''
    assert outputs.stale(stream('a reply'), [], varies=True) and outputs.stale([], stream('a reply'))


def test_pictures_bars_and_log_lines_are_not_compared():
    image = lambda data: [dict(output_type='display_data', data={'image/png': data}, metadata={})]
    assert outputs.stale(image('one'), image('two')) == '' and outputs.stale(image('one'), [])
    assert outputs.stale([], stream('a warning', 'stderr')) == '' == outputs.stale([], stream('[INFO] Running\n'))
    assert outputs.stale(result('<img src="data:image/png;base64,AA">1', 'text/html'), result('<img src="data:image/png;base64,BB">1', 'text/html')) == ''


def test_a_difference_in_html_is_told_without_its_markup():
    told = outputs.stale(result('<tr><td style="a">llama-7b</td><td>5.5</td></tr>', 'text/html'), result('<tr><td style="a">llama-7b</td><td>5.2</td></tr>', 'text/html'))
    assert 'llama-7b' in told and '<td' not in told


def test_proofs_are_hidden_and_code_is_kept():
    code = "x = load()\ntest_eq(x, 1)  # proof\nassert all(\n    x for x in y)\nx.show()"
    assert docs.without_proofs(code) == 'x = load()\nx.show()'
    assert docs.without_proofs('%magic\nassert 1') == '%magic\nassert 1'  # not Python: left alone


def test_formulas_become_mathml():
    html = docs.mathml(r'<link href="https://cdn/katex.css"><span class="math inline">\(x_{&lt;t}\)</span> <span class="math display">\[\mathcal L=\frac1N\]</span>')
    assert 'katex' not in html and html.count('<math') == 2 and '\N{SCRIPT CAPITAL L}' in html and 'display="block"' in html and '\\' not in html


def test_a_page_that_loads_something_from_elsewhere_is_named(tmp_path):
    (tmp_path/'page.html').write_text('<a href="https://example.org">fine</a><script src="//cdn.example.org/x.js"></script><img src="here.png">')
    (tmp_path/'theme.css').write_text('@import url(https://fonts.example.org/a;b);p{background:url(data:image/svg+xml,http://www.w3.org/2000/svg)}')
    assert sorted(docs.elsewhere(tmp_path)) == ['page.html loads //cdn.example.org/x.js', 'theme.css loads https://fonts.example.org/a;b']
    assert docs.IMPORT.sub('', (tmp_path/'theme.css').read_text()).startswith('p{')


def test_the_browser_finds_code_that_is_cut_off(tmp_path):
    if browser.browser() is None: pytest.skip('no Chromium on this machine')
    page = '<!doctype html><meta name="viewport" content="width=device-width"><style>pre {{ {style} }}</style><main><pre>{code}</pre></main>{more}'
    (tmp_path/'cut.html').write_text(page.format(style='overflow: auto', code='x = ' + 'y'*90, more='<img src="http://elsewhere.example/x.png">'))
    (tmp_path/'wrapped.html').write_text(page.format(style='white-space: pre-wrap; overflow-wrap: anywhere', code='x = ' + 'y'*90, more=''))
    try: problems = browser.look(tmp_path, ['cut.html', 'wrapped.html'], {})
    except browser.NoBrowser as e: pytest.skip(str(e))
    assert any(p.startswith("cut.html at 400 px: code is cut off: 'x = yyy") for p in problems), problems
    assert any('cut.html' in p and 'asks another host: http://elsewhere.example/x.png' in p for p in problems), problems
    assert not any(p.startswith(('wrapped', 'cut.html at 1280 px: code')) for p in problems), problems


def test_contrast_is_that_of_wcag():
    assert browser.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21) and browser.contrast((9, 9, 9), (9, 9, 9)) == 1
    assert browser.contrast((0x77, 0x77, 0x77), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)
