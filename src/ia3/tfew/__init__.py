"""T-Few: few-shot training and ranking of answer choices (paper sections 3.2 to 3.5)."""
