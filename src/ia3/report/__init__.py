"""What a training did, on one HTML page."""
