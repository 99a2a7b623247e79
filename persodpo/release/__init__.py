"""The published files of the paper: fetching, checking and reading them."""
