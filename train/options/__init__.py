"""The options of each verb, without what it computes with: help imports these alone."""
