"""What is measured and how; `results/<gpu or cpu>/` holds what was measured."""
