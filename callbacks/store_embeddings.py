"""Puts every finished embedding into the store before the next optimiser step begins."""

from __future__ import annotations

import math

import lightning as L

from datamodules.embedding_store import EmbeddingMeta, EmbeddingStore, StoredEmbedding
from lightning_modules.embedding_optimizer import EmbeddingOptimizer, Outcome


class StoreEmbeddings(L.Callback):
    """One append, hence one shard, for all embeddings that finished in a step.

    Args:
        settings_hash: identifies the settings that the embeddings were made with.
    """

    def __init__(self, store: EmbeddingStore, model: str, revision: str | None, settings_hash: str) -> None:
        self.store, self.model, self.revision, self.settings_hash = store, model, revision, settings_hash

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, EmbeddingOptimizer)
        # A resumed attempt makes some steps again (callbacks/slot_checkpoint.py): what is stored stays.
        new = [self.entry(o) for o in pl_module.outbox if o.job.id not in self.store]
        if new:
            self.store.append(new)
        pl_module.outbox.clear()

    def entry(self, outcome: Outcome) -> StoredEmbedding:
        record = outcome.job.record
        meta = EmbeddingMeta(
            harmful=record.harmful,
            concept=record.concept,
            style=outcome.job.samples.style_name,
            scenario=record.scenario,
            model=self.model,
            revision=self.revision,
            settings_hash=self.settings_hash,
            loss=outcome.loss if math.isfinite(outcome.loss) else None,
            steps=outcome.steps,
            seconds=outcome.seconds,
            status="ok" if outcome.ok else "failed",
            reason=outcome.reason,
        )
        finite = all(bool(e.isfinite().all()) for e in outcome.E.values())
        return StoredEmbedding(outcome.job.id, outcome.E if finite else None, meta)
