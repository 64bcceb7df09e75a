"""T-Few beside its rivals: in-context learning, SetFit, costs, and the RAFT benchmark."""
