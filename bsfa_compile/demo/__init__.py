"""The first five minutes: a real trained model, calibrated, rewritten, and judged against dense."""
