"""What a run does: plan, analyze, train, each a short sequence from configuration to record."""
