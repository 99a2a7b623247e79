"""The five signals and the quality score made of them."""
