"""The wiring: each stage's inputs, settings and outputs, in the order in which text flows.

A stage first makes sure of the stages before it (unchanged ones are skipped), so each one, and each notebook, works on
its own. What a stage does stands in the module it calls; nothing else joins two modules.
"""

from persodpo.stages.ablate import run_ablate
from persodpo.stages.base import published_at_hand, published_files
from persodpo.stages.dialogues import run_dialogues
from persodpo.stages.generate import Scope, asked_scope, forecast_report, run_ask, run_forecast, run_generate
from persodpo.stages.pairs import limits, run_pairs, run_score
from persodpo.stages.report import as_released, run_audit, run_evaluate, run_figures
from persodpo.stages.score import profile_scorers, score_cache
from persodpo.stages.train import run_train

__all__ = [
    "Scope", "as_released", "asked_scope", "forecast_report", "limits", "profile_scorers", "published_at_hand",
    "published_files", "run_ablate", "run_ask", "run_audit", "run_dialogues", "run_evaluate", "run_figures", "run_forecast",
    "run_generate", "run_pairs", "run_score", "run_train", "score_cache",
]  # fmt: skip
