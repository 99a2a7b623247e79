"""What the published artefacts say when they are recomputed: one executable check a finding."""
