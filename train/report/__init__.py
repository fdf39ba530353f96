"""The page of a report: what networks cost and do, side by side."""
