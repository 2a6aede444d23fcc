"""Draws the diagrams of the pages: `python .docs/drawings.py` writes nbs/images/*.svg.

A diagram is at most 640 pixels wide, so that its words can still be read on a phone.
"""

from html import escape
from typing import NamedTuple

from nbdev.config import get_config

GRID_X = 80  # pixels between two columns of the grid
GRID_Y = 37  # pixels between two rows
LINE_HEIGHT = 17
LETTER_WIDTH = 7.4
STYLE = """<style>text { font: 14px "Segoe UI", "Helvetica Neue", Arial, sans-serif; \
text-anchor: middle; fill: #222 } .small { font-size: 12px; fill: #555 }
polyline { fill: none; stroke: #555; stroke-width: 1.5 } \
.arrow { marker-end: url(#head) } .plain { stroke-dasharray: 2 4 }</style>
<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">\
<path d="M0,0 L9,4 L0,8 z" fill="#555"/></marker></defs>
<rect width="100%" height="100%" rx="8" fill="#FFFFFF"/>"""
COLAB_BADGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="128" height="22" viewBox="0 0 128 22">\
<rect width="128" height="22" rx="4" fill="#444"/>
<g fill="none" stroke="#F9AB00" stroke-width="3"><circle cx="12" cy="11" r="4.5"/>\
<circle cx="22" cy="11" r="4.5" stroke="#E8710A"/></g>
<text x="33" y="15.5" font-family="Segoe UI, Helvetica Neue, Arial, sans-serif" font-size="12" \
fill="#fff">Open in Colab</text></svg>
"""
KINDS = {  # fill, stroke, and dashes of the frame
    'stage': ('#DCEBF5', '#0072B2', ''),
    'file': ('#FDF0DA', '#B36B00', ''),
    'note': ('none', 'none', ''),
    'choice': ('#FFFFFF', '#555555', '5 3'),
    'good': ('#D9F0E7', '#00795A', ''),
    'bad': ('#FBE3D6', '#B34700', ''),
}


class Drawing(NamedTuple):
    """A diagram: boxes, arrows between them, and its size.

    boxes: name -> (x, y, text, kind), with the centre of the box in steps of the grid
    arrows: 'from > to: text', where `|>` leaves upright and `~` is a dotted line
    size: width and height in steps of the grid
    """

    boxes: dict
    arrows: list
    size: tuple


class Edges(NamedTuple):
    """Where the edges of a box are, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def center(self):
        """The centre of the box as `(x, y)`."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


DRAWINGS = {
    'pipeline': Drawing(
        boxes=dict(
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
        arrows=[
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
        size=(8, 9),
    ),
    'run_folder': Drawing(
        boxes=dict(
            s1=(1.1, 1, '04 generate', 'stage'),
            s2=(1.1, 3, '06 finetune', 'stage'),
            s3=(1.1, 5, '08 chat', 'stage'),
            s4=(1.1, 7, '10 evaluate', 'stage'),
            f1=(4, 1, 'sft.jsonl', 'file'),
            f2=(4, 3, 'adapter/', 'file'),
            f3=(4, 5, 'chat.jsonl', 'file'),
            s5=(1.1, 9.2, '11 dialogue', 'stage'),
            f4=(4, 7, 'replies.jsonl\neval_scores.csv\neval_plot.png', 'file'),
            f5=(4, 9.2, 'dialogue.jsonl\ndialogue_plot.png', 'file'),
            run_json=(
                6.8,
                5,
                'run.json\nsettings,\nversions,\neach stage’s\nresult and time',
                'good',
            ),
        ),
        arrows=[
            's1 > f1: writes',
            's2 > f2: writes',
            's3 > f3: writes',
            's4 > f4: writes',
            's5 > f5: writes',
            'f1 ~ run_json',
            'f2 ~ run_json',
            'f3 ~ run_json',
            'f4 ~ run_json',
            'f5 ~ run_json',
        ],
        size=(7.8, 10.2),
    ),
    'constitution': Drawing(
        boxes=dict(
            q=(1, 1, 'a student’s\nquestion', 'file'),
            draft=(3, 1, 'draft', 'stage'),
            critique=(5.2, 1, 'critique', 'stage'),
            rules=(7, 1, 'a few\nprinciples', 'file'),
            revision=(5.2, 3.2, 'revision', 'stage'),
            row=(2.6, 3.2, 'training row and trail', 'good'),
        ),
        arrows=[
            'q > draft',
            'draft > critique',
            'rules > critique',
            'critique > revision: what to repair',
            'revision > row',
        ],
        size=(7.9, 4.1),
    ),
    'client': Drawing(
        boxes=dict(
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
        arrows=[
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
        size=(7.9, 6.3),
    ),
    'judge': Drawing(
        boxes=dict(
            q=(0.9, 1, 'question', 'file'),
            r=(0.9, 2.6, 'reply', 'file'),
            c=(0.9, 4.2, 'what was\nsaid before', 'file'),
            a=(0.9, 6, 'the card,\nif known', 'file'),
            judge=(2.9, 3.4, '\n\n\n\n\njudge\n\n\n\n\n', 'stage'),
            soc=(6.6, 1.7, 'socratic', 'good'),
            hel=(6.6, 5.1, 'helpful', 'good'),
            p1=(4.75, 1.2, 'guiding question,\nactionable, coherent,\nscaffolding', 'choice'),
            p3=(4.75, 3.4, 'limits: withholds,\non topic, correct,\nfaults', 'choice'),
            p2=(4.75, 5.6, 'scaffolding, clear,\nactionable, coherent,\nencouraging', 'choice'),
        ),
        arrows=[
            'q > judge',
            'r > judge',
            'c > judge',
            'a > judge',
            'judge > p1',
            'judge > p2',
            'judge > p3',
            'p1 > soc',
            'p2 > hel',
            'p3 > soc',
            'p3 > hel',
        ],
        size=(7.5, 7),
    ),
    'calibration': Drawing(
        boxes=dict(
            data=(1.1, 1, 'replies that\npeople rated', 'file'),
            feat=(3.8, 1, 'features of a reply,\nno tutor’s name in them', 'stage'),
            ridge=(6.7, 1, 'ridge\nregression', 'stage'),
            model=(6.7, 3.4, 'rating_model.json', 'file'),
            test=(3.2, 3.4, 'tested on tutors and problems\nthat it has never met', 'good'),
        ),
        arrows=['data > feat', 'feat > ridge', 'ridge > model', 'model > test'],
        size=(7.8, 4.4),
    ),
    'evaluation': Drawing(
        boxes=dict(
            q=(0.9, 2.2, '\n\nquestions on\ntopics held out\n\n', 'file'),
            base=(3, 1, 'base', 'stage'),
            prompted=(3, 2.2, 'prompted', 'stage'),
            tuned=(3, 3.4, 'tuned', 'stage'),
            controls=(3, 4.8, 'bots of known worth', 'choice'),
            replies=(4.9, 2.4, '\n\n\nreplies.jsonl\n\n\n', 'file'),
            counts=(6.8, 1, 'counts', 'good'),
            judge=(6.8, 3.9, '\n\njudge\n\n', 'stage'),
            scores=(6.8, 6.6, 'scores, intervals,\ntests, pictures', 'good'),
        ),
        arrows=[
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
        size=(7.8, 7.5),
    ),
    'dialogue': Drawing(
        boxes=dict(
            script=(1, 1, 'a script, from\nthe topic card', 'file'),
            student=(3.6, 1, 'the student\nspeaks', 'stage'),
            tutor=(6.3, 1, 'an arm or a\ncontrol replies', 'stage'),
            rules=(6.3, 3.4, 'rules read\nthe reply', 'choice'),
            reaction=(3.6, 3.4, 'the student moves\non, or reacts', 'choice'),
            saved=(6.3, 6, 'dialogue.jsonl', 'file'),
            measures=(3.6, 6, 'measures, tests,\ncurves by turn', 'good'),
        ),
        arrows=[
            'script > student',
            'student > tutor',
            'tutor |> rules',
            'rules > reaction',
            'reaction |> student',
            'rules |> saved',
            'saved > measures',
        ],
        size=(7.7, 7),
    ),
    'own_subject': Drawing(
        boxes=dict(
            cards=(1, 1, 'cards of\nyour own', 'good'),
            teach=(3.1, 1, 'built-in\nteacher', 'stage'),
            rows=(5, 1, 'rows', 'file'),
            tune=(6.8, 1, 'finetune', 'stage'),
            adapter=(6.8, 3.2, 'adapter/', 'file'),
            tutor=(4.2, 3.2, 'a tutor who asks about them', 'good'),
        ),
        arrows=[
            'cards > teach',
            'teach > rows',
            'rows > tune',
            'tune > adapter',
            'adapter > tutor',
        ],
        size=(7.7, 4),
    ),
    'own_style': Drawing(
        boxes=dict(
            rule=(3.8, 1, 'a principle of your own', 'good'),
            draft=(1, 3.2, 'draft', 'stage'),
            critique=(2.9, 3.2, 'critique', 'stage'),
            revise=(4.9, 3.2, 'revision', 'stage'),
            row=(6.8, 3.2, 'training\nrow', 'file'),
        ),
        arrows=[
            'rule > critique: ask',
            'rule > revise: revise',
            'draft > critique',
            'critique > revise',
            'revise > row',
        ],
        size=(7.6, 4.1),
    ),
    'own_base': Drawing(
        boxes=dict(
            base=(1.5, 2, 'a base model\nconfig.json\nmodel.safetensors\ntokenizer', 'good'),
            tune=(4.2, 1, 'finetune', 'stage'),
            adapter=(6.5, 1, 'adapter/\nnames its base', 'file'),
            tutor=(6.5, 3, 'tutor', 'stage'),
        ),
        arrows=['base > tune', 'tune > adapter', 'adapter > tutor', 'base > tutor'],
        size=(7.7, 4),
    ),
    'gguf': Drawing(
        boxes=dict(
            file=(1.3, 1.6, 'model.gguf\nmetadata, tokenizer\nblocks of 4 bits', 'file'),
            convert=(3.4, 1.6, 'convert,\nonce', 'stage'),
            folder=(
                6,
                1.6,
                'NAME-CHECKSUM/\nconfig, tokenizer\nsafetensors in bf16',
                'good',
            ),
            tune=(6, 4, 'finetune', 'stage'),
            adapter=(3.4, 4, 'adapter/\nfile and checksum', 'file'),
        ),
        arrows=[
            'file > convert',
            'convert > folder',
            'folder > tune',
            'tune > adapter',
            'adapter ~ file: which file?',
        ],
        size=(7.7, 5.2),
    ),
    'server': Drawing(
        boxes=dict(
            client=(0.9, 1.2, 'a client', 'note'),
            check=(3, 1.2, 'read and check', 'choice'),
            turn=(5.9, 1.2, 'wait for its turn', 'file'),
            error=(3, 3.6, 'an error object', 'bad'),
            model=(5.9, 3.6, 'one thread, one model:\na token for each\nreply in turn', 'stage'),
            events=(0.9, 3.6, 'events', 'good'),
        ),
        arrows=[
            'client > check',
            'check > turn: fine',
            'check |> error: not so',
            'turn > model',
            'model > events: pieces, until the end or until the client leaves',
        ],
        size=(7.9, 5.2),
    ),
    'share': Drawing(
        boxes=dict(
            run=(1, 1.2, 'a run', 'file'),
            pick=(3.2, 1.2, 'pick files,\nwrite the card', 'stage'),
            staged=(5.8, 1.2, 'share/\nall that will be sent', 'file'),
            scan=(5.8, 3.8, 'a key?\na path of this machine?', 'choice'),
            stop=(5.8, 6.2, 'nothing is sent', 'bad'),
            upload=(3.2, 3.8, 'upload,\nthen commit', 'stage'),
            hub=(1, 3.8, 'the Hub', 'good'),
        ),
        arrows=[
            'run > pick',
            'pick > staged',
            'staged > scan',
            'scan > stop: found',
            'scan > upload: none',
            'upload > hub',
        ],
        size=(7.7, 7.2),
    ),
    'export': Drawing(
        boxes=dict(
            base=(1, 1, 'base\nsafetensors', 'file'),
            adapter=(1, 4, 'adapter/', 'file'),
            merge=(3, 1, 'merge,\nrow by row', 'stage'),
            merged=(5.2, 1, 'merged/', 'good'),
            gguf=(5.2, 2.6, 'tutor-q8_0.gguf\ntokenizer, template', 'good'),
            lora=(5.2, 4, 'tutor-lora-f16.gguf', 'good'),
            ollama=(5.2, 5.6, 'Modelfile\ntemplate in Go', 'good'),
            check=(7.1, 2.6, 'llama.cpp:\nsame words?', 'stage'),
        ),
        arrows=[
            'base > merge',
            'adapter > merge',
            'merge > merged',
            'merge > gguf',
            'adapter > lora',
            'gguf > check',
            'adapter > ollama',
        ],
        size=(8, 6.6),
    ),
    'lessons': Drawing(
        boxes=dict(
            change=(1, 1.2, 'one change in\nthe reference', 'file'),
            seeds=(1, 3.8, 'the reference,\nother seeds', 'file'),
            same=(3.2, 2.5, '\nfinetune\nreply to questions\njudge\n', 'stage'),
            point=(5.3, 1.2, 'a point', 'good'),
            band=(5.3, 3.8, 'a grey band', 'file'),
            verdict=(6.85, 2.5, 'outside it,\nor chance?', 'choice'),
        ),
        arrows=[
            'change > same',
            'seeds > same',
            'same > point',
            'same > band',
            'point > verdict',
            'band > verdict',
        ],
        size=(7.7, 5),
    ),
    'real_model': Drawing(
        boxes=dict(
            base=(1.2, 2.6, 'SmolLM2-135M\nfrom a folder,\nthe Hub or a wheel', 'file'),
            tutor=(3.5, 2.6, '\n\n\n\nthe tutor\nbase | tuned\n\n\n\n', 'stage'),
            validation=(6, 0.9, 'validation topics:\nwhich change helps?', 'choice'),
            heldout=(6, 2.6, 'held-out topics, once:\nwhere it stands', 'good'),
            everyday=(6, 4.3, 'no card: counted by\nrules, read by eye', 'file'),
        ),
        arrows=[
            'base > tutor: LoRA',
            'tutor > validation',
            'tutor > heldout',
            'tutor > everyday',
        ],
        size=(7.5, 5.4),
    ),
    'stages': Drawing(
        boxes=dict(
            s1=(0.8, 1, '04_generate', 'stage'),
            s2=(2.4, 1, '06_finetune', 'stage'),
            s3=(3.85, 1, '08_chat', 'stage'),
            s4=(5.25, 1, '10_evaluate', 'stage'),
            s5=(6.9, 1, '11_dialogue', 'stage'),
            f1=(0.8, 3, 'sft.jsonl', 'file'),
            f2=(2.4, 3, 'adapter/', 'file'),
            f3=(3.8, 3, 'chat.jsonl', 'file'),
            f4=(5.3, 3, 'eval_plot.png', 'file'),
            f5=(6.9, 3, 'dialogue.jsonl', 'file'),
            run_json=(
                3.85,
                5,
                '        run.json: which stage is done, with what result, in what time        ',
                'good',
            ),
        ),
        arrows=[
            's1 > s2',
            's2 > s3',
            's3 > s4',
            's4 > s5',
            's1 > f1',
            's2 > f2',
            's3 > f3',
            's4 > f4',
            's5 > f5',
            'f1 ~ run_json',
            'f2 ~ run_json',
            'f3 ~ run_json',
            'f4 ~ run_json',
            'f5 ~ run_json',
        ],
        size=(7.8, 5.9),
    ),
}


def draw_box(x, y, text, kind):
    """A box with its centre at a pixel, as SVG, and its edges."""
    lines = text.split('\n')
    width = max(map(len, lines)) * LETTER_WIDTH + 22
    height = len(lines) * LINE_HEIGHT + 16
    edges = Edges(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    fill, stroke, dashes = KINDS[kind]
    frame = (
        f'<rect x="{edges.left:.0f}" y="{edges.top:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" rx="6" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="1.5" stroke-dasharray="{dashes}"/>'
    )
    words = ''
    for number, line in enumerate(lines):
        baseline = y + (number - (len(lines) - 1) / 2) * LINE_HEIGHT + 5
        words += f'<text x="{x:.0f}" y="{baseline:.0f}">{escape(line)}</text>'
    return frame + words, edges


def route(start, end, upright):
    """The points of an arrow between two boxes: straight if they overlap in one direction.

    Otherwise it has a corner, and leaves upright if `upright`.
    """
    start_x, start_y = start.center
    end_x, end_y = end.center
    if start.top < end_y < start.bottom or end.top < start_y < end.bottom:  # side by side
        y = end_y if start.top < end_y < start.bottom else start_y
        if start_x < end_x:
            return [(start.right, y), (end.left, y)]
        return [(start.left, y), (end.right, y)]
    if start.left < end_x < start.right or end.left < start_x < end.right:  # one above the other
        x = end_x if start.left < end_x < start.right else start_x
        if start_y < end_y:
            return [(x, start.bottom), (x, end.top)]
        return [(x, start.top), (x, end.bottom)]
    if upright:
        leaves = start.bottom if start_y < end_y else start.top
        arrives = end.left if start_x < end_x else end.right
        return [(start_x, leaves), (start_x, end_y), (arrives, end_y)]
    leaves = start.right if start_x < end_x else start.left
    arrives = end.top if start_y < end_y else end.bottom
    return [(leaves, start_y), (end_x, start_y), (end_x, arrives)]


def draw_label(text, points):
    """A text at the first segment of an arrow: above a level one, beside an upright one."""
    (x1, y1), (x2, y2) = points[:2]
    is_level = y1 == y2
    x = (x1 + x2) / 2 + (0 if is_level else 10 + len(text) * 3.3)
    y = (y1 + y2) / 2 + (-7 if is_level else 4)
    return f'<text class="small" x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'


def draw_arrow(arrow, edges):
    """An arrow as SVG.

    arrow: as in `Drawing.arrows`
    edges: name of a box -> its edges
    """
    ends, _, text = arrow.partition(': ')
    is_dotted = '~' in ends
    start, end = (name.strip(' |') for name in ends.split('~' if is_dotted else '>'))
    points = route(edges[start], edges[end], upright='|' in ends)
    line = ' '.join(f'{x:.0f},{y:.0f}' for x, y in points)
    kind = 'plain' if is_dotted else 'arrow'
    label = draw_label(text, points) if text else ''
    return f'<polyline points="{line}" class="{kind}"/>{label}'


def draw(boxes, arrows, size):
    """A drawing as SVG; the parameters are the fields of `Drawing`."""
    top = min(y for _, y, _, _ in boxes.values()) - 1
    width = f'{size[0] * GRID_X:.0f}'
    height = f'{(size[1] - top) * GRID_Y:.0f}'
    drawn_boxes = []
    edges = {}
    for name, (x, y, text, kind) in boxes.items():
        drawn, edges[name] = draw_box(x * GRID_X, (y - top) * GRID_Y, text, kind)
        drawn_boxes.append(drawn)
    drawn_arrows = [draw_arrow(arrow, edges) for arrow in arrows]
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">'
    )
    return '\n'.join([opening, STYLE, *drawn_arrows, *drawn_boxes, '</svg>', ''])


def main():
    """Write all drawings, and the badge that opens a page in Colab."""
    folder = get_config().nbs_path / 'images'
    folder.mkdir(exist_ok=True)
    for name, drawing in DRAWINGS.items():
        (folder / f'{name}.svg').write_text(draw(*drawing), encoding='utf8')
    (folder / 'colab.svg').write_text(COLAB_BADGE, encoding='utf8')


if __name__ == '__main__':
    main()
