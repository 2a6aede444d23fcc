"Sphinx: the look of the site. Pages are made by build.py, which calls Sphinx."
from configparser import ConfigParser
from pathlib import Path

config = ConfigParser(delimiters=['='], interpolation=None)
config.read(Path(__file__).parents[1]/'settings.ini', encoding='utf8')
config = config['DEFAULT']

project, author, release, copyright = config['title'], config['author'], config['version'], config['copyright']
extensions = ['myst_nb']
nb_execution_mode = 'off'                    # outputs are the committed ones
nb_render_markdown_format = 'myst'
nb_mime_priority_overrides = [('html', 'text/html', 0)]
myst_enable_extensions = ['colon_fence', 'dollarmath', 'attrs_inline', 'attrs_block', 'deflist']
myst_heading_anchors = 4
myst_heading_slug_func = 'docutils.nodes.make_id'
myst_update_mathjax = False
mathjax_path = 'mathjax/MathJax.js'          # version 2, which comes as a Python package
mathjax2_config = {'config': ['TeX-AMS-MML_HTMLorMML-full.js'], 'messageStyle': 'none', 'showMathMenu': False,   # its parts are all in this one file
                   'HTML-CSS': {'availableFonts': [], 'preferredFont': None, 'webFont': 'STIX-Web', 'imageFont': None,   # the fonts that come with it
                                'styles': {'@font-face': {'font-family': 'MathJax_Blank', 'src': "local('MathJax_Blank')"}}},   # else it asks for about:blank
                   'tex2jax': {'inlineMath': [['\\(', '\\)']], 'displayMath': [['\\[', '\\]']], 'ignoreClass': '.*', 'processClass': 'math|tex2jax_process'}}
html_theme = 'sphinx_book_theme'
html_title = project
html_static_path = ['_static', str(Path(__file__).parents[1]/'_sphinx'/'pages'/'_static')]   # the second is build.py's, with MathJax in it
html_favicon = str(Path(__file__).with_name('_static')/'favicon.svg')
html_css_files = ['house.css']
html_context = dict(default_mode='auto')   # light or dark, as the reader's system is
html_theme_options = dict(
    repository_url=config['git_url'], repository_branch=config['branch'], path_to_docs='nbs',
    navbar_persistent=[], use_repository_button=True, use_issues_button=True, use_download_button=True,
    launch_buttons=dict(colab_url='https://colab.research.google.com'))
