"""Draws the diagrams of the pages: `python .docs/drawings.py` writes nbs/images/*.svg.

A drawing is a list of boxes, `name: (x, y, text, kind)` with the box's centre in steps of a grid, and of arrows, `'from > to: text'` (`|>` leaves
upright, `~` is a dotted line). They are at most 640 pixels wide, so that their words can still be read on a phone."""

from html import escape
from pathlib import Path

from nbdev.config import get_config

STEP, LINE, LETTER = (80, 37), 17, 7.4
KINDS = {
    'stage': ('#DCEBF5', '#0072B2', ''),
    'file': ('#FDF0DA', '#B36B00', ''),
    'note': ('none', 'none', ''),
    'choice': ('#FFFFFF', '#555555', '5 3'),
    'good': ('#D9F0E7', '#00795A', ''),
    'bad': ('#FBE3D6', '#B34700', ''),
}

DRAWINGS = {
    'pipeline': (
        dict(
            topics=(1, 1, 'topic cards', 'file'),
            rules=(1, 3, 'constitution', 'file'),
            teach=(3.9, 2, 'the teacher\ndraft · critique · revise', 'stage'),
            sft=(6.9, 2, 'sft.jsonl', 'file'),
            tune=(6.9, 4.4, 'finetune\nwith LoRA', 'stage'),
            adapter=(3.9, 4.4, 'adapter/', 'file'),
            tutor=(1, 4.4, 'the tutor\nbase | tuned', 'stage'),
            chat=(1, 7, 'chat', 'stage'),
            asks=(3.1, 6, 'questions on topics\nheld out of training', 'file'),
            replies=(3.1, 8, 'replies.jsonl', 'file'),
            judge=(5.1, 8, 'judge', 'stage'),
            scores=(6.9, 8, 'scores\nand plots', 'good'),
        ),
        [
            'topics > teach',
            'rules > teach',
            'teach > sft',
            'sft > tune',
            'tune > adapter',
            'adapter > tutor',
            'tutor > chat',
            'tutor |> asks',
            'asks > replies',
            'replies > judge',
            'judge > scores',
        ],
        (8, 9),
    ),
    'run_folder': (
        dict(
            s1=(1.1, 1, '04 generate', 'stage'),
            s2=(1.1, 3, '06 finetune', 'stage'),
            s3=(1.1, 5, '08 chat', 'stage'),
            s4=(1.1, 7, '10 evaluate', 'stage'),
            f1=(4, 1, 'sft.jsonl', 'file'),
            f2=(4, 3, 'adapter/', 'file'),
            f3=(4, 5, 'chat.jsonl', 'file'),
            f4=(4, 7, 'replies.jsonl\neval_scores.csv\neval_plot.png', 'file'),
            diary=(
                6.8,
                4,
                'run.json\nsettings,\nversions,\neach stage’s\nresult and time',
                'good',
            ),
        ),
        [
            's1 > f1: writes',
            's2 > f2: writes',
            's3 > f3: writes',
            's4 > f4: writes',
            'f1 ~ diary',
            'f2 ~ diary',
            'f3 ~ diary',
            'f4 ~ diary',
        ],
        (7.8, 8.2),
    ),
    'constitution': (
        dict(
            q=(1, 1, 'a student’s\nquestion', 'file'),
            draft=(3, 1, 'draft', 'stage'),
            critique=(5.2, 1, 'critique', 'stage'),
            rules=(7, 1, 'a few\nprinciples', 'file'),
            revision=(5.2, 3.2, 'revision', 'stage'),
            row=(2.6, 3.2, 'training row with its trail', 'good'),
        ),
        [
            'q > draft',
            'draft > critique',
            'rules > critique',
            'critique > revision: what to mend',
            'revision > row',
        ],
        (7.9, 4.1),
    ),
    'client': (
        dict(
            ask=(0.8, 1, 'ask', 'note'),
            disk=(2.6, 1, 'on the disk?', 'choice'),
            read=(5.1, 1, 'read', 'stage'),
            parse=(6.8, 1, 'parse', 'stage'),
            limits=(2.6, 3.2, 'within max_cost,\nwithin the limits', 'choice'),
            send=(5.1, 3.2, 'send', 'stage'),
            keep=(6.8, 3.2, 'write the\nanswer down', 'file'),
            wait=(2.6, 5.4, 'wait, longer each time', 'bad'),
            object=(6.8, -0.7, 'an object', 'good'),
        ),
        [
            'ask > disk',
            'disk > read: yes',
            'read > parse',
            'parse > object',
            'disk > limits: no',
            'limits > send',
            'send > keep',
            'keep > parse',
            'send |> wait: 429, 5xx, timeout',
            'wait > limits',
        ],
        (7.9, 6.3),
    ),
    'judge': (
        dict(
            q=(0.9, 1, 'question', 'file'),
            r=(0.9, 2.6, 'reply', 'file'),
            c=(0.9, 4.2, 'what was\nsaid before', 'file'),
            a=(0.9, 6, 'the card,\nif known', 'file'),
            judge=(2.9, 3.4, '\n\n\n\n\njudge\n\n\n\n\n', 'stage'),
            soc=(6.6, 1.7, 'socratic', 'good'),
            hel=(6.6, 5.1, 'helpful', 'good'),
            p1=(4.75, 1.7, 'asks, keeps,\nabout, to_do', 'choice'),
            p2=(4.75, 5.1, 'right, clear,\nencourages,\nfoothold', 'choice'),
        ),
        [
            'q > judge',
            'r > judge',
            'c > judge',
            'a > judge',
            'judge > p1',
            'judge > p2',
            'p1 > soc',
            'p2 > hel',
        ],
        (7.5, 7),
    ),
    'calibration': (
        dict(
            data=(1.1, 1, 'replies that\npeople rated', 'file'),
            feat=(3.8, 1, 'features of a reply,\nno tutor’s name in them', 'stage'),
            ridge=(6.7, 1, 'ridge\nregression', 'stage'),
            model=(6.7, 3.4, 'judge_model.json', 'file'),
            test=(3.2, 3.4, 'held against tutors and problems\nthat it has never met', 'good'),
        ),
        ['data > feat', 'feat > ridge', 'ridge > model', 'model > test'],
        (7.8, 4.4),
    ),
    'evaluation': (
        dict(
            q=(0.9, 2.2, '\n\nquestions on\ntopics held out\n\n', 'file'),
            base=(3, 1, 'base', 'stage'),
            prompted=(3, 2.2, 'prompted', 'stage'),
            tuned=(3, 3.4, 'tuned', 'stage'),
            controls=(3, 4.8, 'bots that do not think', 'choice'),
            replies=(4.9, 2.4, '\n\n\nreplies.jsonl\n\n\n', 'file'),
            counts=(6.8, 1, 'counts', 'good'),
            judge=(6.8, 3.9, '\n\njudge\n\n', 'stage'),
            scores=(6.8, 6.6, 'scores, intervals,\ntests, pictures', 'good'),
        ),
        [
            'q > base',
            'q > prompted',
            'q > tuned',
            'base > replies',
            'prompted > replies',
            'tuned > replies',
            'replies > counts',
            'replies > judge',
            'controls > judge',
            'judge > scores',
        ],
        (7.8, 7.5),
    ),
    'own_subject': (
        dict(
            cards=(1, 1, 'cards of\nyour own', 'good'),
            teach=(3.1, 1, 'embedded\nteacher', 'stage'),
            rows=(5, 1, 'rows', 'file'),
            tune=(6.8, 1, 'finetune', 'stage'),
            adapter=(6.8, 3.2, 'adapter/', 'file'),
            tutor=(4.2, 3.2, 'a tutor who asks about them', 'good'),
        ),
        ['cards > teach', 'teach > rows', 'rows > tune', 'tune > adapter', 'adapter > tutor'],
        (7.7, 4),
    ),
    'own_style': (
        dict(
            rule=(3.8, 1, 'a principle of your own', 'good'),
            draft=(1, 3.2, 'draft', 'stage'),
            critique=(2.9, 3.2, 'critique', 'stage'),
            mend=(4.9, 3.2, 'revision', 'stage'),
            row=(6.8, 3.2, 'training\nrow', 'file'),
        ),
        [
            'rule > critique: ask',
            'rule > mend: mend',
            'draft > critique',
            'critique > mend',
            'mend > row',
        ],
        (7.6, 4.1),
    ),
    'own_base': (
        dict(
            base=(1.5, 2, 'a base model\nconfig.json\nmodel.safetensors\ntokenizer', 'good'),
            tune=(4.2, 1, 'finetune', 'stage'),
            adapter=(6.5, 1, 'adapter/\nnames its base', 'file'),
            tutor=(6.5, 3, 'tutor', 'stage'),
        ),
        ['base > tune', 'tune > adapter', 'adapter > tutor', 'base > tutor'],
        (7.7, 4),
    ),
    'lessons': (
        dict(
            change=(1, 1.2, 'one change in\nthe reference', 'file'),
            seeds=(1, 3.8, 'the reference,\nother seeds', 'file'),
            same=(3.2, 2.5, '\nfinetune\nreply to questions\njudge\n', 'stage'),
            point=(5.3, 1.2, 'a point', 'good'),
            band=(5.3, 3.8, 'a grey band', 'file'),
            verdict=(6.85, 2.5, 'outside it,\nor chance?', 'choice'),
        ),
        [
            'change > same',
            'seeds > same',
            'same > point',
            'same > band',
            'point > verdict',
            'band > verdict',
        ],
        (7.7, 5),
    ),
    'stages': (
        dict(
            s1=(1, 1, '04_generate', 'stage'),
            s2=(2.9, 1, '06_finetune', 'stage'),
            s3=(4.75, 1, '08_chat', 'stage'),
            s4=(6.7, 1, '10_evaluate', 'stage'),
            f1=(1, 3, 'sft.jsonl', 'file'),
            f2=(2.9, 3, 'adapter/', 'file'),
            f3=(4.75, 3, 'chat.jsonl', 'file'),
            f4=(6.7, 3, 'eval_scores.csv\neval_plot.png', 'file'),
            diary=(
                3.85,
                5,
                '        run.json: which stage is done, with what result, in what time        ',
                'good',
            ),
        ),
        [
            's1 > s2',
            's2 > s3',
            's3 > s4',
            's1 > f1',
            's2 > f2',
            's3 > f3',
            's4 > f4',
            'f1 ~ diary',
            'f2 ~ diary',
            'f3 ~ diary',
            'f4 ~ diary',
        ],
        (7.7, 5.9),
    ),
}


