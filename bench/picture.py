"""The README's picture: what is taught, how the loss fell, what it changed. Drawn from a shipped conversation and a file of `nbs/tutorials/results/`.

No background, and text in a grey that can be read on white and on black: the page it stands on may be either."""
import io
import textwrap

import matplotlib.pyplot as plt

GREY, GREEN, BLUE, TAUGHT, ON_TAUGHT = '#7d8590', '#2da46f', '#4c8dd6', '#a9dfc6', '#08331f'
TITLES = {'base_16bit': 'base, 16 bits', 'base_4bit': 'base, 4 bits', 'tuned': 'fine-tuned'}


def pieces(example, tokenizer, messages):
    "The first messages as pairs of text and state, one list for each message."
    out = [[] for _ in range(messages)]
    for span in example.spans:
        if span.message is None or span.message >= messages: continue
        text = tokenizer.decode(example.input_ids[span.start:span.end])
        if span.message == 0 and span.state == 'template' and '<|im_start|>user' in text: text = text[text.index('<|im_start|>user'):]  # without the system message
        out[span.message].append((text.removeprefix('\n').replace('\n', '↵ '), span.state))
    return out


def rows(parts, width):
    "Wrapped lines of characters with their state."
    text = ''.join(t for t, _ in parts)
    states = [state for t, state in parts for _ in t]
    at = 0
    for line in textwrap.wrap(text, width, drop_whitespace=False, break_on_hyphens=False):
        yield list(zip(line, states[at:at + len(line)]))
        at += len(line)


def draw_mask(ax, messages, width):
    "A message in some lines; what is taught stands on green."
    lines = [(row, i == 0, who) for who, parts in messages for i, row in enumerate(rows(parts, width))]
    ax.set(xlim=(-11, width), ylim=(len(lines), 0))
    ax.axis('off')
    for y, (row, first, who) in enumerate(lines):
        if first: ax.text(-11, y + .5, who, va='center', color=GREY, size=9, weight='bold')
        for x, (char, state) in enumerate(row):
            if state == 'taught': ax.add_patch(plt.Rectangle((x - .02, y + .04), 1.04, .92, color=TAUGHT, lw=0))
            if char != ' ': ax.text(x + .5, y + .5, char, ha='center', va='center', family='DejaVu Sans Mono', size=9, color=ON_TAUGHT if state == 'taught' else GREY, alpha=.85 if state == 'template' else 1)


def draw_loss(ax, result):
    "Each step, and the held-out conversations."
    ax.plot(*zip(*result['loss']), color=BLUE, lw=1, alpha=.75, label='each step')
    ax.plot(*zip(*result['eval_loss']), color=GREEN, lw=1.5, marker='o', ms=4, label='held-out conversations')
    ax.set(xlabel='step', ylabel='loss (nats/token)')
    ax.legend(frameon=False, labelcolor=GREY, fontsize=8)


def draw_scores(ax, scores):
    "Perplexity by model with its interval."
    found = {title: scores[name]['perplexity'] for name, title in TITLES.items() if name in scores}
    most = max(s['high'] for s in found.values())
    for y, (title, s) in enumerate(found.items()):
        color = GREEN if title == TITLES['tuned'] else GREY
        ax.barh(y, s['value'], height=.55, color=color, alpha=.85, lw=0)
        ax.plot([s['low'], s['high']], [y, y], color=BLUE, lw=1.8)
        ax.text(s['high'] + .02*most, y, f"{s['value']:.1f}", va='center', color=color, size=9, weight='bold')
    ax.set(yticks=range(len(found)), yticklabels=found, ylim=(len(found) - .4, -.6), xlim=(0, 1.15*most), xlabel='perplexity with its 95 % interval')


def picture(
    result,  # A file of `nbs/tutorials/results/`
    example,  # An encoded conversation that begins with a user's message and the answer
    tokenizer,  # Its tokenizer
    width=96,  # Characters in a line
):
    "A PNG, as bytes."
    fig = plt.figure(figsize=(8.6, 4.5))
    grid = fig.add_gridspec(2, 2, height_ratios=(1.02, 1.25), width_ratios=(1.2, 1), hspace=.42, wspace=.4, left=.07, right=.985, top=.92, bottom=.115)
    mask, loss, scores = fig.add_subplot(grid[0, :]), fig.add_subplot(grid[1, 0]), fig.add_subplot(grid[1, 1])
    box = mask.get_position()
    mask.set_position([.015, box.y0, .97, box.height])
    draw_mask(mask, list(zip(('user', 'assistant'), pieces(example, tokenizer, 2))), width)
    draw_loss(loss, result)
    draw_scores(scores, result['report']['scores'])
    for ax, title in ((mask, '1  What is taught: the green tokens, nothing else'), (loss, '2  The loss while it trains'), (scores, '3  Before and after (lower is better)')):
        ax.set_title(title, loc='left', color=GREY, size=9.5, weight='bold', pad=7)
    for ax in (loss, scores):
        ax.patch.set_alpha(0)
        ax.tick_params(colors=GREY, labelsize=8)
        ax.xaxis.label.set(color=GREY, size=8.5)
        ax.yaxis.label.set(color=GREY, size=8.5)
        for side, spine in ax.spines.items(): spine.set(color=GREY, lw=.8, visible=side in ('left', 'bottom'))
    out = io.BytesIO()
    fig.savefig(out, dpi=180, transparent=True, metadata={'Software': None}, pil_kwargs={'optimize': True})
    plt.close(fig)
    return out.getvalue()
