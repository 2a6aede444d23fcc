"Plots and the report: one file that loads nothing, with every word of a model escaped."

import math
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest

from socratic_finetune.report import (
    CONTENT_POLICY,
    MOST_TOPICS,
    _number,
    bar_chart,
    frontier_plot,
    html_table,
    paired_plot,
    report_html,
    report_text,
    transcripts,
)
from socratic_finetune.statistics import arm_means, known_scores

KNOWN = known_scores()
HOSTILE = '</td><script>alert(1)</script><img src=x onerror=alert(1)> & "quotes" \'and\' more'
HEAD_TAGS = {'html', 'head', 'meta', 'title', 'style', 'body'}
TEXT_TAGS = {'h1', 'h2', 'p', 'b', 'br', 'div', 'span', 'img', 'details', 'summary'}
ALLOWED_TAGS = HEAD_TAGS | TEXT_TAGS | {'table', 'tr', 'th', 'td'}
ALLOWED_ATTRIBUTES = {'lang', 'charset', 'name', 'content', 'http-equiv', 'alt', 'src', 'class'}


class Tags(HTMLParser):
    "Collects tags with their attributes, and the text between them."

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.text = ''
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def hostile_report():
    scores = KNOWN.assign(reply=HOSTILE, error=HOSTILE, topic=KNOWN.topic + HOSTILE)
    scores['question'] = scores.question + HOSTILE
    scores['model'] = scores.model + HOSTILE
    tables = {HOSTILE: arm_means(KNOWN), 'In words': pd.DataFrame({HOSTILE: [HOSTILE]})}
    plots = {HOSTILE: (bar_chart(KNOWN), HOSTILE), 'Plane': (frontier_plot(KNOWN), 'two points')}
    return report_html(scores, tables, plots, {HOSTILE: HOSTILE})


REPORT = hostile_report()
PARSED = Tags(REPORT)


# --- the report


def test_the_report_has_no_tag_or_attribute_that_is_not_ours():
    assert {tag for tag, _ in PARSED.tags} <= ALLOWED_TAGS
    names = {name for _, attributes in PARSED.tags for name in attributes}
    assert names <= ALLOWED_ATTRIBUTES
    assert '<script' not in REPORT
    assert not PARSED.of('a') + PARSED.of('link')


def test_the_report_loads_nothing():
    policies = [meta['content'] for meta in PARSED.of('meta') if 'http-equiv' in meta]
    assert policies == [CONTENT_POLICY]
    assert "default-src 'none'" in CONTENT_POLICY
    assert 'script' not in CONTENT_POLICY
    for image in PARSED.of('img'):
        assert image['src'].startswith('data:image/png;base64,')
    assert 'url(' not in report_text('style.css')
    assert '@import' not in report_text('style.css')


def test_the_policy_comes_before_whatever_it_governs():
    assert REPORT.index('Content-Security-Policy') < REPORT.index('<style>')


def test_what_a_model_wrote_is_shown_as_it_was_written():
    # once for each topic, question, heading and so on; none of it became a tag
    assert PARSED.text.count(HOSTILE) > 100


def test_every_picture_of_the_report_is_described():
    assert [image['alt'] for image in PARSED.of('img')] == [HOSTILE, 'two points']


def test_method_and_limits_are_in_the_report():
    for name in ('method.txt', 'limits.txt'):
        assert report_text(name).strip()[:60] in PARSED.text


def test_a_page_of_nbconvert_would_need_scripts_from_elsewhere():
    "Why the report is not nbconvert's: its pages cannot live under the content policy."
    nbconvert = pytest.importorskip('nbconvert')
    output = nbformat.v4.new_output('display_data', {'text/html': HOSTILE})
    cell = nbformat.v4.new_code_cell('', outputs=[output])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    for template in ('lab', 'classic'):
        page, _ = nbconvert.HTMLExporter(template_name=template).from_notebook_node(notebook)
        loaded = [script['src'] for script in Tags(page).of('script') if 'src' in script]
        assert any(source.startswith('https://') for source in loaded)
    fragment, _ = nbconvert.HTMLExporter(template_name='basic').from_notebook_node(notebook)
    image = Tags(fragment).of('img')[0]
    assert '<script>alert(1)</script>' in fragment  # a model's HTML would be let through
    assert image['alt'] == 'No description has been provided for this image'


