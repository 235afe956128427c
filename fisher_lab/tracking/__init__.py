"""Where the numbers of a run are also sent: sinks behind one small interface."""
