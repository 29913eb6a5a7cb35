"""What is in memory now, who uses it, and who leaves first."""
