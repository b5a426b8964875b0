"""Write README.md from nbs/index.ipynb, without Quarto.

    python tools/readme.py [--check]

`--check` writes nothing and ends with exit code 1 if README.md or one of its pictures differs from the notebook."""
import base64
import re
import sys

import yaml
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults

IMAGES = 'index_files'
RELATIVE = re.compile(r'\]\((?!\w+:|[#/])([^)\s]+\.(?:ipynb|qmd)(?:#[^)]*)?)\)')  # a link to another page of the book


def text(value): return value if isinstance(value, str) else ''.join(value)


def code_parts(cell, number, images):
    "The fenced source of a code cell and its saved outputs; pictures go into `images`."
    source = text(cell.source).strip()
    alt = re.search(r'^#\|\s*fig-alt:\s*(.+)', source, re.M)
    if not re.search(r'^#\|\s*echo:\s*false', source, re.M):
        code = re.sub(r'^#\|.*\n', '', source + '\n', flags=re.M).strip()
        if code: yield f'```python\n{code}\n```'
    for j, out in enumerate(cell.get('outputs', [])):
        data = out.get('data', {})
        if 'image/png' in data:
            name = f'{IMAGES}/cell-{number}-output-{j}.png'
            images[name] = base64.b64decode(text(data['image/png']))
            yield f"![{alt[1].strip() if alt else ''}]({name})"
        elif 'text/markdown' in data: yield text(data['text/markdown']).strip()
        elif 'text/plain' in data or 'text' in out:
            yield '```\n' + text(data.get('text/plain', out.get('text'))).rstrip() + '\n```'


def render():
    "The README's text, and its pictures by name."
    cfg = get_config()
    nb = read_nb(cfg.nbs_path/cfg.readme_nb)
    FilterDefaults()(nb)  # drops what is hidden, links names in backticks
    parts, images = [], {}
    for number, cell in enumerate(nb.cells):
        source = text(cell.source).strip()
        if not source: continue
        if cell.cell_type == 'raw':
            meta = yaml.safe_load(source.strip('-\n'))  # nbdev's form of `# title` and `> description`
            parts += [f'{mark} {meta[key]}' for mark, key in (('#', 'title'), ('>', 'description')) if key in meta]
        elif cell.cell_type == 'markdown': parts.append(RELATIVE.sub(rf']({cfg.nbs_path.name}/\1)', source))
        else: parts += code_parts(cell, number, images)
    return '\n\n'.join(parts) + '\n', images


def main():
    root = get_config().config_path
    new, images = render()
    readme = root/'README.md'
    old = {p.relative_to(root).as_posix(): p for p in (root/IMAGES).glob('*.png')}
    if '--check' in sys.argv[1:]:
        same = readme.exists() and readme.read_text(encoding='utf-8') == new
        same = same and old.keys() == images.keys() and all(p.read_bytes() == images[n] for n, p in old.items())
        print('README.md matches nbs/index.ipynb' if same else 'README.md differs from nbs/index.ipynb: run `make readme`')
        sys.exit(not same)
    readme.write_text(new, encoding='utf-8')
    for name in old.keys() - images.keys(): old[name].unlink()
    for name, data in images.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)


if __name__ == '__main__': main()
