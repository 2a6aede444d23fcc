"What the project consists of."

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
IGNORED = {
    '.git',
    '.venv',
    'runs',
    '_docs',
    '_sphinx',
    'build',
    'dist',
    '__pycache__',
    '.pytest_cache',
    '.ruff_cache',
    '.ipynb_checkpoints',
    '.env',
}


def shipped_files():
    "Git's list, or all files but build output where there is no git."
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.split('\0')
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob('*')]
    paths = [ROOT / name for name in names if name and not IGNORED & set(Path(name).parts)]
    return sorted(path for path in paths if path.is_file())
