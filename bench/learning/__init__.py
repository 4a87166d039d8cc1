"""What is learned, and with which settings."""
