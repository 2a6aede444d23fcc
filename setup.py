"Reads settings.ini, so that names, versions and requirements stand in one place."

from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(root / 'settings.ini', encoding='utf8')
cfg = cfg['DEFAULT']


class BuildWithData(build_py):
    """Puts data/ and the stages' notebooks into the built package.

    In an editable install the library reads them beside itself."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / cfg['lib_name']
        self.copy_tree(str(root / 'data'), str(package / 'data'))
        self.mkpath(str(package / 'nbs'))
        for nb in sorted(
            (root / 'nbs').glob('[0-9]*.ipynb')
        ):  # a stage is a notebook with a cell tagged "parameters"
            if '"parameters"' in nb.read_text(encoding='utf8'):
                self.copy_file(str(nb), str(package / 'nbs' / nb.name))


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    url=cfg['git_url'],
    license='MIT',
    author=cfg['author'],
    author_email=cfg['author_email'],
    keywords=cfg['keywords'].split(),
    long_description=(root / 'README.md').read_text(encoding='utf8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_name'], f'{cfg["lib_name"]}.*']),
    cmdclass={'build_py': BuildWithData},
    install_requires=cfg['requirements'].split(),
    extras_require={
        'dev': cfg['dev_requirements'].split(),
        'quantize': cfg['quantize_requirements'].split(),
    },
    python_requires=f'>={cfg["min_python"]}',
    entry_points={
        'console_scripts': [cfg['console_scripts']],
        'nbdev': [f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d'],
    },
    zip_safe=False,
)
