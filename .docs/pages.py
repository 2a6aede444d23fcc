"""Run notebooks in place, so that the site and GitHub show outputs of today: `python .docs/pages.py [notebook …]`, or all, in reading order.

They share the run folder `runs/pages/`, so that each stage finds what the one before has made. A progress bar is kept in its last state; all else
that went to stderr is shown here, and left out of the page."""
import os, re, shutil, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config

config = get_config()
ROOT, NBS = Path(config.config_path), Path(config.nbs_path)
BAR = re.compile(r'\d+%\|.*\]$')   # a bar that something else was printed behind is not its last state


def last_states(text):
    "A text as a terminal would show it in the end: what a carriage return overwrites is gone."
    return [line.rstrip('\r').rpartition('\r')[2] for line in text.split('\n')]


def tidy(cell):
    "Merge the pieces of each stream, and keep of stderr only what progress bars came to; returns the rest of it."
    outputs, dropped = [], []
    for o in cell.outputs:
        if o.output_type == 'stream' and outputs and outputs[-1].get('name') == o.name: outputs[-1].text += o.text
        else: outputs.append(o)
    for o in outputs:
        if o.output_type != 'stream': continue
        lines = last_states(o.text)
        if o.name == 'stderr':
            bars = [line for line in lines if BAR.search(line.rstrip())]
            dropped += [line for line in lines if line.strip() and line not in bars]
            lines = [*bars, ''] if bars else []
        o.text = '\n'.join(lines)
    views = [o for o in outputs if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]
    cell.outputs = [o for o in outputs if o not in views and o.get('text') != '']
    return dropped


def run(path):
    "Run a notebook, tidy its outputs and save it; an error stops it, and leaves the file as it was."
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=1800, kernel_name='python3', resources=dict(metadata=dict(path=str(path.parent)))).execute()
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != 'code': continue
        for line in tidy(cell): print(f'  cell {i}, left out: {line[:200]}')
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, path)


def main():
    os.environ |= dict(SOCRATIC_RUNS=str(ROOT/'runs'/'pages'), HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
    named = [NBS/f'{n.removesuffix(".ipynb")}.ipynb' for n in sys.argv[1:]]
    if not named: shutil.rmtree(ROOT/'runs'/'pages', ignore_errors=True)
    for path in named or sorted(p for p in NBS.rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts)):
        print(path.relative_to(ROOT), flush=True)
        run(path)
        nbdev_clean(str(path))


if __name__ == '__main__': main()
