"""The command `report`: rebuild the page of a finished run from what its folder holds.

Not here: the content of the report (stages/measure.py), and how it looks (report/).
"""

from __future__ import annotations

from pathlib import Path

from pqcad_qat.errors import CheckpointError, ModelError
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.origins import located
from pqcad_qat.report.report_files import REPORT_FILE, read_report
from pqcad_qat.stages.chosen_widths import with_chosen_widths
from pqcad_qat.stages.measure import report as write_page
from pqcad_qat.stages.open_run import POLICY, open_run
from pqcad_qat.stages.prepared import SHARED, prepare
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_dependencies import recipes


def report(path: Path) -> Path:
    """Rebuild report.json, report.html and samples.png of a finished run; return the path of the page.

    Raises:
        ModelError: the folder holds no run, or its model cannot be loaded.
        CheckpointError: some stages are still to do, or would be repeated.
    """
    if not (path / POLICY).is_file():
        raise ModelError(f"{path}: got a folder without {POLICY}; allowed the folder of a finished run")
    policy = load_policy(path / POLICY)
    with located(policy):
        prepared = prepare(policy, path.parent / SHARED)
        table = recipes(policy, prepared)
    folder = RunFolder(path, table)
    to_do = [stage for stage in table if not folder.finished(stage) or stage in folder.outdated()]
    if to_do:
        raise CheckpointError(
            f"{path}: got a run whose stages {', '.join(to_do)} are to do; allowed a finished run: "
            f"`run {path / POLICY} --out {path} --resume` goes on with it"
        )
    again = f"python -m pqcad_qat run {path / POLICY} --out {path}"
    reproduction = read_report(path).reproduction if (path / REPORT_FILE).is_file() else None
    command = again if reproduction is None else reproduction.command
    with located(policy), open_run(path, policy, resume=True, recipes=table) as opened:
        return write_page(policy, with_chosen_widths(policy, prepared, opened), opened, command)
