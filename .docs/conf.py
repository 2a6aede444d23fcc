"""Settings of Sphinx: the look of the site. The pages are made by build.py, which calls Sphinx."""

from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent

settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(ROOT / 'settings.ini', encoding='utf8')
settings = settings['DEFAULT']

project = settings['title']
author = settings['author']
release = settings['version']
copyright = settings['copyright']
extensions = ['myst_nb']

nb_execution_mode = 'off'  # outputs are the committed ones
nb_render_markdown_format = 'myst'
nb_mime_priority_overrides = [('html', 'text/html', 0)]
nb_code_prompt_show = 'Code'
nb_code_prompt_hide = 'Code'
myst_enable_extensions = ['colon_fence', 'dollarmath', 'attrs_inline', 'attrs_block', 'deflist']
myst_heading_anchors = 4
myst_heading_slug_func = 'docutils.nodes.make_id'

myst_update_mathjax = False
mathjax_path = 'mathjax/MathJax.js'  # version 2, which comes as a Python package
mathjax2_config = {
    'config': ['TeX-AMS-MML_HTMLorMML-full.js'],  # all its parts in one file
    'messageStyle': 'none',
    'showMathMenu': False,
    'HTML-CSS': {
        'availableFonts': [],
        'preferredFont': None,
        'webFont': 'STIX-Web',  # these fonts come with it
        'imageFont': None,
        'styles': {  # or else it asks for about:blank
            '@font-face': {'font-family': 'MathJax_Blank', 'src': "local('MathJax_Blank')"}
        },
    },
    'tex2jax': {
        'inlineMath': [['\\(', '\\)']],
        'displayMath': [['\\[', '\\]']],
        'ignoreClass': '.*',
        'processClass': 'math|tex2jax_process',
    },
}

html_theme = 'sphinx_book_theme'
html_title = project
html_static_path = ['_static', str(ROOT / '_sphinx' / 'pages' / '_static')]  # MathJax is there
html_favicon = str(HERE / '_static' / 'favicon.svg')
html_css_files = ['site.css']
html_context = {'default_mode': 'auto'}  # light or dark, as the reader's system is
html_theme_options = {
    'repository_url': settings['git_url'],
    'repository_branch': settings['branch'],
    'path_to_docs': 'nbs',
    'navbar_persistent': [],  # or else there are two search fields
    'use_repository_button': True,
    'use_issues_button': True,
    'use_download_button': True,
    'launch_buttons': {'colab_url': 'https://colab.research.google.com'},
}
