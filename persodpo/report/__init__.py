"""Run folder in, one page out: ``report/index.html``, with the executed notebooks as pages beside it.

The report computes nothing: it shows the tables, figures and notebooks that a run has, and says in one line each what it
lacks. The same run folder gives the same bytes.
"""

from persodpo.report.page import write_report

__all__ = ["write_report"]