def box(x, y, text, kind):
    "A box as SVG, and its edges: left, top, right, bottom."
    lines = text.split('\n')
    w, h = max(map(len, lines)) * LETTER + 22, len(lines) * LINE + 16
    fill, stroke, dash = KINDS[kind]
    words = ''.join(
        f'<text x="{x:.0f}" y="{y + (i - (len(lines) - 1) / 2) * LINE + 5:.0f}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    frame = f'<rect x="{x - w / 2:.0f}" y="{y - h / 2:.0f}" width="{w:.0f}" height="{h:.0f}" rx="6" fill="{fill}" stroke="{stroke}" stroke-width="1.5" stroke-dasharray="{dash}"/>'
    return frame + words, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def arrow(a, b, text, plain, down):
    "An arrow between two boxes' edges: straight where they overlap in one direction, else with a corner, at first upright if `down`."
    (al, at, ar, ab), (bl, bt, br, bb) = a, b
    ax, ay, bx, by = (al + ar) / 2, (at + ab) / 2, (bl + br) / 2, (bt + bb) / 2
    if at < by < ab or bt < ay < bb:  # side by side
        y = by if at < by < ab else ay
        points = [(ar, y), (bl, y)] if ax < bx else [(al, y), (br, y)]
    elif al < bx < ar or bl < ax < br:  # one above the other
        x = bx if al < bx < ar else ax
        points = [(x, ab), (x, bt)] if ay < by else [(x, at), (x, bb)]
    elif down:
        points = [(ax, ab if ay < by else at), (ax, by), (bl if ax < bx else br, by)]
    else:
        points = [(ar if ax < bx else al, ay), (bx, ay), (bx, bt if ay < by else bb)]
    line = ' '.join(f'{x:.0f},{y:.0f}' for x, y in points)
    (x1, y1), (x2, y2) = points[:2]
    label = (
        f'<text class="small" x="{(x1 + x2) / 2 + (0 if y1 == y2 else 10 + len(text) * 3.3):.0f}" y="{(y1 + y2) / 2 + (-7 if y1 == y2 else 4):.0f}">{escape(text)}</text>'
        if text
        else ''
    )
    return f'<polyline points="{line}" class="{"plain" if plain else "arrow"}"/>' + label


def draw(boxes, arrows, size):
    "A drawing as SVG text."
    (sx, sy), top = STEP, min(y for _, y, *_ in boxes.values()) - 1
    w, h = size[0] * sx, (size[1] - top) * sy
    made = {k: box(x * sx, (y - top) * sy, text, kind) for k, (x, y, text, kind) in boxes.items()}
    lines = []
    for a in arrows:
        ends, _, text = a.partition(': ')
        plain = '~' in ends
        start, end = (e.strip(' |') for e in ends.split('~' if plain else '>'))
        lines.append(arrow(made[start][1], made[end][1], text, plain, '|' in ends))
    return (
        f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}">
<style>text {{ font: 14px "Segoe UI", "Helvetica Neue", Arial, sans-serif; text-anchor: middle; fill: #222 }} .small {{ font-size: 12px; fill: #555 }}
polyline {{ fill: none; stroke: #555; stroke-width: 1.5 }} .arrow {{ marker-end: url(#head) }} .plain {{ stroke-dasharray: 2 4 }}</style>
<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto"><path d="M0,0 L9,4 L0,8 z" fill="#555"/></marker></defs>
<rect width="100%" height="100%" rx="8" fill="#FFFFFF"/>
'''
        + '\n'.join([*lines, *(svg for svg, _ in made.values())])
        + '\n</svg>\n'
    )


BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="128" height="22" viewBox="0 0 128 22"><rect width="128" height="22" rx="4" fill="#444"/>
<g fill="none" stroke="#F9AB00" stroke-width="3"><circle cx="12" cy="11" r="4.5"/><circle cx="22" cy="11" r="4.5" stroke="#E8710A"/></g>
<text x="33" y="15.5" font-family="Segoe UI, Helvetica Neue, Arial, sans-serif" font-size="12" fill="#fff">Open in Colab</text></svg>
"""


def main():
    folder = get_config().nbs_path / 'images'
    folder.mkdir(exist_ok=True)
    for name, drawing in DRAWINGS.items():
        (folder / f'{name}.svg').write_text(draw(*drawing), encoding='utf8')
    (folder / 'colab.svg').write_text(BADGE, encoding='utf8')


if __name__ == '__main__':
    main()
