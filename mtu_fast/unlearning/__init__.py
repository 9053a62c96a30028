"""What people do with the engine: the unlearning loop, the audit and its report, the scores."""
