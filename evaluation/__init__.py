"""Asking the four arms, scoring their answers, and laying them side by side."""
