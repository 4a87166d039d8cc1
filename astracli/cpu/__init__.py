"""Quicker torch formulations for CPUs of what small models spend their time on. Same numbers up to rounding."""
