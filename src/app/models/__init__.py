"""The models a run trains: one module per architecture."""
