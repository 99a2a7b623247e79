"""Where responses come from: one row a dialogue and model, with the completion as it was generated."""
