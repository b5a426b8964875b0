"""Compare the outputs that a notebook keeps with what its cells give now.

A page shows stored outputs, so a number in it can fall behind the code. `tools/nbcheck.py` runs every notebook anyway; it asks
here whether each cell still gives what is stored. On the pages made of plain arithmetic (the home page and `docs/`) the text
must be the same. In chapters and tutorials a number with a decimal point may differ by one in its last digit or by 2 %, and the
size of an error such as 2e-07 by less than ten times, because processors round differently. A cell whose output depends on more
than that (a trained model, a generated reply) starts with `#| varies REASON`: then it only has to give something where something
is stored. How many such cells there are stands in the log."""
import re

IMAGE = re.compile(r'data:image/[^"\')]*')
NUMBER = re.compile(r'(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])')
ROUNDING = 0.02  # what another processor's rounding may change in a number that a model gives, of its size
SIZE = re.compile(r'\de[+-]?\d+')  # 2e-07: how large an error is
RICH = ('text/html', 'image/svg+xml', 'image/png', 'image/jpeg', 'text/markdown', 'text/latex', 'text/plain')  # the first one present is what a page shows
LOG = re.compile(r'^\[INFO\] .*\n?', re.M)  # printed by a package on import, once a process
VARIES = 'varies'


def join(text): return text if isinstance(text, str) else ''.join(text)


def shown(outputs):
    "What a page shows of a cell's outputs: a list of (kind, text). Pictures count, their bytes do not."
    found = []
    for out in outputs:
        if out['output_type'] == 'stream': kind, text = out.get('name', 'stdout'), join(out['text'])
        elif out['output_type'] == 'error': kind, text = 'error', out.get('ename', '')
        else:
            data = out.get('data', {})
            kind = next((k for k in RICH if k in data), None)
            if kind is None or any('jupyter.widget' in k for k in data): continue  # a widget lives as long as its kernel
            text = 'picture' if kind.startswith('image/') else join(data[kind])
        if kind == 'stderr': continue  # warnings and log lines are never kept
        text = LOG.sub('', IMAGE.sub('', text)).rstrip()
        if found and found[-1][0] == kind == 'stdout': text = found.pop()[1] + '\n' + text
        if text: found.append((kind, text))
    return found


def value(text): return float(text.replace(',', ''))


def last_digit(text):
    "What one in the last digit of a number is worth; 0 for a whole number, which has to be exact."
    mantissa, _, exponent = text.replace(',', '').partition('e')
    if '.' not in mantissa: return 0
    return 1.01 * 10.0**(int(exponent or 0) - len(mantissa.partition('.')[2]))


def near(stored, fresh):
    "Whether two numbers are the same but for rounding."
    if stored == fresh: return True
    if SIZE.fullmatch(stored) and SIZE.fullmatch(fresh):
        low, high = sorted((value(stored), value(fresh)))
        return high < 10*low
    digit, size = max(last_digit(stored), last_digit(fresh)), max(value(stored), value(fresh))
    return bool(digit) and abs(value(stored) - value(fresh)) <= max(digit, ROUNDING*size)


def same_text(stored, fresh, exact):
    "Whether two texts agree; unless `exact`, but for the rounding of numbers."
    if stored == fresh: return True
    if exact: return False
    words = lambda text: [' '.join(part.split()) for part in NUMBER.split(text)]
    return words(stored) == words(fresh) and all(map(near, NUMBER.findall(stored), NUMBER.findall(fresh)))


def first_difference(stored, fresh):
    "The first line in which two texts differ, once from each; markup only where nothing else differs."
    plain = lambda text: re.sub(r'\s*\n\s*', '\n', re.sub(r'<[^>]*>', ' ', re.sub(r'</(?:tr|div|p)>', '\n', text)))
    if plain(stored) != plain(fresh): stored, fresh = plain(stored), plain(fresh)
    a, b = stored.splitlines(), fresh.splitlines()
    i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    line = lambda lines: lines[i] if i < len(lines) else '(nothing)'
    x, y = line(a), line(b)
    start = max(0, next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y))) - 60)
    cut = lambda text: ('…' if start else '') + text[start:start + 160]
    return f'stored: {cut(x)}\n  now:    {cut(y)}'


def stale(stored, fresh, exact=False, varies=False):
    "Why the stored outputs of a cell are no longer what it gives; '' if they are."
    old, new = shown(stored), shown(fresh)
    kinds = [kind for kind, _ in old], [kind for kind, _ in new]
    if kinds[0] != kinds[1] and not (varies and old and new):
        return f'stored: {", ".join(kinds[0]) or "nothing"}\n  now:    {", ".join(kinds[1]) or "nothing"}'
    if varies: return ''
    for (_, a), (_, b) in zip(old, new):
        if not same_text(a, b, exact): return first_difference(a, b)
    return ''
