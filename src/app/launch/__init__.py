"""One run in several processes of this machine: how they are started."""
