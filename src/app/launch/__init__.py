"""Where a run trains: which processes there are, and how those of this machine are started."""
