"""Files in and out: raw frames, scan scripts, what a run leaves behind."""
