"""Stage `export`: an adapter merged into its model, as a plain folder that `transformers` alone loads.

python train.py experiment=export model=NAME export.adapter=runs/sea_image/mine/align/sea_dpo/adapter
"""

from __future__ import annotations

import logging

from configs.schema import Config
from mllm.export import export_merged
from mllm.loading import load
from stages.evaluate import weights_of
from stages.runs import Run
from stages.trainers import device_of

log = logging.getLogger(__name__)


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError if no adapter is given, or it does not fit the model."""
    adapter = cfg.export.adapter
    if adapter is None:
        raise ValueError("export.adapter is not set; give the folder of an adapter: export.adapter=FOLDER")
    made_from = run.settings("model") | {"export.adapter (sha256)": weights_of(adapter)}
    stage = run.stage("export", made_from)
    if stage.done or not run.leader:
        if not run.leader:
            stage.finish()
        return
    folder = stage.folder / "model"
    difference = export_merged(load(cfg.model, device_of(cfg)), adapter, folder)
    log.info(
        "the merged model is in %s; its logits differ by at most %.2g from those under the adapter", folder, difference
    )
    stage.finish({"folder": str(folder), "largest_logit_difference": difference})
