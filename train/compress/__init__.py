"""The parts of the verb `compress`: options, stages, reports."""
