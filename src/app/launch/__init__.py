"""One run in processes of this machine, several or one of its own: how they are started, and on
which devices."""
