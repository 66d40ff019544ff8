"""What every method stands on: batches, traces, taps, objectives, schedules, cards and errors."""
