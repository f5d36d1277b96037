"""The data a run trains on: one module per LightningDataModule."""
