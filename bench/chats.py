"""The same synthetic conversations for every row: lognormal lengths from a seed, text of plain English words."""
import json
import random
from pathlib import Path

WORDS = """the a of to and in is it you that he was for on are with as his they be at one have this from or had by hot but some what there we can out other
were all your when up use word how said an each she which do their time if will way about many then them would write like so these her long make thing see him two has
look more day could go come did my sound no most number who over know water than call first people may down side been now find any new work part take get place made
live where after back little only round man year came show every good me give our under name very through just form much great think say help low line before turn
cause same mean differ move right boy old too does tell sentence set three want air well also play small end put home read hand port large spell add even land here
must big high such follow act why ask men change went light kind off need house picture try us again animal point mother world near build self earth father""".split()


def conversations(count, median, sigma=0.5, longest=1500, share=0.5, seed=0):
    "Conversations of two to six messages, about `median` tokens each, of which `share` is the assistant's; as messages."
    rng, made = random.Random(seed), []
    for _ in range(count):
        words, turns = min(longest, max(8, round(rng.lognormvariate(0, sigma)*median))), rng.choice((1, 2, 3))
        per_turn = max(2, words//turns)
        messages = []
        for _ in range(turns):
            for role, part in (('user', 1 - share), ('assistant', share)):
                text = ' '.join(rng.choice(WORDS) for _ in range(max(1, round(per_turn*part))))
                messages.append({'role': role, 'content': text[:1].upper() + text[1:] + '.'})
        made.append(messages)
    return made


def write(path, made):
    "As JSON Lines, the form users have."
    Path(path).write_text(''.join(json.dumps({'messages': m}) + '\n' for m in made), encoding='utf-8')
    return path
