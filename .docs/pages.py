"""Runs notebooks in place, so that the site and GitHub show current outputs.

`python .docs/pages.py [notebook …]` runs those that are named, or all in reading order. They
share the run folder `runs/pages/`, so that each stage finds what the one before has written. A
progress bar is kept in its last state; whatever else went to stderr is printed here and left out
of the page.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config

config = get_config()
ROOT = Path(config.config_path)
NBS = Path(config.nbs_path)
RUNS = ROOT / 'runs' / 'pages'
TIMEOUT = 1800  # seconds for one cell
WIDGET = 'application/vnd.jupyter.widget-view+json'
PROGRESS_BAR = re.compile(r'\d+%\|.*\]$')  # nothing else was printed behind it


def notebooks(folder):
    """The notebooks below a folder in reading order, without those in hidden folders.

    Only the part of a path below the folder counts: the repository itself may lie anywhere.
    """
    paths = sorted(folder.rglob('*.ipynb'))
    return [
        path
        for path in paths
        if not any(part.startswith(('.', '_')) for part in path.relative_to(folder).parts)
    ]


def last_states(text):
    """The lines of a text as a terminal shows them in the end, after carriage returns."""
    return [line.rstrip('\r').rpartition('\r')[2] for line in text.split('\n')]


def merge_streams(outputs):
    """Join the pieces of each stream that follow one another."""
    merged = []
    for output in outputs:
        is_stream = output.output_type == 'stream'
        if is_stream and merged and merged[-1].get('name') == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def is_shown(output):
    """Whether a page can show an output: a widget needs a kernel, and an empty text is nothing."""
    return WIDGET not in output.get('data', {}) and output.get('text') != ''


def tidy(cell):
    """Merge a cell's streams and drop its widgets; of stderr only the last progress bars stay.

    Returns the lines of stderr that were dropped.
    """
    outputs = merge_streams(cell.outputs)
    dropped = []
    for output in outputs:
        if output.output_type != 'stream':
            continue
        lines = last_states(output.text)
        if output.name == 'stderr':
            bars = [line for line in lines if PROGRESS_BAR.search(line.rstrip())]
            dropped += [line for line in lines if line.strip() and line not in bars]
            lines = [*bars, ''] if bars else []
        output.text = '\n'.join(lines)
    cell.outputs = [output for output in outputs if is_shown(output)]
    return dropped


def run(path):
    """Run a notebook, tidy its outputs and save it; after an error the file is as it was."""
    nb = nbformat.read(path, 4)
    resources = {'metadata': {'path': str(path.parent)}}
    client = NotebookClient(nb, timeout=TIMEOUT, kernel_name='python3', resources=resources)
    client.execute()
    for number, cell in enumerate(nb.cells):
        if cell.cell_type == 'code':
            for line in tidy(cell):
                print(f'  cell {number}, left out: {line[:200]}')
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, path)


def main():
    """Run the notebooks that are named on the command line, or all of them."""
    os.environ['SOCRATIC_RUNS'] = str(RUNS)
    os.environ['HF_HUB_OFFLINE'] = '1'
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    named = [NBS / f'{name.removesuffix(".ipynb")}.ipynb' for name in sys.argv[1:]]
    if not named:
        shutil.rmtree(RUNS, ignore_errors=True)
    for path in named or notebooks(NBS):
        print(path.relative_to(ROOT), flush=True)
        run(path)
        nbdev_clean(str(path))


if __name__ == '__main__':
    main()
