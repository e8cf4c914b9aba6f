"""What is imported first: the tests send no usage reports, as the program sends none.

Not here: how that is done (pqcad_qat/machine/usage_reports.py).
"""

from __future__ import annotations

from pqcad_qat.machine.usage_reports import report_no_usage

report_no_usage()
