"""What the commands show: text tables, and HTML pages with charts inside.

``text`` and ``files`` stand on nothing; ``charts`` needs matplotlib and ``page`` needs jinja2, both
from the extra ``train``.
"""