# --- tables and transcripts


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (None, '–'),
        (math.nan, '–'),
        (0.0, '0'),
        (1.0, '1'),
        (0.5, '0.5'),
        (0.12345, '0.123'),
        (1.9e-6, '1.9e−06'),
        (-0.0004, '-0.0004'),
        (43, '43'),
        ('<b>', '<b>'),
    ],
)
def test_numbers_are_short(value, text):
    assert _number(value) == text


def test_a_table_is_escaped_and_keeps_its_index():
    table = html_table(pd.DataFrame({'<a>': [1.0, None]}, index=['<b>', 'c']))
    parsed = Tags(table)
    assert {tag for tag, _ in parsed.tags} == {'div', 'table', 'tr', 'th', 'td'}
    assert parsed.text == '<a><b>1c–'
    counted = Tags(html_table(pd.DataFrame({'a': [1, 2]})))
    assert counted.text == 'a12'  # a plain count is left out


def test_transcripts_show_arms_side_by_side():
    rows = [
        dict(model='base', topic='tides', question='Why?', reply='The moon.', socratic=0.0),
        dict(model='tuned', topic='tides', question='Why?', reply='What do you see?'),
        dict(model='base', topic='tides', question='How?', reply='By pulling.', socratic=0.1),
        dict(model='base', topic='tides', question='When?', reply='Twice a day.', socratic=0.1),
        dict(model='base', topic='soap', question='What?', reply='Fat.', socratic=0.2),
    ]
    scores = pd.DataFrame(rows).assign(helpful=0.5, error=None)
    scores.loc[1, 'error'] = 'no answer within 60 s'
    parsed = Tags(transcripts(scores))
    assert len(parsed.of('details')) == 2
    assert 'studentbasetuned' in parsed.text
    assert 'What do you see?socratic – · helpful 0.5 · no answer within 60 s' in parsed.text
    assert 'By pulling.socratic 0.1 · helpful 0.5–' in parsed.text  # no reply of the other arm
    assert 'When?' not in parsed.text  # two questions of each topic
    assert 'When?' in transcripts(scores, per_topic=3)


# --- plots


def is_png(data):
    return data.startswith(b'\x89PNG') and len(data) > 1000


def with_arms(n):
    return pd.concat([KNOWN[KNOWN.model == 'tuned'].assign(model=f'arm {i}') for i in range(n)])


@pytest.mark.parametrize('plot', [bar_chart, paired_plot, frontier_plot])
def test_the_same_scores_give_the_same_bytes(plot):
    first = plot(KNOWN)
    assert is_png(first)
    assert plot(KNOWN) == first


@pytest.mark.parametrize('plot', [bar_chart, frontier_plot])
def test_more_arms_than_colours(plot):
    assert is_png(plot(with_arms(9)))


@pytest.mark.parametrize('plot', [bar_chart, frontier_plot])
def test_an_arm_whose_judgements_all_failed(plot):
    scores = KNOWN.copy()
    scores.loc[scores.model == 'tuned', ['socratic', 'helpful']] = np.nan
    assert is_png(plot(scores))


@pytest.mark.parametrize('plot', [bar_chart, paired_plot, frontier_plot])
def test_a_single_topic(plot):
    assert is_png(plot(KNOWN[KNOWN.topic == KNOWN.topic.iloc[0]]))


def test_controls_are_optional():
    without = frontier_plot(KNOWN)
    assert frontier_plot(KNOWN, KNOWN.iloc[:0]) == without
    assert frontier_plot(KNOWN, with_arms(5)) != without


def test_of_many_topics_those_at_either_end_are_drawn():
    copies = [KNOWN.assign(topic=KNOWN.topic + f' {i}' + 40 * '.') for i in range(5)]
    many = pd.concat(copies)
    assert many.topic.nunique() > MOST_TOPICS
    assert is_png(paired_plot(many))
